"""From uint8 pixels to what a backbone expects, on the device of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 in 0..255 to float: divided by 255, minus mean, divided by std, per channel."""
    scale = 1 / (255 * std)
    return pixels.to(std.dtype) * scale[:, None, None] - (mean / std)[:, None, None]


class Normalize(nn.Module):
    """Normalises a padded batch and sets its padding to zero; float pixels are taken as normalised already.

    Args:
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        # constants of the configuration, not learned: they stay out of the state dict
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, pixels: Tensor, padding_mask: Tensor | None) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W) float; padding_mask (B, H, W), None where nothing is padded."""
        if pixels.dtype != torch.uint8:
            return pixels
        pixels = normalize(pixels, self.mean, self.std)
        return pixels if padding_mask is None else pixels.masked_fill(padding_mask[:, None], 0.0)
