"""Run as `python -m corenas`."""

import sys

from corenas.cli import main

sys.exit(main())
