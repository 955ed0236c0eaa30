"""``python -m atedm_bench``: the command line, for launchers that start modules (``accelerate launch -m …``)."""

from atedm_extras import atedm_bench

atedm_bench()
