"""Rules: how the predictions of one group of queries are told what to answer for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from detfamily.structures import Predictions, Targets


class Hungarian:
    """One query per object, by the cheapest assignment.

    Args:
        class_agnostic: every object counts as the first class: proposals only say "object" (Deformable DETR, A.4).
        weight: of this group's losses in the total.
        left_out: losses that this group goes without.
    """

    def __init__(self, class_agnostic: bool = False, weight: float = 1.0, left_out: Sequence[str] = ()) -> None:
        self.class_agnostic = class_agnostic
        self.weight = weight
        self.left_out = tuple(left_out)

    def targets(self, targets: Targets, predictions: Predictions) -> Targets:
        """What this group is trained on."""
        if self.class_agnostic:
            return replace(targets, labels=torch.zeros_like(targets.labels))
        return targets


class Known:
    """Every query knows its object beforehand: noised copies (DN-DETR, section 4.4).

    Args:
        weight: of this group's losses in the total.
        left_out: losses that this group goes without.
    """

    def __init__(self, weight: float = 1.0, left_out: Sequence[str] = ()) -> None:
        self.weight = weight
        self.left_out = tuple(left_out)

    def targets(self, targets: Targets, predictions: Predictions) -> Targets:
        """What this group is trained on: one target for each query."""
        assert predictions.given is not None
        return predictions.given.targets


Rule = Hungarian | Known
