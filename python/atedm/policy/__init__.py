"""The policies that the options choose, one per file: tensors in, tensors out, no diffusers."""
