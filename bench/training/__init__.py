"""Trains the embedded model from scratch on procedural scenes: ``atedm-bench train --help``."""
