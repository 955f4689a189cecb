"""The model in a browser; a Space on the Hub runs this package too."""
