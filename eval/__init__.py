"""How good a model is: benchmarks, with protocol, baselines and interval beside each number."""
