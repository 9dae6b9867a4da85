"""What stands behind published numbers of parameters and GFLOPs, where they are not simply those of the model.

Most papers have their GFLOPs from one script, that of DETR's authors: the mean over the first 100 images of COCO's
val2017, resized as in evaluation. ``SIZE`` is one image of their mean area, 888,477 pixels. ``docs/model_sizes.md``
tells how the conventions here were found and checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from detfamily.info.cost import Cost, Parameters
from detfamily.structures import Size

SIZE: Size = (800, 1110)
EVERY_KIND = ("convolution", "linear", "attention", "sampling")
MOST_BY_ELEMENTS = 1.05
"""A published figure may be so much larger than the multiply-adds where a script also counts single elements."""

REASONS = {
    "frozen": "counts the frozen parameters, too",
    "stored": "counts all numbers of a checkpoint, so that frozen parameters and statistics of norms are among them",
    "heads": "the figure of the model without refinement, which adds heads",
    "elements": "their script adds one operation for each element of a sum, a norm and a ReLU, and five of a softmax",
    "no linear": "their script misses linear layers and sampling, and adds operations for single elements",
    "proposals": "the figure of the model of one stage; heads on all tokens of the encoder add 4.2",
    "100 queries": "the figure of DETR-DC5, which has 100 queries instead of 300",
    "DC5": "the figure of a DC5 model",
    "no patterns": "the figure of the model without patterns",
    "unknown": "not explained",
}
"""Why a published figure is another one than ours."""

PARAMETERS: dict[tuple[str, float], str] = {
    ("deformable_detr_r50_refine", 40): "heads",
    ("deformable_detr_r50_two_stage", 40): "heads",
}
"""(Recipe, published figure) -> reason, where the recipe's own numbers do not show it."""

GFLOPS: dict[tuple[str, float], str] = {
    ("deformable_detr_r50_two_stage", 173): "proposals",
    ("deformable_detr_r50_single_scale", 78): "unknown",
    ("deformable_detr_r50_single_scale_dc5", 128): "unknown",
    ("detr_r50_dc5_plus_50ep", 187): "100 queries",
    ("detr_r50_12ep", 225): "DC5",
    ("dab_detr_r101_dc5_3pat_12ep", 282): "no patterns",
    ("dn_detr_r101_dc5_3pat_12ep", 282): "no patterns",
}


@dataclass(frozen=True)
class Convention:
    """How authors counted.

    Attributes:
        size: of the image, height and width.
        kinds: which multiply-adds.
        reason: why the printed figure is larger than these; None where it is not.
    """

    size: Size
    kinds: tuple[str, ...]
    reason: str | None


_DETR = Convention(SIZE, EVERY_KIND, "elements")
_DEFORMABLE = Convention(SIZE, EVERY_KIND, None)
_DAB = Convention((800, 1333), ("convolution", "attention"), "no linear")

CONVENTIONS = {
    "detr": _DETR,
    "conditional_detr": _DETR,
    "deformable_detr": _DEFORMABLE,
    "dab_detr": _DAB,
    "dab_deformable_detr": _DAB,
    "dn_detr": _DAB,
    "dn_deformable_detr": _DAB,
    "dino": _DEFORMABLE,
    "h_deformable_detr": _DEFORMABLE,
    "co_deformable_detr": _DEFORMABLE,
    "co_dino": _DEFORMABLE,
}
"""Of the authors of a family, whose figures later papers quote."""


@dataclass(frozen=True)
class Comparison:
    """A published entry beside ours.

    Attributes:
        counted_so: our multiply-adds, counted as the authors did; None where none are published.
        parameters_reason: key of ``REASONS``: why the published parameters are not ours; None where they are.
        gflops_reason: the same for GFLOPs.
    """

    counted_so: int | None
    parameters_reason: str | None
    gflops_reason: str | None

    @property
    def reasons(self) -> list[str]:
        return [one for one in (self.parameters_reason, self.gflops_reason) if one]


def convention_of(family_name: str) -> Convention:
    """How the authors of a family counted; all multiply-adds at ``SIZE`` where nothing else is known."""
    return CONVENTIONS.get(family_name, _DEFORMABLE)


def compare(recipe: str, entry: Mapping[str, Any], cost: Cost, convention: Convention) -> Comparison:
    """Set a published entry beside our numbers.

    Args:
        recipe: name of the experiment.
        entry: one of its ``published``.
        cost: of the recipe's model.
        convention: how its authors counted.
    """
    counted, why_gflops = None, None
    if "gflops" in entry:
        counted = cost.work(convention.size).of(convention.kinds)
        why_gflops = _gflops_reason(recipe, entry["gflops"], counted, convention)
    why_parameters = _parameters_reason(recipe, entry["params_m"], cost.parameters) if "params_m" in entry else None
    return Comparison(counted, why_parameters, why_gflops)


def _parameters_reason(recipe: str, published: float, ours: Parameters) -> str | None:
    if (recipe, published) in PARAMETERS:
        return PARAMETERS[recipe, published]
    for number, reason in ((ours.trained, None), (ours.total, "frozen"), (ours.stored, "stored")):
        if _rounds(number / 1e6, published):
            return reason
    return "unknown"


def _gflops_reason(recipe: str, published: float, counted: int, convention: Convention) -> str | None:
    if (recipe, published) in GFLOPS:
        return GFLOPS[recipe, published]
    value = counted / 1e9
    if convention.kinds == EVERY_KIND and _rounds(value, published):
        return None
    larger = value < published + 0.5 and published < MOST_BY_ELEMENTS * value
    return convention.reason if convention.reason and larger else "unknown"


def _rounds(value: float, printed: float) -> bool:
    """Whether a number rounds to what is printed, with as many digits."""
    return round(value, 1 if isinstance(printed, float) else None) == printed
