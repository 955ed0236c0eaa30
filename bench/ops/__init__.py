"""Compares each op with plain PyTorch, fused attention on the same shape, and the lower bound of this device."""
