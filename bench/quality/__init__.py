"""The quality lab: what pruning costs in picture quality (``atedm-bench quality``)."""
