"""Training data: sources, their mixture, batches."""
