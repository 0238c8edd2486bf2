"""Benchmarks of updates, the switch, low-rank layers and whole systems."""
