"""pruning: what of a trained network can be taken away, what it would cost then, how good it would be, and the cut.

Knows no reinforcement learning. `parts` and `network` say what can be chosen, `importance` which units go first,
`slicing` and `attention` cut, `costs` and `latency` count, `allocations` are the rules without learning that every
search is compared with, `evaluation` scores hundreds of choices for the price of tens, `saving` keeps the result.
`torch_pruning` has another library cut where `network` cannot.
"""
