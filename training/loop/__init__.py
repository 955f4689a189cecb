"""The training loop: trainer, objective, checkpoints, log lines."""
