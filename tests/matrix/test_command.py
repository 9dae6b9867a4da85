"""``detfamily matrix``: what is kept, what is done again, and what is written. Cells are examined by stand-ins."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from detfamily import cli
from detfamily.errors import ConfigError, DataError
from detfamily.matrix.cell import FAILED, OK, REFUSED, Figures, Outcome
from detfamily.matrix.command import go
from detfamily.matrix.request import Cell, Request, read_request

AXES = ("families=[detr,dino]", "attentions=[dense,ms_deform]", "backbones=[small,'small backbone.stem_width=8']")


@pytest.fixture(autouse=True)
def folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def outcome(cell: Cell) -> Outcome:
    """Depends on the names of the cell."""
    if (cell.family, cell.attention) == ("detr", "ms_deform"):
        return Outcome(REFUSED, "it says no,\n  and why")
    if (cell.family, cell.attention) == ("dino", "dense"):
        return Outcome(FAILED, "KeyError: 'x'", "Traceback\n  in a line\nKeyError: 'x'\n")
    size = len(cell.family) * 1_000_000
    return Outcome(OK, figures=Figures(size, size, 2 * size, 3 * size, None, 0.001 * len(cell.attention), 1, "", "cpu"))


class Work:
    """Goes through the cells in this process, and remembers them; Ctrl-C comes before the cell of a number."""

    def __init__(self, interrupted: int | None = None) -> None:
        self.seen: list[str] = []
        self.interrupted = interrupted

    def __call__(self, cells: Sequence[Cell], jobs: int, ended: Callable[[Cell, Outcome], None]) -> None:
        for index, cell in enumerate(cells):
            if index == self.interrupted:
                raise KeyboardInterrupt
            self.seen.append(cell.name)
            ended(cell, outcome(cell))


def request(*words: str) -> Request:
    return read_request(list({one.partition("=")[0]: one for one in (*AXES, "output_dir=out", *words)}.values()))


def names(*words: str) -> list[str]:
    return [cell.name for cell in request(*words).cells()]


def run(*words: str, code: str = "now") -> tuple[int, list[str]]:
    """The exit status, and the cells that were examined."""
    work = Work()
    return go(request(*words), work, lambda: code), work.seen


def test_cells_end_as_they_do_and_failures_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == (1, names())
    text = capsys.readouterr().out
    assert "8 cells: 4 ok, 2 refused, 2 failed" in text
    assert "refused: it says no, and why\n    detr x ms_deform x small; detr x ms_deform x small backbone" in text
    assert "[3/8] dino | dense | small: failed: KeyError: 'x'" in text
    logs = sorted(Path("out/failures").iterdir())
    assert len(logs) == 2 and all("in a line" in log.read_text() and str(log) in text for log in logs)


def test_what_is_written() -> None:
    run()
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
            assert picture.width > 300 and len(picture.convert("RGB").getcolors(10**6)) > 20


def test_finished_cells_stay_and_failed_ones_are_done_again() -> None:
    run()
    assert run() == (1, [cell.name for cell in request().cells() if outcome(cell).status == FAILED])
    assert run("attentions=[ms_deform]") == (0, [])
    assert run("attentions=[ms_deform]", "repeats=9") == (0, names("attentions=[ms_deform]"))
    assert run(code="other") == (1, names())
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 8 + 4 + 8


def test_an_interrupted_call_keeps_what_is_done_and_goes_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        go(request(), Work(interrupted=2), lambda: "now")
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 2
    assert run() == (1, names()[2:])


def test_code_that_changes_meanwhile_ends_the_work() -> None:
    codes = iter(["a", "a", "b"])
    with pytest.raises(ConfigError, match="the code has changed meanwhile"):
        go(request(), Work(), lambda: next(codes))
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 1


def test_a_broken_results_file_is_named() -> None:
    Path("out").mkdir()
    Path("out/results.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"out/results\.jsonl is not what detfamily matrix writes"):
        run()


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
