"""``python -m atedm``: the command line. What has this name in the working directory hides it, not the command."""

from atedm.cli import main

main()
