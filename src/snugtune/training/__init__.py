"""The training engine: jobs, the step, checkpoints."""
