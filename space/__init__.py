"""A model in a browser; also what a Space on the Hub runs."""
