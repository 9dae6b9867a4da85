"""The report: figures against sums by hand, what it says, what it leaves out, and which files it writes."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from detfamily.build import build_detector
from detfamily.config import compose
from detfamily.data.shapes import CLASSES
from detfamily.errors import ConfigError, DataError
from detfamily.experiments.findings import frontier, read_findings
from detfamily.experiments.page import markdown, reading
from detfamily.experiments.plots import mean_curve
from detfamily.experiments.report import report
from detfamily.experiments.results import Plan, read_results, values, write_results
from detfamily.experiments.sizes import with_parameters

CONFIGS = {"plain": "c0", "refined, well": "c1", "no NMS": "c2"}
AP = {"plain": (0.30, 0.32, 0.31), "refined, well": (0.33, 0.36, 0.36), "no NMS": (0.305, 0.31, 0.315)}


def record(row: str, seed: int, ap: float | None, **changes):
    numbers = dict.fromkeys(("AP75", "APs", "APm"))
    return {
        **{"table": "paper/table", "scale": "mini", "row": row, "seed": seed, "config": CONFIGS[row], "code": "one"},
        **{"status": "finished", "commit": "abc", "date": "2025-01-01T00:00:00+00:00", "overrides": ["+scale=mini"]},
        **{"AP": ap, "AP50": ap and 1.5 * ap, "APl": ap, **numbers, "images_seen": 20800, "images_per_second": 100.0},
        **{"memory_gib": 0.5, "memory_of": "process", "seconds": 200, "error": None},
        "curve": [[10400, ap / 2], [20800, ap]] if ap and row != "no NMS" else [],
        **changes,
    }


@pytest.fixture
def records():
    return [record(row, seed, ap) for row, found in AP.items() for seed, ap in enumerate(found)]


@pytest.fixture
def put(table):
    """Put records beside the table, and read them as the report does."""

    def findings(records):
        write_results(table.path.with_suffix(".jsonl"), records)
        return read_findings([str(table.path)])

    return findings


def row_of(page: str, label: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_main_table_by_hand(put, records):
    page = markdown(put(records), {})
    # Differences by seed 3, 4, 5: mean 4, deviation 1; t with two degrees of freedom 4.302653.
    reach = 4.302653 / math.sqrt(3)
    assert row_of(page, "refined, well") == [
        "refined, well",
        "45.4",
        "+1.6",
        "35.0 ± 1.7",
        "3",
        "+4.0",
        f"+{4 - reach:.1f} to +{4 + reach:.1f} (paired, n = 3)",
        "same sign, resolved",
        "20800",
    ]
    assert row_of(page, "plain")[2:6] == ["baseline", "31.0 ± 1.0", "3", "baseline"]
    assert row_of(page, "no NMS")[2] == "−1.0" and row_of(page, "no NMS")[7] == "no difference, not resolved"  # noqa: RUF001


def test_the_reading_says_what_is_resolved_and_what_is_not(put, records):
    said = " ".join(reading(put(records)))
    assert "leaves zero out): 1 of 2: `refined, well` +4.0 (n = 3)." in said
    assert "Not resolved, the interval contains zero: `no NMS` +0.0 (n = 3)." in said
    page = markdown(put(records), {})
    assert "absolute figures are not comparable" in page and "More is better." in page and "nowhere, table 1" in page


def test_one_seed_resolves_nothing(put, records):
    found = put([one for one in records if one["seed"] == 0])
    said = " ".join(reading(found))
    assert "0 of 2." in said and "nothing can be told from chance" in said
    assert row_of(markdown(found, {}), "refined, well")[6:8] == ["none (n = 1)", "same sign, no interval"]
    assert "No row has two seeds, so how far chance could move it is not known." in said


def test_the_opposite_sign_is_told(put, records):
    turned = [{**one, "AP": one["AP"] - 0.08} if one["row"] == "refined, well" else one for one in records]
    found = put(turned)
    assert row_of(markdown(found, {}), "refined, well")[7] == "opposite sign, resolved"
    assert "1 resolved with the opposite one (`refined, well`)" in markdown(found, {})


def test_no_learning_and_other_lengths_are_told(put, records):
    lame = [{**one, "AP": 0.001 * one["seed"], "images_seen": 5} if one["row"] == "no NMS" else one for one in records]
    said = " ".join(reading(put(lame)))
    assert "`no NMS`: AP below 1" in said and "different numbers of images" in said


def test_missing_and_failed_runs_are_named(put, records):
    bad = record("refined, well", 2, None, status="failed", error="exit status 3; out of memory")
    kept = [one for one in records if (one["row"], one["seed"]) not in (("refined, well", 2), ("no NMS", 1))]
    page = markdown(put([*kept, bad]), {})
    assert "- `refined, well`, seed 2: failed: exit status 3; out of memory" in page
    assert "- `no NMS`: not run, seed 1" in page
    assert row_of(page, "refined, well")[4] == "2"


def test_without_a_baseline_nothing_is_compared(put, records):
    found = put([one for one in records if one["row"] != "plain"])
    assert reading(found) == ["The baseline `plain` has no finished run, so there is nothing to compare with."]
    page = markdown(found, {})
    assert row_of(page, "plain")[3] == "-" and "\n- not run: `plain`\n" in page


@pytest.fixture
def groups(write_table):
    """A table with two baselines, and records of it."""
    names = ["a", "b", "a, longer", "b, longer"]
    given = {
        "a": (0.30, 0.32, 0.31),
        "b": (0.33, 0.36, 0.36),
        "a, longer": (0.5, 0.5, 0.5),
        "b, longer": (0.4, 0.39, 0.41),
    }
    rows = [
        {"label": name, "overrides": [], "published": {"AP": ap}}
        for name, ap in zip(names, (40, 45, 44, 47), strict=True)
    ]
    rows[3]["against"] = "a, longer"
    table = write_table(rows=rows, baseline="a")
    changes = {name: {"config": name, "seconds": 100 * (1 + place)} for place, name in enumerate(names)}
    found = [
        {**record("plain", seed, ap), **changes[name], "row": name}
        for name in names
        for seed, ap in enumerate(given[name])
    ]
    return table, found


def test_each_row_is_compared_with_its_own_baseline(groups):
    table, found = groups
    write_results(table.with_suffix(".jsonl"), found)
    page = markdown(read_findings([str(table)]), {})
    assert row_of(page, "a, longer")[1:4] == ["-", "44.0", "baseline"]
    assert row_of(page, "b, longer")[1] == "a, longer" and row_of(page, "b, longer")[3] == "+3.0"
    assert row_of(page, "b, longer")[6] == "−10.0" and row_of(page, "b, longer")[8] == "opposite sign, resolved"  # noqa: RUF001
    assert row_of(page, "b")[6] == "+4.0"
    assert "Of 2 published differences to the 2 baselines: 1 resolved with the published sign" in page
    costs = page[page.index("## What a row costs") :]
    assert row_of(costs, "b, longer")[6] == "1.33" and row_of(costs, "a, longer")[6] == "1.00"


def test_a_baseline_that_is_missing_is_named_and_the_others_serve(groups):
    table, found = groups
    write_results(table.with_suffix(".jsonl"), [one for one in found if one["row"] != "a, longer"])
    said = reading(read_findings([str(table)]))
    assert said[0] == "The baseline `a, longer` has no finished run, so there is nothing to compare with."
    assert "1 of 1: `b` +4.0 (n = 3)." in said[1]
    write_results(table.with_suffix(".jsonl"), [one for one in found if one["row"].startswith("a")])
    assert reading(read_findings([str(table)])) == [
        "Only baselines, `a`, `a, longer`, have finished, so there is nothing to compare."
    ]


def test_parameters_are_counted_from_the_overrides(records):
    words = ["experiment=deformable_detr_r50", "+scale=mini"]
    narrow = [*words, "model.embed_dim=32"]
    gone = [*words, "model.embed_dims=32"]
    first, second, third, kept = with_parameters(
        [
            {**records[0], "overrides": words},
            {**records[0], "overrides": narrow},
            {**records[0], "overrides": gone},
            {**records[0], "overrides": words, "params_m": 7.5},
        ]
    )
    cfg = compose("train", words)
    detector = build_detector(cfg, len(CLASSES), pretrained=False)
    count = sum(one.numel() for one in detector.parameters() if one.requires_grad)
    assert first["params_m"] == pytest.approx(count / 1e6, abs=1e-4) and 0 < second["params_m"] < first["params_m"]
    assert third["params_m"] is None and kept["params_m"] == 7.5


def test_parameters_stand_among_the_costs(put, records):
    page = markdown(put([{**one, "params_m": 0.3456} for one in records]), {})
    assert row_of(page[page.index("## What a row costs") :], "plain")[2] == "0.346"


def test_all_files_are_written_small_and_the_same_again(put, records, table, capsys):
    put(records)
    report([str(table.path)])
    written = [table.path.parent / name for name in capsys.readouterr().out.split()]
    folder = table.path.parent
    names = ["table.md", "table.jsonl", "pictures/table-differences.png", "pictures/table-curves.png"]
    assert written == [folder / name for name in names]
    before = {file: file.read_bytes() for file in written}
    for file in written[2:]:
        assert Image.open(file).size[0] > 300 and len(before[file]) < 100_000
        assert f"(pictures/{file.name})" in written[0].read_text()
    report([str(table.path)])
    assert {file: file.read_bytes() for file in written} == before


def test_a_folder_of_runs_gives_only_what_belongs_to_its_plan(table, records, tmp_path):
    folder = tmp_path / "runs"
    plan = Plan(str(table.path), "mini", (0, 1, 2, 3), (), CONFIGS, {"no NMS": "shorter"}, "one", "abc")
    plan.write(folder)
    other_code = record("plain", 0, 0.9, code="two")
    other_settings = record("plain", 1, 0.9, config="c9")
    for number, one in enumerate([*records, other_code, other_settings]):
        run = folder / "row" / str(number)
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({**one, "started": 0}))
        (run / "metrics.json").write_text(json.dumps({"AP": one["AP"], "AP50": -1.0}))
    found = read_findings([str(folder)])
    assert found.left_out == 2 and found.values("plain") == pytest.approx({0: 30, 1: 32, 2: 31})
    page = markdown(found, {})
    assert "left out: 2 finished runs of other code or settings" in page and "`plain`: not run, seed 3" in page
    assert "`no NMS`: shorter." in page
    report([str(folder)])
    again = read_findings([str(table.path), "scale=mini"])
    assert again.values("refined, well") == found.values("refined, well") and again.plan.remarks == {
        "no NMS": "shorter"
    }


def test_a_file_that_mixes_code_is_refused(put, records):
    with pytest.raises(DataError, match="mixes runs of different code, scale or settings"):
        put([*records, record("plain", 5, 0.3, code="two")])


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["TABLE"], DataError, "no results yet of paper/table: detfamily ablate .* scale=mini seeds=3"),
        (["TABLE", "output_dir=nowhere"], DataError, "no results yet in nowhere"),
        (["TABLE", "scale=minni"], ConfigError, "no scale 'minni': did you mean 'mini'"),
        (["TABLE", "scal=mini"], ConfigError, "did you mean 'scale'"),
        (["TABLE", "TABLE"], ConfigError, "expected one table"),
        ([], ConfigError, "no tables in experiments"),
        (["nothing.yaml"], ConfigError, "there is no table nothing.yaml"),
    ],
)
def test_mistakes_end_in_a_message(table, words, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        report([str(table.path) if word == "TABLE" else word for word in words])


def test_a_broken_line_of_results_is_named(table, records):
    file = table.path.with_suffix(".jsonl")
    file.write_text(json.dumps(records[0]) + "\n{\n")
    with pytest.raises(DataError, match="line 2, is not the record of a run"):
        read_results(file)


def test_values_are_those_of_finished_runs_in_per_cent(records):
    records[0]["status"] = "cut off"
    assert values(records, "plain") == pytest.approx({1: 32, 2: 31})


def test_a_mean_curve_is_taken_where_all_have_a_point():
    images, mean = mean_curve([[[10, 0.1], [20, 0.3]], [[10, 0.3], [20, 0.5], [30, 0.9]]])
    assert images == [10, 20] and mean == pytest.approx([0.2, 0.4])
    assert mean_curve([]) == ([], [])


def test_what_a_row_costs_and_which_rows_no_other_beats(put, records, table, write_table, capsys):
    write_table(tradeoff=True)
    speeds = {"plain": 100.0, "refined, well": 80.0, "no NMS": 90.0}
    given = [{**one, "images_per_second": speeds[one["row"]] + one["seed"]} for one in records]
    found = put(given)
    costs = found.tradeoff()
    assert {label: one.images_per_second for label, one in costs.items()} == {k: v + 2 for k, v in speeds.items()}
    assert frontier(costs) == ["plain", "refined, well"]  # "no NMS" is as good as plain, and slower
    page = markdown(found, {})
    costs_of = page[page.index("## What a row costs") : page.index("## What was run")]
    # Three runs of 200 seconds, as long as the baseline's.
    cells = ["refined, well", "35.0 ± 1.7", "-", "82.0", "0.50", "3.3", "1.00", "0.17 CPU-h", "yes"]
    assert row_of(costs_of, "refined, well") == cells
    assert "All 9 runs together: 0.50 CPU-h" in costs_of
    assert row_of(costs_of, "no NMS")[-1] == "no"
    report([str(table.path)])
    assert "pictures/table-tradeoff.png" in capsys.readouterr().out
    picture = table.path.parent / "pictures" / "table-tradeoff.png"
    assert Image.open(picture).size[0] > 300
    picture.unlink()
    write_table()  # a table that does not ask for it
    report([str(table.path)])
    assert not picture.exists()


def test_unknown_speeds_are_left_out(put, records):
    found = put([{**one, "images_per_second": None} for one in records])
    assert found.tradeoff() == {} and "What a row costs" not in markdown(found, {})


def test_hours_are_those_of_gpus_where_runs_say_so_and_failed_runs_count(put, records):
    seconds = {"plain": 3600, "refined, well": 5400, "no NMS": 1800}
    given = [{**one, "seconds": seconds[one["row"]] + 360 * one["seed"]} for one in records]
    for one in given:
        if one["row"] == "refined, well":
            one |= {"gpu_hours": 3.0, "devices": 2}
        if one["row"] == "no NMS":
            one |= {"memory_of": "cuda"}
    failed = record("plain", 3, None, status="failed", error="killed", seconds=7200, gpu_hours=None)
    found = put([*given, failed])
    assert found.spent("refined, well") == {"GPU": 9.0}
    assert found.spent("no NMS") == pytest.approx({"GPU": 3 * 0.5 + 0.3})
    assert found.spent("plain") == pytest.approx({"CPU": 3 + 0.3 + 2})
    assert found.spent() == pytest.approx({"GPU": 10.8, "CPU": 5.3})
    assert found.tradeoff()["refined, well"].relative == pytest.approx(1.5)
    assert "All 10 runs together: 10.8 GPU-h + 5.30 CPU-h" in markdown(found, {})
