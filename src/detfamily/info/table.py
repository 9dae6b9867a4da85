"""All published recipes as a Markdown table: what they have, beside what was printed of them."""

from __future__ import annotations

import json
from collections.abc import Iterator

from omegaconf import DictConfig

from detfamily.build import with_num_classes
from detfamily.config import compose, groups, to_container
from detfamily.info.classes import columns_of
from detfamily.info.cost import Cost, shapes_only
from detfamily.info.published import REASONS, compare, convention_of
from detfamily.structures import Size

HEAD = (
    "recipe",
    "parameters, M",
    "trained, M",
    "published, M",
    "GFLOPs",
    "counted as there",
    "published",
    "AP",
    "source",
    "why they differ",
)


def table(size: Size) -> str:
    """The table of all recipes, and a legend of its last column.

    Args:
        size: of the image that GFLOPs are counted on, height and width.
    """
    costs: dict[str, Cost] = {}
    rows = [row for cfg in published_recipes() for row in recipe_rows(cfg, size, costs)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *rows)]
    used = {word for row in rows for word in row[-1].split(", ")}
    return "\n".join([*lines, "", *(f"- {name}: {words}." for name, words in REASONS.items() if name in used)])


def published_recipes() -> Iterator[DictConfig]:
    """The configs of all experiments with published figures, by name."""
    for name in groups()["experiment"]:
        cfg = compose("train", ["data.root=.", f"experiment={name}"])
        if cfg.published:
            yield cfg


def recipe_rows(cfg: DictConfig, size: Size, costs: dict[str, Cost]) -> Iterator[list[str]]:
    """The cells of a recipe, a row for each published entry that has parameters or GFLOPs; one at least.

    Args:
        cfg: of the recipe.
        size: as for ``table``.
        costs: of the models so far, which grows: recipes often differ in their schedule only.
    """
    columns, _ = columns_of(cfg)
    blocks = json.dumps(to_container(with_num_classes(cfg, columns).detector))
    cost = costs[blocks] = costs.get(blocks) or Cost(shapes_only(cfg, columns))
    sized = [one for one in cfg.published if "params_m" in one or "gflops" in one]
    for entry in sized or cfg.published[:1]:
        found = compare(cfg.name, entry, cost, convention_of(cfg.family_name))
        yield [
            f"`{cfg.name}`",
            f"{cost.parameters.total / 1e6:.2f}",
            f"{cost.parameters.trained / 1e6:.2f}",
            str(entry.get("params_m", "-")),
            f"{cost.work(size).total / 1e9:.1f}",
            "-" if found.counted_so is None else f"{found.counted_so / 1e9:.1f}",
            str(entry.get("gflops", "-")),
            f"{entry.AP:.1f}" + ("" if entry.split == "val2017" else f" ({entry.split})"),
            entry.source,
            ", ".join(found.reasons),
        ]
