"""``python -m atedm_bench``: the command line."""

from atedm_bench.command import main

main()
