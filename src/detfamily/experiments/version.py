"""Which code a run was made with."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import detfamily

PACKAGE = Path(detfamily.__file__).resolve().parent
_IDLE = ("experiments", "matrix", "sweeps", "__pycache__")
"""Folders of the package that a training never reads."""


@dataclass(frozen=True)
class Code:
    """The code that runs are made with.

    Attributes:
        identity: a hash of the package's sources; of an installed package, its version.
        commit: for people: the commit, "+changes" behind it where the sources are not those of the commit; of an
            installed package, its version.
    """

    identity: str
    commit: str


def code_version(package: Path = PACKAGE) -> Code:
    """The present code.

    In a checkout, what counts are the sources themselves, committed or not: a commit that changes only documents or
    results leaves the identity as it is, and so does committing what has been tried out. Configs are not part of it,
    because the resolved configuration is a part of every run's identity anyway.
    """
    commit = _git(package, "rev-parse", "--short=10", "HEAD")
    if commit is None or _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        version = f"v{detfamily.__version__}"
        return Code(version, version)
    changed = _git(package, "status", "--porcelain", "--", ".", *(f":(exclude){name}" for name in _IDLE))
    return Code(hash_files(package, _IDLE), commit + ("+changes" if changed else ""))


def hash_files(folder: Path, idle: Sequence[str] = ("__pycache__",)) -> str:
    """A hash of the files of a folder and their names.

    Args:
        folder: with all below it.
        idle: names of folders in it that do not count.
    """
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and name.parts[0] not in idle and "__pycache__" not in name.parts:
            found.update(f"{name.as_posix()}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:12]


def _git(folder: Path, *words: str) -> str | None:
    """What git answers; None where there is no git, or the folder is in no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
