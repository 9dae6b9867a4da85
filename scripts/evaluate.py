"""The same as ``detfamily evaluate``."""

import sys

from detfamily.cli import main

raise SystemExit(main(["evaluate", *sys.argv[1:]]))
