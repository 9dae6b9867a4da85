"""docs/model_sizes.md has the table that ``detfamily info info.table=true`` prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from detfamily.config import compose, groups
from detfamily.info import table as module
from detfamily.info.classes import columns_of
from detfamily.info.cost import Cost, Parameters, count_parameters, shapes_only
from detfamily.info.published import REASONS, SIZE
from detfamily.info.table import HEAD, recipe_rows, table

PAGE = Path(__file__).resolve().parents[2] / "docs/model_sizes.md"
OWN = ("demo", "overfit", "finetune")
"""Experiments that are ours and reproduce nothing."""
RECIPES = [name for name in groups()["experiment"] if name not in OWN]
ONE_OF_EACH_FAMILY = (
    "detr_r50_12ep",
    "deformable_detr_r50_two_stage",
    "conditional_detr_r101_dc5",
    "dab_detr_r50_dc5_fixed_xy",
    "dab_deformable_detr_r50_encoder_only",
    "dn_detr_r101_dc5_3pat_12ep",
    "dn_deformable_detr_r50",
    "dino_r50_5scale_12ep",
    "h_deformable_detr_swin_t_12ep",
    "co_deformable_detr_swin_s_36ep",
    "co_dino_r50_5scale_9enc_lsj_12ep",
)


def documented() -> dict[str, list[list[str]]]:
    """Recipe -> its rows in the page."""
    found: dict[str, list[list[str]]] = {}
    for line in PAGE.read_text(encoding="utf-8").split("## All recipes")[1].splitlines():
        if match := re.match(r"\| `(\w+)` \|", line):
            found.setdefault(match[1], []).append([cell.strip() for cell in line.split("|")[1:-1]])
    return found


COUNTED: dict[str, Parameters] = {}
"""Recipes that differ in their schedules alone share a detector."""


def counted(cfg: DictConfig) -> Parameters:
    columns = columns_of(cfg)[0]
    model = f"{columns} {OmegaConf.to_yaml(cfg.detector, resolve=True)}"
    if model not in COUNTED:
        COUNTED[model] = count_parameters(shapes_only(cfg, columns))
    return COUNTED[model]


def test_all_recipes_are_there_in_order() -> None:
    assert list(documented()) == RECIPES
    assert "| " + " | ".join(HEAD) + " |" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_and_published_figures(name: str) -> None:
    cfg = compose("train", ["data.root=.", f"experiment={name}"])
    found = counted(cfg)
    entries = [one for one in cfg.published if "params_m" in one or "gflops" in one] or cfg.published[:1]
    rows = documented()[name]
    assert len(rows) == len(entries)
    for row, entry in zip(rows, entries, strict=True):
        assert row[1:3] == [f"{found.total / 1e6:.2f}", f"{found.trained / 1e6:.2f}"]
        assert [row[3], row[6]] == [str(entry.get(key, "-")) for key in ("params_m", "gflops")]
        assert float(row[7].split()[0]) == entry.AP and row[8] == entry.source
        assert row[9] or "gflops" not in entry or (row[5] == row[4] and round(float(row[5])) == entry.gflops)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_all_cells(name: str) -> None:
    cfg = compose("train", ["data.root=.", f"experiment={name}"])
    costs: dict[str, Cost] = {}
    assert list(recipe_rows(cfg, SIZE, costs)) == documented()[name]
    assert len(costs) == 1


def test_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two recipes, with a legend of what they use."""
    names = ("detr_r50_150ep", "detr_r50_500ep")
    monkeypatch.setattr(
        module, "published_recipes", lambda: [compose("train", ["data.root=.", f"experiment={one}"]) for one in names]
    )
    lines = table(SIZE).splitlines()
    rows = [row for name in names for row in documented()[name]]
    assert lines[2:4] == ["| " + " | ".join(row) + " |" for row in rows]
    assert lines[4:] == ["", f"- elements: {REASONS['elements']}."]


def test_the_legend_of_the_page() -> None:
    used = {word for rows in documented().values() for row in rows for word in row[9].split(", ") if word}
    legend = re.findall(r"^- ([\w ]+): (.+)\.$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(legend) == {name: words for name, words in REASONS.items() if name in used}
