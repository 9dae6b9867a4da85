"""Errors that a user can act on, and the search for what they may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DetfamilyError(Exception):
    """Base of all errors that say what to do; the command line prints them without a traceback."""


class ConfigError(DetfamilyError, ValueError):
    """A group, choice, field or value that does not exist, has the wrong type, or contradicts another."""


class DataError(DetfamilyError, ValueError):
    """A data set that is missing, broken, or not what its annotations say."""


class LostWorkerError(DataError):
    """A reading process was killed, for which it can say no reason itself."""


class CheckpointError(DetfamilyError, RuntimeError):
    """A checkpoint that cannot be read, or does not fit the model."""


class NonFiniteError(DetfamilyError, FloatingPointError):
    """NaN or infinity where training needs a number; names the tensor and the images."""


class OutputError(DetfamilyError, OSError):
    """A file that cannot be written: a full disk, missing rights. Made as an OSError: number, reason, file."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


class LaunchError(DetfamilyError):
    """A run that cannot be started, or must not be."""


class ElsewhereError(DetfamilyError):
    """What ended this process happened in another one, which says it: this one stays silent on the command line."""


def require_at_least(least: int, key: str, value: float, why: str = "") -> None:
    """Refuse a setting that is too small.

    Args:
        least: the smallest value that is allowed.
        key: of the setting, as people write it.
        value: what was given.
        why: said in brackets, where it is not plain.

    Raises:
        ConfigError: the value is smaller.
    """
    if value < least:
        raise ConfigError(f"{key} is {value}; expected at least {least}" + (f" ({why})" if why else ""))


def nearest(word: str, options: Iterable[str], most: int = 3) -> str:
    """Say which of the options the word may have meant: "did you mean 'a' or 'b'?", else the list of all options.

    Args:
        word: what was given.
        options: the valid names.
        most: how many near names to show at the most.
    """
    names = sorted({str(option) for option in options})
    if not names:
        return "there is nothing to choose from"
    close = difflib.get_close_matches(word, names, n=most, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = names[:20]
    rest = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return "valid names: " + ", ".join(shown) + rest
