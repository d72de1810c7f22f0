"""The training loop: one steppable run of a task. It knows nothing of controllers."""
