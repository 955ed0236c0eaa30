"""Trains the embedded model from nothing on procedural scenes: ``python -m atedm_bench.training --help``."""
