"""Each op against plain PyTorch, fused attention on the same shape, and the floor that this device sets."""
