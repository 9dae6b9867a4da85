"""Rows of class heads and of embedded labels that go from one set of classes to another, by the classes' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from detfamily.data.labels import LabelMap

LABEL_EMBED = "denoising.label_embed.weight"
"""A row per class, and a last one for "unknown", which queries without content of their own start from (DN-DETR), and
else nobody reads (DINO)."""

_BOXES_BY_CLASS = re.compile(r"auxiliary\.heads\.\w+\.roi\.box_head\.(weight|bias)")
_CLASS_ROWS = re.compile(
    r"(heads\.class_heads\.\d+|query_source\.class_head|auxiliary\.heads\.\w+\.(roi\.)?class_head)\.(weight|bias)|"
    rf"{_BOXES_BY_CLASS.pattern}|{re.escape(LABEL_EMBED)}"
)
_PROPOSALS = "query_source.class_head."


@dataclass(frozen=True)
class ByName:
    """Which classes of a data set a class head knows already.

    Attributes:
        known: names in both.
        new: names that only the data set has.
        dropped: names that only the head has.
    """

    known: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]


def compare(source: LabelMap, target: LabelMap) -> ByName:
    """Which names two label maps share, each in the order of its columns."""
    theirs = [name for name in source.names if name is not None]
    ours = [name for name in target.names if name is not None]
    known, new = ([name for name in ours if (name in theirs) == wanted] for wanted in (True, False))
    return ByName(tuple(known), tuple(new), tuple(name for name in theirs if name not in ours))


def is_class_row(name: str) -> bool:
    """Whether a tensor (our name) has a row per class along its first axis, or several (``by_class``)."""
    return _CLASS_ROWS.fullmatch(name) is not None


def by_class(name: str, tensor: Tensor, num_classes: int) -> Tensor:
    """A tensor with rows of classes as (K [+ 1], ...).

    Of auxiliary heads, regions have four numbers of a box for each class in turn, and anchors all classes for each
    shape in turn: these become further axes.
    """
    rows = len(tensor)
    if rows % num_classes or rows <= num_classes + 1:
        return tensor
    if _BOXES_BY_CLASS.fullmatch(name):
        return tensor.unflatten(0, (num_classes, -1))
    return tensor.unflatten(0, (-1, num_classes)).transpose(0, 1)


def from_class(name: str, rows: Tensor, like: Tensor) -> Tensor:
    """The opposite of ``by_class``, for a tensor with as many axes as ``like``."""
    if rows.ndim == like.ndim:
        return rows
    return (rows if _BOXES_BY_CLASS.fullmatch(name) else rows.transpose(0, 1)).flatten(0, 1)


def is_first_row_special(name: str) -> bool:
    """Whether a tensor's first row may say "an object" instead of the first class: so in the head of proposals."""
    return name.startswith(_PROPOSALS)


def say_object(config: Mapping[str, Any]) -> bool:
    """Whether proposals only say "an object", in the first row of their head, in the model of a resolved config."""
    return bool(config["detector"]["query_source"].get("class_agnostic", True))


def move_rows(
    source: Tensor, source_map: LabelMap, target: Tensor, target_map: LabelMap, first_row_special: bool = False
) -> Tensor:
    """A copy of the target whose rows come from the source where the classes' names agree.

    Rows after the last class ("no object", "unknown") go to their counterparts.

    Args:
        source: (K [+ 1], ...) trained.
        source_map: its classes.
        target: (K' [+ 1], ...) what rows of other classes keep; of the same further axes, and both with or both
            without a last row that is no class.
        target_map: its classes.
        first_row_special: the first row of both means the same, whatever class its column stands for; the other way
            round, the rest of a class that stands in either's first column is not known.
    """
    rows = {name: row for row, name in enumerate(source_map.names) if name is not None}
    pairs = [(rows[name], row) for row, name in enumerate(target_map.names) if name is not None and name in rows]
    if first_row_special:
        pairs = [(0, 0), *((one, other) for one, other in pairs if one and other)]
    extra = source.shape[0] - source_map.num_classes
    pairs += [(source_map.num_classes + i, target_map.num_classes + i) for i in range(extra)]
    moved = target.clone()
    if pairs:
        given, taken = zip(*pairs, strict=True)
        moved[list(taken)] = source[list(given)].to(moved.dtype)
    return moved
