"""The training of a Y-Decoder: its recipe, its texts, its model."""
