"""The token-prediction model of the controlled comparison (paper section 4.5), and a hybrid."""
