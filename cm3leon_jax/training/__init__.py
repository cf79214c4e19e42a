"""Loss, optimizer, step, checkpoints, metrics, and the one training loop."""
