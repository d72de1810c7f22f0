"""pruning: the study of pruning, and `trimtab prune`, which is one piece of it.

`schema` reads study files of `kind: pruning`, `run` runs their pieces of work (`job`: one task under one seed), each of
which trains a `dense` network and prunes it in `cell`s (one target, one method); `results` reads them back, and
`goals`, `tables`, `plots` and `report` say what was found. `command` is `trimtab prune`.
"""
