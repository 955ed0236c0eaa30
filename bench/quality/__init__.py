"""The quality lab: what each setting costs in picture quality (``atedm-bench quality``)."""
