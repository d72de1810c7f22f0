"""pruning: parts of a trained network physically taken out, and the widths that are worth keeping.

Knows no reinforcement learning. `attention` takes heads and feed-forward units out of torch's own transformer modules,
into which `trimtab.surgery` cannot look.
"""
