"""``python -m atedm_bench``: runs the command line."""

from atedm_bench.command import main

main()
