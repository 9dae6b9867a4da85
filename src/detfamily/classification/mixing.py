"""Mixed images with mixed classes, in training: mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shares:
    """What the images of a batch were mixed of.

    Attributes:
        labels: (2, B) int64, the class of each image, and the class of what was mixed into it.
        weights: how much of an image is still its own, and the rest; they sum to 1.
    """

    labels: Tensor
    weights: tuple[float, float]


class Mixing(nn.Module):
    """Mixes each image of a batch with one other, all by the same share, as the training of Swin and DAT does.

    The other of image i is image B - 1 - i. Mixup blends the two; CutMix pastes a box of the other, which counts as far
    as it lies within the image. Numbers are drawn on the host, from torch's global generator.

    Args:
        mixup: alpha of the Beta(alpha, alpha) that a share is drawn from; 0 never blends.
        cutmix: the same, for boxes; 0 never pastes.
        probability: how often a batch is mixed at all.
        switch: how often it is CutMix, where both may be.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, mixup: float = 0.8, cutmix: float = 1.0, probability: float = 1.0, switch: float = 0.5) -> None:
        super().__init__()
        if mixup < 0 or cutmix < 0 or not mixup + cutmix > 0:
            raise ValueError(
                f"mixup={mixup}, cutmix={cutmix}: expected 0 or more, one of them above 0 (null: no mixing)"
            )
        for name, value in (("probability", probability), ("switch", switch)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: expected 0 to 1")
        self.mixup = mixup
        self.cutmix = cutmix
        self.probability = probability
        self.switch = switch

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Shares | None]:
        """Mix a batch.

        Args:
            pixels: (B, 3, H, W) float; not changed.
            labels: (B,) int64.

        Returns:
            The mixed pixels, and what they are made of; None where chance has left this batch alone.
        """
        if _uniform() >= self.probability:
            return pixels, None
        cuts = self.cutmix > 0 and (self.mixup == 0 or _uniform() < self.switch)
        alpha = torch.tensor(self.cutmix if cuts else self.mixup, device="cpu")
        own = float(torch.distributions.Beta(alpha, alpha).sample())
        mixed, own = paste(pixels, own) if cuts else (blend(pixels, own), own)
        return mixed, Shares(torch.stack([labels, labels.flip(0)]), (own, 1 - own))


def blend(pixels: Tensor, own: float) -> Tensor:
    """Each image times its own share, and its partner times the rest."""
    return own * pixels + (1 - own) * pixels.flip(0)


def paste(pixels: Tensor, own: float) -> tuple[Tensor, float]:
    """Paste a box of each image's partner at a random place.

    Args:
        pixels: (B, 3, H, W).
        own: the share that would be left if the box lay within the image.

    Returns:
        The images, and the share that is left.
    """
    height, width = pixels.shape[-2:]
    side = (1 - own) ** 0.5
    rows, columns = (_span(length, int(side * length)) for length in (height, width))
    mixed = pixels.clone()
    mixed[..., rows, columns] = pixels.flip(0)[..., rows, columns]
    hidden = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - hidden / (height * width)


def _span(length: int, extent: int) -> slice:
    """An interval of this extent around a random place, as far as it lies within the length."""
    centre = int(torch.randint(length, (), device="cpu"))
    first = centre - extent // 2
    return slice(max(first, 0), min(centre + extent // 2, length))


def _uniform() -> float:
    return float(torch.rand((), device="cpu"))
