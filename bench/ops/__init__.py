"""Each op against plain PyTorch, fused attention on the same shape, and the lower bound of this device."""
