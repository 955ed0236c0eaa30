"""Trains the embedded model from nothing on procedural scenes: ``python -m atedm.bench.training --help``."""
