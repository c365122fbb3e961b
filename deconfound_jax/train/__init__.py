"""Training: one step, the loop around it, checkpoints, the device mesh. Knows no method by name."""
