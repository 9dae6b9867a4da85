"""The page over all tables: from made-up tables, and the committed one against the results that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from detfamily.errors import ConfigError
from detfamily.experiments import plots
from detfamily.experiments.findings import read_findings
from detfamily.experiments.overview import PAGE, drawn, overview, read_tables
from detfamily.experiments.report import report, write_report
from detfamily.experiments.results import read_results
from detfamily.experiments.table import read_table

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
WITH_RUNS = sorted(EXPERIMENTS.glob("*/*.jsonl"))
MISSING = [{"label": "a mask", "reason": "masks are\nnot here", "published": {"AP": 41.0}}]


def row(label: str, ap: float | None, **changes) -> dict:
    return {"label": label, "overrides": [], "published": {} if ap is None else {"AP": ap}, **changes}


def run(table: str, label: str, seed: int, ap: float, **changes) -> str:
    return json.dumps(
        {
            **{"table": table, "scale": "mini", "row": label, "seed": seed, "status": "finished", "config": label},
            **{"code": "one", "commit": "abc", "images_seen": 100, "curve": [], "seconds": 1800, "overrides": []},
            **{"AP": ap, **dict.fromkeys(("AP50", "AP75", "APs", "APm", "APl")), **changes},
        }
    )


@pytest.fixture
def folder(tmp_path, write_table):
    """Three tables: one that was run, one whose only finished run is the baseline's, and one without runs."""
    home = tmp_path / "experiments"
    plain = yaml.safe_load(write_table().read_text())
    tables = {
        "paper_a/first": {"rows": [row("plain", 40), row("up", 41), row("down", 39), row("later", 45)], "title": "One"},
        "paper_a/second": {"rows": [row("plain", 40), row("up", 41)], "title": "Two"},
        "paper_b/third": {"rows": [row("plain", 40), row("other", None)], "title": "Three", "not_expressed": MISSING},
    }
    for name, changes in tables.items():
        file = home / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({**plain, **changes}))
    aps = {"plain": (0.30, 0.31, 0.32), "up": (0.40, 0.412, 0.421), "down": (0.34, 0.352, 0.361)}
    lines = [run("paper_a/first", label, seed, ap) for label, found in aps.items() for seed, ap in enumerate(found)]
    (home / "paper_a/first.jsonl").write_text("\n".join(lines) + "\n")
    (home / "paper_a/second.jsonl").write_text(run("paper_a/second", "plain", 0, 0.3, gpu_hours=2.0) + "\n")
    return home


def cells(page: str, name: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| [`{name}`]"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_table_has_its_line(folder):
    page = overview(read_tables(folder))
    # Ours: plain, down, up; of the pairs of 39, 40 and 41 one, plain above down, is the other way round.
    assert cells(page, "paper_a/first") == [
        "[`paper_a/first`](paper_a/first.md)",
        *("One", "nowhere, table 1", "3 of 4", "`mini`", "3", "+0.33 (3 rows, p = 0.5)"),
        *("1", "1", "0", "0", "1", "1", "holds in part", "4.50 CPU-h"),
    ]
    assert cells(page, "paper_a/second")[3:] == [
        *("1 of 2", "`mini`", "1", "-", "0", "0", "0", "0", "1", "0", "open", "2.00 GPU-h")
    ]
    assert cells(page, "paper_b/third") == [
        "[`paper_b/third`](paper_b/third.yaml)",
        *("Three", "nowhere, table 1", "2", "0", "not run"),
    ]


def test_the_sums_and_what_cannot_be_run_are_told(folder):
    page = overview(read_tables(folder), "pictures/overview.png")
    assert "- 2 of 3 tables have runs, and 4 of 8 rows: 10 finished runs, 2.00 GPU-h + 4.50 CPU-h." in page
    assert "print 4 differences to a baseline. Resolved with the published sign: 1, with the opposite one: 1;" in page
    assert "not resolved: 0, of which 0 with the published sign; published as zero: 0; not run: 2." in page
    assert "`down` of [`paper_a/first`](paper_a/first.md), +4.1 where −1.0 is published." in page  # noqa: RUF001
    assert "All tables with runs were run as miniatures" in page and "never the figures" in page
    assert "| [`paper_b/third`](paper_b/third.yaml) | a mask | 41.0 | masks are not here |" in page
    assert "](pictures/overview.png)" in page


def test_without_runs_there_is_no_picture(folder, capsys):
    for file in folder.glob("*/*.jsonl"):
        file.unlink()
    report([str(folder)])
    assert capsys.readouterr().out.split() == [str(folder / PAGE)]
    page = (folder / PAGE).read_text()
    assert "0 of 3 tables have runs" in page and page.count("not run |") == 3 and "![" not in page


def test_a_report_renews_the_overview_where_there_is_one(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    report([])
    files = [Path(name) for name in capsys.readouterr().out.split()]
    assert files == [Path("experiments") / PAGE, Path("experiments/pictures/overview.png")]
    assert Image.open(files[1]).size[0] > 300 and files[1].stat().st_size < 100_000
    results = folder / "paper_a/first.jsonl"
    results.write_text(results.read_text() + run("paper_a/first", "later", 0, 0.5) + "\n")
    report(["experiments/paper_a/first.yaml"])
    assert str(folder / PAGE) in capsys.readouterr().out
    assert cells(files[0].read_text(), "paper_a/first")[3] == "4 of 4"


def test_a_table_with_a_setting_is_that_table(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    report(["experiments/paper_a/first.yaml", "scale=mini"])
    assert "experiments/paper_a/first.md" in capsys.readouterr().out.split()


def test_only_what_has_both_is_drawn(folder):
    found = drawn(read_tables(folder))
    assert {name: [one.label for one in given] for name, given in found.items()} == {"paper_a/first": ["up", "down"]}


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there are no tables in"):
        read_tables(tmp_path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"a": 1}, "not_expressed: expected a list of rows"),
        (["a"], r"not_expressed\.0: expected a mapping with label and reason"),
        ([{"label": "a"}], r"not_expressed\.0: reason is missing"),
        ([{"label": "a", "reason": ""}], r"not_expressed\.0\.reason: expected a text"),
        ([{"label": "a", "reason": "b", "published": {"APP": 1}}], "unknown key 'APP'"),
    ],
)
def test_rows_that_are_not_expressed_are_checked(write_table, missing, message):
    with pytest.raises(ConfigError, match=message):
        read_table(write_table(not_expressed=missing))


def test_the_committed_overview_is_that_of_the_present_results():
    entries = read_tables(EXPERIMENTS)
    assert {one.table.path for one in entries if one.found} == {file.with_suffix(".yaml") for file in WITH_RUNS}
    expected = overview(entries, "pictures/overview.png")
    assert (EXPERIMENTS / PAGE).read_text(encoding="utf-8") == expected, "run: detfamily report"
    assert (EXPERIMENTS / "pictures/overview.png").is_file()


@pytest.mark.parametrize("file", WITH_RUNS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_committed_report_is_that_of_the_present_results(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Where no folder of runs comes before the results beside the table.
    monkeypatch.setattr(plots, "_save", lambda figure, path: None)  # Which takes the time, and is not compared.
    table = file.with_suffix(".yaml")
    page = tmp_path / f"{file.stem}.md"
    files = write_report(read_findings([str(table)]), page)
    assert table.with_suffix(".md").read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
        f"run: detfamily report {table.relative_to(EXPERIMENTS.parent)}"
    )
    assert read_results(file) == read_results(files[1])
    assert all((file.parent / "pictures" / one.name).is_file() for one in files[2:])
