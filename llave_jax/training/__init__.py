"""Training runs: the step, the optimiser, checkpoints, metrics."""
