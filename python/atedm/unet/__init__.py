"""Pruning put into a diffusers UNet: ``attach`` changes its modules, ``block`` is what a pruned block computes."""
