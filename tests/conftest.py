"""What several tests need."""

from __future__ import annotations

import os
import re

# Tests run side by side, each on one thread: several threads each would fight for the cores. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = {"tests/test_ablations.py": "file", "tests/test_recipes.py": "name", "tests/info/test_table.py": "name"}
"""Files whose tests with the same value of a parameter share what is slow to make, within a process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Send such tests to one process (``--dist loadgroup``), so that no other composes and builds the same again."""
    for item in items:
        values = getattr(item, "callspec", None) and item.callspec.params
        if values and (value := values.get(SHARED.get(item.nodeid.partition("::")[0], ""))):
            # recipes that differ in their number of epochs have the same model
            item.add_marker(pytest.mark.xdist_group(re.sub(r"_\d+ep$", "", str(value))))


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of golden cases: DETFAMILY_GOLDENS, or shared/goldens beside the repository."""
    named = os.environ.get("DETFAMILY_GOLDENS")
    if named:
        assert Path(named).is_dir(), f"DETFAMILY_GOLDENS names {named}, which is not a folder"
        return Path(named)
    beside = Path(__file__).resolve().parents[2] / "shared" / "goldens"
    if not beside.is_dir():
        pytest.skip("no golden cases: set DETFAMILY_GOLDENS, or put them at ../shared/goldens")
    return beside


@pytest.fixture
def listening() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests were started in the background, with word to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
