"""The same as ``detfamily train``."""

import sys

from detfamily.cli import main

raise SystemExit(main(["train", *sys.argv[1:]]))
