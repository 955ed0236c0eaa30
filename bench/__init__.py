"""Measurements; installed as ``atedm.bench``."""
