"""Evaluation: benchmarks that give each score with its protocol, its baselines and its interval."""
