"""Check our code against golden cases of the official implementations.

    python scripts/check_goldens.py DIR [DIR...]

DIR is a case, a family of cases, or a folder of families. Exits with 1 if anything exceeds its limit, was not compared,
or belongs to an unknown family.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from detfamily.errors import DetfamilyError
from detfamily.parity.check import check, report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", type=Path, help="a case, a family, or a folder of families"
    )
    folders = parser.parse_args().folders
    try:
        passed = report(check(folders), Console(width=160))
    except DetfamilyError as error:
        print(f"check_goldens: {error}", file=sys.stderr)
        return 1
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
