"""pruner: `trimtab.prune` and `trimtab.load_pruned`: a trained network, pruned to a budget by a learned agent.

`search` finds configurations, `choice` fine-tunes the best and picks one, `prune` is what users call, `result` what
they get.
"""
