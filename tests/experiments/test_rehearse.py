"""Rehearsals: what is planned, one real row of each kind, and what is said where one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml

from detfamily.errors import ConfigError
from detfamily.experiments import rehearse as module
from detfamily.experiments.rehearse import (
    IMAGES,
    Rehearsal,
    Rehearsed,
    go,
    perform_row,
    plan,
    read_request,
    read_tables,
)
from detfamily.matrix.cell import FAILED, OK, Outcome

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
TINY = ("data.train_size=16", "data.val_size=8", "runtime.threads=1", "runtime.device=cpu")


def planned(name: str, rows: str | None = None) -> list[Rehearsal]:
    return plan(read_tables(EXPERIMENTS / f"{name}.yaml"), "mini", rows, TINY)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETFAMILY_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("table", "row"),
    [("co_detr/heads", "DINO R50 12 epochs K=2"), ("detr/decoder_layers", '["layer 1, NMS"]'), ("dat/stages", "C5")],
)
def test_a_row_is_trained_and_evaluated(table: str, row: str) -> None:
    """With auxiliary heads; with another row's weights; a classifier."""
    (one,) = planned(table, row)
    outcome = perform_row(one)
    assert outcome.status == OK, f"{outcome.reason}\n{outcome.details}"
    assert isinstance(outcome, Rehearsed) and outcome.seconds > 0


def test_a_row_that_fails_is_told_with_what_it_printed() -> None:
    (one,) = planned("detr/encoder_depth", "0 layers")
    broken = Rehearsal(one.names, one.command, (*one.overrides, "data.objects=[5,2]"), one.batch)
    outcome = perform_row(broken)
    assert outcome.status == FAILED and "objects" in outcome.reason and "objects" in outcome.details


def test_rows_that_are_the_same_run_are_done_once() -> None:
    """On the miniature, which has a backbone of its own, tables of two backbones are the same."""
    tables = [table for name in ("r50", "r101") for table in read_tables(EXPERIMENTS / f"dn_detr/groups_{name}.yaml")]
    found = plan(tables, "mini")
    assert sum(len(one.names) for one in found) == sum(len(table.rows) for table in tables)
    assert len(found) == len(tables[0].rows)
    assert all(len(one.names) == 2 and one.names[0] != one.names[1] for one in found)


def test_a_row_has_the_overrides_of_its_run_and_the_length_of_a_rehearsal(tmp_path: Path) -> None:
    (one,) = planned("detr/encoder_depth", "12 layers")
    words = one.words(tmp_path)
    assert words[: len(one.overrides)] == list(one.overrides) and "encoder.num_layers=12" in words
    assert {"schedule.epochs=1", f"schedule.images_per_epoch={IMAGES}"} <= set(words[len(one.overrides) :])


@pytest.mark.parametrize(("each", "batch"), [("null", IMAGES), ("1", 1), ("4", IMAGES)])
def test_images_are_computed_at_once_or_one_by_one_as_in_the_run(each: str, batch: int) -> None:
    further = [*TINY, f"runtime.batch_size_per_device={each}"]
    (one,) = plan(read_tables(EXPERIMENTS / "dino/scales.yaml"), "mini", '["4 levels, 12 epochs"]', further)
    assert one.batch == batch


def test_all_tables_are_found_in_their_folder() -> None:
    names = {table.name for table in read_tables(EXPERIMENTS)}
    files = [file for file in EXPERIMENTS.glob("*/*.yaml") if "rows" in yaml.safe_load(file.read_text())]
    assert names == {f"{file.parent.name}/{file.stem}" for file in files} and len(names) > 50


def in_this_process(
    cells: Iterable[Rehearsal],
    jobs: int,
    ended: Callable[[Rehearsal, Outcome], None],
    examine: Callable[[Rehearsal], Outcome],
) -> None:
    for cell in cells:
        ended(cell, examine(cell))


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "examine_all", in_this_process)
    rows = [Rehearsal((f"paper/table: {label}",), "train", (), 8) for label in "abc"]
    rows[1] = Rehearsal(("paper/table: b", "paper/other: b"), "train", (), 8)

    def perform(one: Rehearsal) -> Outcome:
        if one is rows[0]:
            return Rehearsed(OK, seconds=1.5)
        return Outcome(FAILED, "ConfigError: no such thing", "what was printed\nno such thing")

    said: list[str] = []
    assert go(rows, 1, perform, said.append) == 1
    text = "\n".join(said)
    assert "[1/3] paper/table: a: ok, 1.5 s" in text and "(and 1 rows like it)" in text
    assert text.count("what was printed") == 1, "rows that fail of one thing are told together"
    assert "FAILED: paper/table: b; paper/other: b; paper/table: c" in text
    assert said[-1] == "1 rows ok, 3 failed"
    assert go(rows[:1], 1, perform, said.append) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["scale=minni"], "did you mean.*mini"),
        (["rows=a"], "rows=a are those of one table"),
        (["jobs=0"], "jobs=0"),
        (["schedule.epochs=3"], "what a rehearsal has of its own"),
    ],
)
def test_what_is_typed_wrongly_is_named(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXPERIMENTS.parent)
    with pytest.raises(ConfigError, match=message):
        read_request(words)


def test_every_override_reaches_the_rows() -> None:
    """Also one that takes a field away."""
    words = ["experiments/dino/scales.yaml", "~backbone.width", "+data.x=1", "jobs=3"]
    tables, scale, rows, jobs, further = read_request([str(EXPERIMENTS.parent / words[0]), *words[1:]])
    assert [table.name for table in tables] == ["dino/scales"]
    assert (scale, rows, jobs, further) == ("mini", None, 3, words[1:3])


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        read_tables(tmp_path)
