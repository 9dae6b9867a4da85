"""One-stage heads that say beside the class how near a cell is to the centre of its object (FCOS, arXiv 1904.01355)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.dense import DenseHead, DensePredictions, counted, pairs_of
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.divisors import mean_over_processes
from detfamily.auxiliary.initialise import start_small
from detfamily.auxiliary.losses import binary, focal, giou
from detfamily.auxiliary.quality import centerness_of
from detfamily.auxiliary.structures import Objects


class CenternessHead(DenseHead):
    """Focal loss of the classes, GIoU of the boxes weighted by centerness, and centerness itself.

    Args:
        strides: as ``DenseHead``, and so the others.
        alpha: of the focal loss: weight of the positive columns, against 1 - alpha of the negative ones.
        gamma: of the focal loss: focusing power.

    Raises:
        ValueError: as ``DenseHead``.
    """

    losses: ClassVar[tuple[str, ...]] = ("class", "giou", "centerness")
    least_weight: ClassVar[float]
    """What the sum of centerness counts as, at least, where boxes are divided by it."""

    def __init__(
        self,
        strides: Sequence[int],
        embed_dim: int,
        num_classes: int,
        depth: int,
        num_groups: int,
        anchors: Callable[..., Anchors],
        weights: Mapping[str, float],
        selection: BestBoxes,
        alpha: float,
        gamma: float,
    ) -> None:
        super().__init__(strides, embed_dim, num_classes, depth, num_groups, anchors, weights, selection)
        self.alpha = alpha
        self.gamma = gamma
        self.centerness_head = nn.Conv2d(embed_dim, 1, 3, padding=1)
        start_small(self.centerness_head)

    def positives(self, assigned: Tensor, like: Tensor) -> Tensor:
        """() what the losses of this process' anchors (B, N) are divided by."""
        raise NotImplementedError

    def predict(self, maps: Sequence[Tensor]) -> DensePredictions:
        """What the head says of the anchors of all levels."""
        return self.predict_levels(maps, self.centerness_head)

    def losses_of(
        self, predictions: DensePredictions, anchors: Tensor, assigned: Tensor, objects: Objects
    ) -> dict[str, Tensor]:
        """Losses "class", "giou" and "centerness", the latter two of positive anchors."""
        assert predictions.quality is not None
        pairs = pairs_of(assigned, anchors, objects)
        wanted = centerness_of(pairs.anchors, pairs.boxes_xyxy)
        apart = giou(self.decode(pairs.anchors, predictions.steps[pairs.place]), pairs.boxes_xyxy)
        unsure = binary(predictions.quality[pairs.place], wanted).sum()
        wrong = focal(predictions.logits, assigned >= 0, objects.at(assigned)[1], self.alpha, self.gamma)
        divisor = mean_over_processes(self.positives(assigned, predictions.logits)).clamp(min=1)
        return {
            "class": counted(wrong, assigned) / divisor,
            "giou": (apart * wanted).sum() / mean_over_processes(wanted.sum()).clamp(min=self.least_weight),
            "centerness": unsure / divisor,
        }
