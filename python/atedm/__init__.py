"""AT-EDM for diffusers."""
