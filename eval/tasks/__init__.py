"""The kinds of benchmarks: one module each."""
