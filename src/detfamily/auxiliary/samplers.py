"""Which of the many anchors or regions of an image take part in a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detfamily.auxiliary.structures import BACKGROUND
from detfamily.blocks.denoising import Draws


@dataclass(frozen=True)
class Sample:
    """What was sampled, in S slots: the positive ones first, each kind in its order, then unused slots.

    Attributes:
        index: (..., S) int64, 0 in unused slots.
        assigned: (..., S) int64, the objects' indices; negative for none.
        valid: (..., S) bool, False in unused slots.
    """

    index: Tensor
    assigned: Tensor
    valid: Tensor

    @property
    def positive(self) -> Tensor:
        """(..., S) bool, those with an object."""
        return self.assigned >= 0

    @classmethod
    def stack(cls, samples: list[Sample]) -> Sample:
        """Those of single images as those of a batch."""
        return cls(*(torch.stack([getattr(one, name) for one in samples]) for name in ("index", "assigned", "valid")))


class RandomSampler:
    """A number of boxes drawn at random, of which at most a share is positive (Faster R-CNN, arXiv 1506.01497, 3.1.3).

    What positive ones leave free, negative ones fill. Nothing here asks the device for a number.

    Args:
        count: the slots S.
        positive_share: of the slots that positive boxes may take.

    Raises:
        ValueError: there are no slots; the share is not in (0, 1).
    """

    def __init__(self, count: int, positive_share: float) -> None:
        if count < 1:
            raise ValueError(f"sampler.count={count}: expected 1 or more boxes of an image")
        if not 0 < positive_share < 1:
            raise ValueError(f"sampler.positive_share={positive_share}: expected a share between 0 and 1")
        self.count = count
        self.positive_share = positive_share

    def __call__(self, assigned: Tensor, draws: Draws) -> Sample:
        """Sample among the boxes of one image.

        Args:
            assigned: (N,) int64 the objects' indices, ``BACKGROUND`` or ``IGNORED``.
            draws: where the random numbers come from.
        """
        total = len(assigned)
        most = int(self.count * self.positive_share)
        positive = chosen(assigned >= 0, most, draws)
        negative = chosen(assigned == BACKGROUND, self.count, draws, self.count - positive.sum())
        place = torch.arange(total, device=assigned.device)
        place = torch.where(positive, place, torch.where(negative, total + place, 2 * total))
        place = place.topk(min(self.count, total), largest=False).values
        place = F.pad(place, (0, self.count - len(place)), value=2 * total)
        valid = place < 2 * total
        index = torch.where(valid, place % max(1, total), 0)
        found = F.pad(assigned, (0, int(not total)), value=BACKGROUND)[index]
        return Sample(index, torch.where(place < total, found, BACKGROUND), valid)


def chosen(candidates: Tensor, most: int, draws: Draws, limit: Tensor | None = None) -> Tensor:
    """Some of the candidates, all where they are few.

    Args:
        candidates: (N,) bool.
        most: how many, at most.
        draws: where the random numbers come from; the smallest ones win.
        limit: the same as ``most`` where only the device knows it; the lower of the two holds.

    Returns:
        (N,) bool.
    """
    draw = draws.uniform(candidates).masked_fill(~candidates, 2.0)
    winners = draw.topk(min(most, len(draw)), largest=False).indices
    won = candidates[winners]
    if limit is not None:
        won = won & (torch.arange(len(winners), device=winners.device) < limit)
    return torch.zeros_like(candidates).scatter(0, winners, won)
