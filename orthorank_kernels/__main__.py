"""``python -m orthorank_kernels``: the command line."""

import sys

from orthorank_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
