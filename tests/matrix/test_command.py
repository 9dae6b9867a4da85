"""``detfamily matrix``: what is kept, what is done again, and what is written. Cells are examined by stand-ins."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from detfamily import cli
from detfamily.errors import ConfigError, DataError
from detfamily.matrix.command import go
from detfamily.matrix.request import Request, read_request
from detfamily.matrix.workers import examine_all

if os.name != "posix":
    pytest.skip("signals", allow_module_level=True)

AXES = ("families=[detr,dino]", "attentions=[dense,ms_deform]", "backbones=[small,'small backbone.stem_width=8']")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The stand-ins, in a working directory of their own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)
    import fakes

    yield fakes
    sys.modules.pop("fakes")


def request(*words: str) -> Request:
    return read_request([*AXES, "output_dir=out", *words])


def seen() -> list[str]:
    """The cells that were examined since the last call."""
    path = Path("seen.txt")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def run(fakes: ModuleType, *words: str, code: str = "now") -> int:
    return go(request(*words), fakes.outcome, lambda: code)


def test_cells_end_as_they_do_and_failures_are_told(fakes: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(fakes) == 1
    assert sorted(seen()) == sorted(cell.name for cell in request().cells())
    text = capsys.readouterr().out
    assert "8 cells: 4 ok, 2 refused, 2 failed" in text
    assert "refused: it says no, and why\n    detr x ms_deform x small; detr x ms_deform x small backbone" in text
    assert "[3/8] dino | dense | small: failed: KeyError: 'x'" in text
    logs = sorted(Path("out/failures").iterdir())
    assert len(logs) == 2 and all("in a line" in log.read_text() and str(log) in text for log in logs)


def test_what_is_written(fakes: ModuleType) -> None:
    run(fakes)
    lines = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    with Path("out/matrix.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == [one["status"] for one in lines]
    assert [row["parameters"] for row in rows if row["status"] == "ok"] == ["4000000"] * 4
    page = Path("out/matrix.md").read_text()
    assert "| detr | 4.00 / 0.008 / 11.4 / 5 | refused |" in page
    assert "| dino | failed | 4.00 / 0.008 / 11.4 / 9 |" in page
    assert page.index("## Failed") < page.index("## Refused")
    for name in ("small", "small-backbone-stem-width-8"):
        assert f"(pictures/{name}.png)" in page
        with Image.open(f"out/pictures/{name}.png") as picture:
            assert picture.width > 300 and len(set(picture.convert("RGB").resize((40, 40)).get_flattened_data())) > 20


def test_finished_cells_stay_and_failed_ones_are_done_again(fakes: ModuleType) -> None:
    run(fakes)
    seen()
    assert run(fakes) == 1
    assert seen() == [cell.name for cell in request().cells() if (cell.family, cell.attention) == ("dino", "dense")]
    assert run(fakes, "attentions=[ms_deform]") == 0 and not seen()
    run(fakes, "attentions=[ms_deform]", "repeats=9")
    assert len(seen()) == 4
    run(fakes, code="other")
    assert len(seen()) == 8
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 8 + 4 + 8


def test_an_interrupted_call_keeps_what_is_done_and_goes_on(fakes: ModuleType) -> None:
    Path(fakes.STOP).touch()
    with pytest.raises(KeyboardInterrupt):
        run(fakes)
    first, *_ = names = [cell.name for cell in request().cells()]
    assert seen() == names[:2]
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 1
    Path(fakes.STOP).unlink()
    run(fakes)
    assert seen() == [name for name in names if name != first]


def test_code_that_changes_meanwhile_ends_the_work(fakes: ModuleType) -> None:
    codes = iter(["a", "a", "b"])
    with pytest.raises(ConfigError, match="the code has changed meanwhile"):
        go(request(), fakes.outcome, lambda: next(codes))
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_process_that_is_killed_costs_its_cell_alone(fakes: ModuleType, jobs: int) -> None:
    found = {}
    cells = request("backbones=[small]").cells()
    examine_all(cells, jobs, lambda cell, outcome: found.update({cell.name: outcome}), fakes.killed)
    assert {name: one.status for name, one in found.items()} == {
        cell.name: "failed" if cell.attention == "dense" else "ok" for cell in cells
    }
    assert all(one.reason in ("", "its process is gone: killed by signal 9") for one in found.values())


def test_a_broken_results_file_is_named(fakes: ModuleType) -> None:
    Path("out").mkdir()
    Path("out/results.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"out/results\.jsonl is not what detfamily matrix writes"):
        run(fakes)


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cell that works and one that is refused, without stand-ins."""
    words = ["families=[detr]", "columns=cross_attention", "attentions=[dense,ms_deform]", "backbones=[small]"]
    small = ["model.embed_dim=32", "model.ffn_dim=32", "size=[64,64]", "repeats=1", f"output_dir={tmp_path}"]
    assert cli.main(["matrix", *words, *small, "runtime=cpu", "runtime.threads=1"]) == 0
    text = capsys.readouterr().out
    assert "2 cells: 1 ok, 1 refused, 0 failed" in text
    assert "refused: cross_attention=ms_deform samples around reference points" in text
    done, refused = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert done["parameters"] > 1e5 and done["multiply_adds"] > 1e6 and done["seconds"] > 0 and done["kept_bytes"] > 1e5
    assert done["device"] == "cpu, 1 thread, fp32" and done["peak_bytes"] is None and "parameters" not in refused
