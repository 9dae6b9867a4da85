"""Files that appear complete or not at all, and json files that may not be what they should."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from detfamily.errors import DataError, OutputError

_PART = ".part"


def write_atomically(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let ``fill`` write a file that appears under ``path`` complete or not at all, also if the power fails.

    Whatever goes wrong, an older file of that name stays as it was. Several processes may write the same file at once.

    Args:
        path: the file; its folder is made where it is missing.
        fill: called with the open file.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def remove_parts(folder: Path) -> None:
    """Take away what processes that were killed in the middle of ``write_atomically`` left in a folder."""
    for part in folder.glob(f".*{_PART}"):
        part.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Add to the end of a text file.

    Raises:
        OutputError: it cannot be written; a part of the text may be there.
    """
    with _naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file in UTF-8, complete or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """What a json file holds.

    Raises:
        DataError: it does not exist, cannot be read, or is not json.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a json file, or only a part of one: {error}") from None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What the system says of a full disk does not name the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(error.errno, error.strerror or str(error), str(path)) from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and renaming is durable by itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
