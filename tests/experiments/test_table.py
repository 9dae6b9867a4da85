"""Tables: what is read, and what each mistake in one is told."""

from __future__ import annotations

import pytest

from detfamily.errors import ConfigError
from detfamily.experiments.table import read_table

ROWS = [{"label": "a", "overrides": []}, {"label": "b", "overrides": ["decoder=refine"]}]


def test_a_table_is_read(write_table):
    table = read_table(write_table())
    assert (table.name, table.labels) == ("paper/table", ["plain", "refined, well", "no NMS"])
    assert table.row("no NMS").weights_of == "plain"
    assert table.row("refined, well").overrides == ("decoder=refine",)


def test_published_differences_are_taken_as_printed_or_from_the_figures(table):
    assert table.published_difference("refined, well") == pytest.approx(1.6)
    assert table.published_difference("no NMS") == -1
    assert table.published_difference("refined, well", "APs") is None


GROUPS = [
    {"label": "a", "overrides": [], "published": {"AP": 40}},
    {"label": "b", "overrides": ["decoder=refine"], "published": {"AP": 45}},
    {"label": "a, longer", "overrides": [], "published": {"AP": 44}},
    {"label": "b, longer", "overrides": ["decoder=refine"], "published": {"AP": 47}, "against": "a, longer"},
]


def test_a_row_is_compared_with_the_one_that_it_names(write_table):
    table = read_table(write_table(rows=GROUPS, baseline="a"))
    assert table.baselines == ["a", "a, longer"]
    assert [table.baseline_of(label) for label in table.labels] == [None, "a", None, "a, longer"]
    assert [table.published_difference(label) for label in table.labels] == [None, 5, None, 3]
    assert table.published_order() == {"a": 40, "b": 45, "a, longer": 44, "b, longer": 47}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [*ROWS, {**ROWS[1], "label": "c", "against": "d"}], "baseline": "a"}, "c.against: no row 'd'"),
        ({"rows": [ROWS[0], {**ROWS[1], "against": 1}], "baseline": "a"}, r"\(b\).against: expected a text, not 1"),
        ({"rows": [ROWS[0], {**ROWS[1], "against": "b"}], "baseline": "a"}, "b.against: it is a baseline itself"),
        ({"rows": [{**ROWS[0], "against": "b"}, ROWS[1]], "baseline": "a"}, "a.against: it is a baseline itself"),
        ({"titel": "x"}, "unknown key 'titel': did you mean 'title'"),
        ({"base": "deformable_detr_r51"}, "base: there is no experiment .* did you mean 'deformable_detr_r50'"),
        ({"baseline": "b2"}, "baseline: there is no row 'b2'"),
        ({"claim": 3}, "claim: expected a text, not 3"),
        ({"rows": {}}, "rows: expected a list of rows"),
        ({"rows": ["a"]}, "rows.0: expected a mapping"),
        ({"rows": [{"label": 12, "overrides": []}]}, r"rows.0.label: expected a text \(in quotes\), not 12"),
        ({"rows": [{"label": "a"}]}, r"rows.0 \(a\): overrides is missing"),
        ({"rows": [{"label": "a", "overrides": "x=1"}]}, r"rows.0 \(a\).overrides: expected a list"),
        ({"rows": [{"label": "a", "overrides": [], "notes": ""}]}, "unknown key 'notes': did you mean 'note'"),
        ({"rows": [{"label": "a", "overrides": [], "published": {"AP5": 1}}]}, "unknown key 'AP5'"),
        ({"rows": [{"label": "a", "overrides": [], "published": {"AP": "x"}}]}, "published.AP: expected a number"),
        ({"rows": [*ROWS, ROWS[0]], "baseline": "a"}, "the label 'a' stands for 2 rows"),
        ({"rows": [*ROWS, {"label": "c", "overrides": [], "weights_of": "aa"}], "baseline": "a"}, "c.weights_of"),
    ],
)
def test_a_broken_table_names_file_and_key(write_table, changes, message):
    file = write_table(**changes)
    with pytest.raises(ConfigError, match=message) as caught:
        read_table(file)
    assert str(file) in str(caught.value)


def test_a_missing_key_is_named(write_table):
    file = write_table()
    file.write_text(file.read_text().replace("source: nowhere, table 1\n", ""))
    with pytest.raises(ConfigError, match="source is missing"):
        read_table(file)


def test_a_file_that_is_none(tmp_path, write_table):
    with pytest.raises(ConfigError, match=r"there is no table .*did you mean '.*paper/table.yaml'"):
        read_table(write_table().with_name("tabel.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_table(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        read_table(tmp_path / "bad.yaml")


def test_an_unknown_label_is_met_with_the_nearest(table):
    with pytest.raises(ConfigError, match="no row 'plane': did you mean 'plain'"):
        table.row("plane")
