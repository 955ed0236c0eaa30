"""``python -m atedm``: the command line, for launchers that start modules (``accelerate launch -m …``)."""

from atedm.cli import main

main()
