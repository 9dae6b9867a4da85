"""Rules: how the predictions of one group of queries are told what to answer for, and what their losses count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from detfamily.criterion.losses import Normalizer
from detfamily.structures import Predictions, Targets


class Hungarian:
    """By the cheapest assignment, one query per object, or several.

    Args:
        class_agnostic: every object counts as the first class: proposals only say "object" (Deformable DETR, A.4).
        weight: of this group's losses in the total.
        left_out: losses that this group goes without.
        repeats: queries that answer for each object (one-to-many matching, H-DETR, arXiv 2207.13080, 3.2).

    Raises:
        ValueError: repeats is less than 1.
    """

    def __init__(
        self, class_agnostic: bool = False, weight: float = 1.0, left_out: Sequence[str] = (), repeats: int = 1
    ) -> None:
        if repeats < 1:
            raise ValueError(f"one_to_many.repeats={repeats}: expected 1 or more; one_to_many=none turns them off")
        self.class_agnostic = class_agnostic
        self.weight = weight
        self.left_out = tuple(left_out)
        self.repeats = repeats

    def targets(self, targets: Targets, predictions: Predictions) -> Targets:
        """What this group is trained on."""
        if self.class_agnostic:
            targets = replace(targets, labels=torch.zeros_like(targets.labels))
        return targets if self.repeats == 1 else _repeated(targets, self.repeats)

    def normalizer(self, normalizer: Normalizer, predictions: Predictions) -> Normalizer:
        """What this group's losses are divided by."""
        return normalizer if self.repeats == 1 else replace(normalizer, counts=normalizer.counts * self.repeats)


class Known:
    """Every query knows its object beforehand: noised copies (DN-DETR, section 4.4).

    Args:
        weight: of this group's losses in the total.
        left_out: losses that this group goes without.
        own_weight: of losses that come with the predictions.
    """

    def __init__(self, weight: float = 1.0, left_out: Sequence[str] = (), own_weight: float = 1.0) -> None:
        self.weight = weight
        self.left_out = tuple(left_out)
        self.own_weight = own_weight

    def targets(self, targets: Targets, predictions: Predictions) -> Targets:
        """What this group is trained on: one target for each query."""
        assert predictions.given is not None
        return predictions.given.targets

    def normalizer(self, normalizer: Normalizer, predictions: Predictions) -> Normalizer:
        """What this group's losses are divided by: objects are counted as often as they are answered for."""
        given = predictions.given
        assert given is not None
        if given.answered is not None:
            return replace(normalizer, answered=given.answered)
        counts = normalizer.counts if given.limit is None else normalizer.counts.clamp(max=given.limit)
        return replace(normalizer, counts=counts, copies=given.copies)


class Collaborative(Known):
    """Positives of an auxiliary head as queries, and the losses of that head itself (Co-DETR, arXiv 2211.12860, eq. 5).

    Args:
        lambda_1: weight of the queries' losses.
        lambda_2: weight of the head's own losses, for each decoder layer.
        num_layers: decoder layers.

    Raises:
        ValueError: a weight is negative.
    """

    def __init__(self, lambda_1: float = 1.0, lambda_2: float = 2.0, num_layers: int = 6) -> None:
        for name, value in (("lambda_1", lambda_1), ("lambda_2", lambda_2)):
            if value < 0:
                raise ValueError(f"criterion.groups.auxiliary.{name}={value}: expected 0 or more")
        super().__init__(weight=lambda_1, own_weight=lambda_2 * num_layers)


Rule = Hungarian | Known


def _repeated(targets: Targets, repeats: int) -> Targets:
    """All objects of an image so many times in a row, without gaps between them."""
    counts = torch.tensor(targets.counts).clamp(min=1)[:, None]
    index = torch.arange(targets.labels.shape[1] * repeats)[None] % counts
    index = index.to(targets.labels.device, non_blocking=True)
    return replace(
        targets,
        labels=targets.labels.gather(1, index),
        boxes=targets.boxes.gather(1, index[..., None].expand(-1, -1, 4)),
        counts=tuple(count * repeats for count in targets.counts),
    )
