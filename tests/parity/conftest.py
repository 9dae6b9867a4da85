from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Copy = Callable[..., Path]


@pytest.fixture
def copy_of(goldens: Path, tmp_path: Path) -> Copy:
    """Copy a golden case to where a test may alter it: family/case, or under another name of the family."""

    def copy(name: str, family: str | None = None) -> Path:
        target = tmp_path / "cases" / (family or Path(name).parent.name) / Path(name).name
        target.mkdir(parents=True)
        for file in (goldens / name).iterdir():  # its content, not its read-only mode
            shutil.copyfile(file, target / file.name)
        shutil.copyfile(goldens / "roles.json", tmp_path / "cases" / "roles.json")
        return target

    return copy
