"""What the local log of a Weights & Biases run holds: a killed process leaves less than it was given.

The log (``run-ID.wandb``) is a LevelDB log: blocks of 32 KiB that hold records, each with a head of a checksum, a
length and a kind (whole, first, middle or last part); a record is a protocol buffer of the ``wandb`` package. The file
begins with a head of its own, of seven bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BLOCK = 2**15
_FILE_HEAD = 7
_HEAD = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def last_values(logs: Iterable[Path], names: tuple[str, ...]) -> dict[str, float]:
    """The highest of the values with which each of these metrics was last logged; those never logged are missing."""
    found: dict[str, float] = {}
    for log in logs:
        for name, value in _of_log(log, names).items():
            found[name] = max(value, found.get(name, value))
    return found


def _of_log(log: Path, names: tuple[str, ...]) -> dict[str, float]:
    """Read from the end, in ever larger parts: logs may be long, and what is looked for is near the end."""
    size, span = log.stat().st_size, 2**20
    while True:
        start = max(0, size - span) // BLOCK * BLOCK
        found: dict[str, float] = {}
        for record in records(log, start):
            found.update({name: value for name, value in _history(record) if name in names})
        if start == 0 or len(found) == len(names):
            return found
        span *= 8


def is_complete(log: Path) -> bool:
    """Whether the process that wrote a log came to its end: then it said so near the end of the log."""
    start = max(0, log.stat().st_size - 2**20) // BLOCK * BLOCK
    return any(_parsed(record).WhichOneof("record_type") == "exit" for record in records(log, start))


def records(log: Path, start: int = 0) -> Iterator[bytes]:
    """The complete records that begin at or after an offset; what a killed process left half-written is left out.

    Args:
        log: the file.
        start: in bytes; a multiple of the size of a block.
    """
    with log.open("rb") as file:
        file.seek(start)
        parts: list[bytes] | None = None
        while block := file.read(BLOCK):
            position = _FILE_HEAD if start == 0 and file.tell() <= BLOCK else 0
            while position + _HEAD.size <= len(block):
                _, length, kind = _HEAD.unpack_from(block, position)
                position += _HEAD.size
                piece = block[position : position + length]
                position += length
                if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
                    break  # filled up with zeros
                if len(piece) < length:
                    return
                if kind in (_WHOLE, _FIRST):
                    parts = [piece]
                elif parts is not None:
                    parts.append(piece)
                if kind in (_WHOLE, _LAST) and parts is not None:
                    yield b"".join(parts)
                    parts = None


def _history(record: bytes) -> Iterator[tuple[str, Any]]:
    parsed = _parsed(record)
    if parsed.WhichOneof("record_type") == "history":
        for item in parsed.history.item:
            yield item.key or "/".join(item.nested_key), json.loads(item.value_json)


def _parsed(record: bytes) -> Any:
    from wandb.proto import wandb_internal_pb2 as layout

    return layout.Record.FromString(record)  # type: ignore[attr-defined]
