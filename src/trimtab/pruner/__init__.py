"""pruner: `trimtab.prune` and `trimtab.load_pruned`: a trained network, pruned to a budget by a learned agent.

`search` is what agents do, `methods` names them and the rules without learning, `choice` fine-tunes and picks, `stage`
puts these together, `prune` is what users call, `result` what they get.
"""
