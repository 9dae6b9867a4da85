"""Swin Transformer (arXiv 2103.14030) as detectors use it: maps of any size, with a norm for each that is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.attention.window import WindowAttention
from detfamily.backbones.stages import PATCH, Block, StagedBackbone, check_settings, drop_path_rates, make_stages
from detfamily.backbones.swin_weights import load_weights
from detfamily.blocks.layers import FeedForward


class Swin(StagedBackbone):
    """C2, C3, ... of a Swin Transformer, with the numbers of the one in DINO (arXiv 2203.03605).

    Windows that hang over the map see zeros there, and the shift stays half a window on maps smaller than a window. No
    stage is built beyond the last that is given.

    Args:
        embed_dim: channels of C2; each stage has twice those of the one before.
        depths: blocks of C2, C3, ...
        num_heads: heads of C2, C3, ...
        window_size: side of a window, in tokens.
        stages: which of C2, C3, ... to give, ascending.
        frozen_stages: stages without gradient and drop path from the patches (C1) on: 2 freezes patches and C2.
        drop_path: probability of leaving out a branch of the last block, for an image in training; from the first
            block to the last it grows evenly from 0 (stochastic depth, arXiv 1603.09382).
        mlp_ratio: hidden width of the FFNs, in widths of the stage.
        qkv_bias: whether queries, keys and values have biases.
        patch_norm: whether there is a norm behind the patches.
        dilation: leave out the last merging of patches, "DC5": C5 has the size and the channels of C4. ImageNet weights
            do not fit then.
        gradient_checkpointing: in training, compute blocks once more in the backward pass instead of keeping what it
            needs of them.
        weights: official name of ImageNet weights ("swin_tiny_patch4_window7_224"; downloaded on first use), a path of
            such a file, or None for random weights. Biases for another window are interpolated.

    Raises:
        ValueError: stages out of range, or other settings that contradict each other.
        CheckpointError: weights cannot be downloaded or read, or are of another network.
    """

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        stages: Sequence[int],
        frozen_stages: int = 0,
        drop_path: float = 0.2,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        dilation: bool = False,
        gradient_checkpointing: bool = False,
        weights: str | None = None,
    ) -> None:
        check_settings(depths, num_heads, stages, frozen_stages, drop_path)
        widths = [embed_dim * 2**index for index in range(len(depths))]
        if dilation:
            widths[-1] = widths[-2]
        rates = drop_path_rates(drop_path, depths)

        def block(index: int, number: int) -> Block:
            width, shift = widths[index], window_size // 2 if number % 2 else 0
            return Block(
                width,
                WindowAttention(width, num_heads[index], window_size, shift, qkv_bias),
                FeedForward(width, int(width * mlp_ratio), nn.GELU),
                rates[index][number],
            )

        super().__init__(
            Patches(embed_dim, patch_norm),
            make_stages(widths, depths, stages, block, Merge),
            channels=[widths[stage - 2] for stage in stages],
            frozen_stages=frozen_stages,
            gradient_checkpointing=gradient_checkpointing,
        )
        self._initialize()
        if weights is not None:
            load_weights(self, weights)

    def _initialize(self) -> None:
        """As for training on ImageNet, but for a cut at 100 sigma; official detectors never start without weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class Patches(nn.Module):
    """Patches of 4 x 4 pixels as tokens; the image is filled up with zeros at the right and at the bottom."""

    def __init__(self, embed_dim: int, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, C)"""
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % PATCH, 0, -height % PATCH))
        tokens: Tensor = self.norm(self.proj(pixels).permute(0, 2, 3, 1))
        return tokens


class Merge(nn.Module):
    """Four neighbours become one token of twice the width (section 3.1); odd sizes are filled up with zeros."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * embed_dim)
        self.reduction = nn.Linear(4 * embed_dim, 2 * embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h / 2, w / 2, 2C)"""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # The official order is (row, column) = (0, 0), (1, 0), (0, 1), (1, 1): down first.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        output: Tensor = self.reduction(self.norm(x))
        return output
