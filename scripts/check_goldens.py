"""Check our code against golden cases of the official implementations.

    python scripts/check_goldens.py [--backend NAME] [--device NAME] DIR [DIR...]

DIR is a case, a family of cases, or a folder of families. Exits with 1 if anything exceeds its limit, was not compared,
or belongs to an unknown family. Says which backend computes multi-scale deformable attention.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

# Before torch loads: MKL then rounds alike on every CPU. Its code for new ones is no nearer to exact sums, and where a
# case makes much of rounding (scores of attention in the tens), results should not hang on the machine.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

from rich.console import Console

from detfamily.errors import DetfamilyError
from detfamily.ops import backends
from detfamily.parity.check import check, report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", type=Path, help="a case, a family, or a folder of families"
    )
    parser.add_argument(
        "--backend",
        choices=backends.BACKENDS,
        help="of multi-scale deformable attention; without it, the one that this device has",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (cpu, or as the backend needs it)")
    args = parser.parse_args()
    device = args.device or ("cuda" if args.backend == "cuda" else "cpu")
    try:
        with backends.use_backend(args.backend) if args.backend else contextlib.nullcontext():
            print(f"multi-scale deformable attention on {device}: {backends.describe(device)}", flush=True)
            passed = report(check(args.folders, device), Console(width=160))
    except DetfamilyError as error:
        print(f"check_goldens: {error}", file=sys.stderr)
        return 1
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
