"""``python -m atedm_bench``: runs the command line."""

from atedm_command import bench

bench()
