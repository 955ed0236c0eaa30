"""``python -m atedm``: the command line.

A file or folder called atedm in the working directory hides this module, but not the command ``atedm``.
"""

from atedm.cli import main

main()
