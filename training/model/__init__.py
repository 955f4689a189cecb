"""The model to train: new, from a checkpoint, or from pretrained parts."""
