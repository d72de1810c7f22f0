"""Tasks: data, model, loss and budget of one training run each. They know nothing of controllers."""
