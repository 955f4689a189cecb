"""The model at the start of training."""
