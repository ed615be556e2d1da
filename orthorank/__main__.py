"""``python -m orthorank``: the same as the command ``orthorank``."""

import sys

from orthorank.cli import main

sys.exit(main())
