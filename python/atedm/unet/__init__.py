"""Pruning of a diffusers UNet: ``attach`` changes its modules, ``block`` computes a pruned block."""
