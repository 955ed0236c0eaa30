"""What can be chosen, one idea per file: tensors in, tensors out, no diffusers."""
