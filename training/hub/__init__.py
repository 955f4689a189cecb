"""A trained model to the Hub."""
