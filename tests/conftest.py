"""What several tests need."""

from __future__ import annotations

import os

# Tests run side by side, each on one thread: several threads each would fight for the cores. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest


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
