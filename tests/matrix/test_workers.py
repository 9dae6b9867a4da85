"""Cells in processes: what becomes of the others when one dies, or the first one is asked to end."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from detfamily.matrix.cell import FAILED, REFUSED, Outcome
from detfamily.matrix.request import Cell, Settings
from detfamily.matrix.workers import examine_all

if os.name != "posix":
    pytest.skip("signals", allow_module_level=True)

CELLS = [Cell("detr", attention, "small", (), Settings((64, 64), 1, 1, 1)) for attention in ("a", "dense", "b")]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stand_ins"))
    import killed_cells

    yield killed_cells
    sys.modules.pop("killed_cells")


def test_a_process_that_is_killed_costs_its_cell_alone(stand_ins: ModuleType) -> None:
    found: list[tuple[str, Outcome]] = []
    examine_all(CELLS, 1, lambda cell, outcome: found.append((cell.attention, outcome)), stand_ins.killed)
    (_, first), (_, second), (_, third) = found
    assert [name for name, _ in found] == ["a", "dense", "b"]
    assert (first.status, second.status, third.status) == (REFUSED, FAILED, REFUSED)
    assert second.reason == "its process is gone: killed by signal 9" and first.reason != third.reason
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("listening")
def test_no_process_outlives_ctrl_c(stand_ins: ModuleType) -> None:
    with pytest.raises(KeyboardInterrupt):
        examine_all(CELLS, 2, lambda cell, outcome: None, stand_ins.interrupting)
    assert not multiprocessing.active_children()
