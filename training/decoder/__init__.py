"""Y-Decoder training: recipe, texts, model."""
