"""What every auxiliary head is to a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from detfamily.auxiliary.structures import Auxiliary, Objects
from detfamily.blocks.denoising import Draws
from detfamily.structures import Detections, Images


class AuxiliaryHead(nn.Module):
    """A detector's head that reads the encoder's maps in training (Co-DETR, arXiv 2211.12860, 3.2).

    Heads take the keyword ``strides``, too: pixels between neighbouring cells of each map that they will be given. A
    config is a factory that lacks them.

    Args:
        weights: of the losses, by name; a detector multiplies them all by one factor more.

    Attributes:
        name: what the head is called among the losses and in messages.
        losses: the names of its losses.

    Raises:
        ValueError: there is not a weight of 0 or more for every loss, or one for another loss.
    """

    name: ClassVar[str]
    losses: ClassVar[tuple[str, ...]]

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        if set(weights) != set(self.losses) or min(weights.values()) < 0:
            raise ValueError(
                f"{self.name}.weights={dict(weights)}: expected a number, 0 or more, for each of "
                f"{', '.join(self.losses)}, and no others"
            )
        self.weights = {name: float(weights[name]) for name in self.losses}

    def forward(self, maps: Sequence[Tensor], images: Images, objects: Objects, draws: Draws) -> Auxiliary:
        """Losses, and all that the head told apart.

        Args:
            maps: (B, C, h, w) of each level, finest first.
            images: the batch.
            objects: of the batch.
            draws: where the random numbers of sampling come from; most heads need none.

        Raises:
            ValueError: there is not a map for every level.
        """
        raise NotImplementedError

    def detect(self, maps: Sequence[Tensor], images: Images) -> list[Detections]:
        """What the head finds on its own, without the decoder (Co-DETR, table 11).

        Args:
            maps: (B, C, h, w) of each level, finest first.
            images: the batch.

        Returns:
            The detections of each image, best first.

        Raises:
            ValueError: there is not a map for every level.
        """
        raise NotImplementedError
