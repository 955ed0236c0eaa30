"""Pruning of a diffusers UNet: ``attach`` applies it, ``installing`` changes modules, ``block`` computes a block."""
