"""Rows and media files to the batches of training."""
