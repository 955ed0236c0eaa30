"""Measurements, and the training of the embedded model: the command ``atedm-bench``."""
