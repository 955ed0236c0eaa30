"""``python -m atedm_bench``: the command line, for launchers that start modules (``accelerate launch -m …``)."""

from atedm_bench.command import main

main()
