"""What is kept of cells: a line each in one file, by what was measured and with which code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detfamily.errors import DataError
from detfamily.experiments.version import Code
from detfamily.files import write_text_atomically
from detfamily.matrix.request import Cell

RESULTS = "results.jsonl"

Record = dict[str, Any]
"""A line of the results file."""


class Results:
    """The results file, and which of its lines belong to the cells of today.

    Args:
        folder: of the file.
        code: the present one.
    """

    def __init__(self, folder: Path, code: Code) -> None:
        self.path, self.code = folder / RESULTS, code

    def read(self) -> dict[tuple[str, str], Record]:
        """(key, code) -> record, of all lines.

        Raises:
            DataError: a line is not a record.
        """
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        try:
            records = [json.loads(line) for line in lines]
            return {(one["key"], one["code"]): one for one in records}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path} is not what detfamily matrix writes ({error}): move it away") from None

    def add(self, cell: Cell, outcome: Mapping[str, Any]) -> Record:
        """Keep a record; what another call has added meanwhile stays."""
        record = {
            "key": cell.key,
            "code": self.code.identity,
            "commit": self.code.commit,
            "family": cell.family,
            "attention": cell.attention,
            "backbone": cell.backbone,
            **outcome,
            "overrides": list(cell.overrides),
            **vars(cell.settings),
        }
        records = self.read() | {(cell.key, self.code.identity): record}
        write_text_atomically(self.path, "".join(json.dumps(one) + "\n" for one in records.values()))
        return record

    def of(self, cells: Sequence[Cell]) -> list[Record]:
        """The records of cells that there are, with the present code, under their present labels."""
        found = self.read()
        labels = [{"family": one.family, "attention": one.attention, "backbone": one.backbone} for one in cells]
        keys = [(one.key, self.code.identity) for one in cells]
        return [found[key] | own for key, own in zip(keys, labels, strict=True) if key in found]
