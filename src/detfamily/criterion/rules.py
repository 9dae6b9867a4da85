"""Rules: how the predictions of one group of queries are told what to answer for."""

from __future__ import annotations

from dataclasses import replace

import torch

from detfamily.structures import Targets


class Hungarian:
    """One query per object, by the cheapest assignment.

    Args:
        class_agnostic: every object counts as the first class: proposals only say "object" (Deformable DETR, A.4).
        weight: of this group's losses in the total.
    """

    def __init__(self, class_agnostic: bool = False, weight: float = 1.0) -> None:
        self.class_agnostic = class_agnostic
        self.weight = weight

    def targets(self, targets: Targets) -> Targets:
        """What this group is trained on."""
        if self.class_agnostic:
            return replace(targets, labels=torch.zeros_like(targets.labels))
        return targets
