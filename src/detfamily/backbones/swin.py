"""Swin Transformer (arXiv 2103.14030) as detectors use it: maps of any size, with a norm for each that is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from detfamily.attention.window import WindowAttention
from detfamily.backbones.resnet import check_stages
from detfamily.backbones.swin_weights import load_weights
from detfamily.blocks.layers import FeedForward

PATCH = 4
"""Side of the patches that become tokens, in pixels; with another one the stages would have other strides."""


class Swin(nn.Module):
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
        super().__init__()
        _check(depths, num_heads, stages, frozen_stages, drop_path)
        self.outputs = tuple(stages)
        self.frozen_stages = frozen_stages
        self.gradient_checkpointing = gradient_checkpointing
        widths = [embed_dim * 2**index for index in range(len(depths))]
        if dilation:
            widths[-1] = widths[-2]
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        self.patches = Patches(embed_dim, patch_norm)
        self.stages = nn.ModuleList(
            Stage(
                [
                    Block(widths[index], num_heads[index], window_size, odd, rate, mlp_ratio, qkv_bias)
                    for odd, rate in zip(_alternating(depth), rates[index].tolist(), strict=True)
                ],
                norm=nn.LayerNorm(widths[index]) if stage in stages else None,
                merge=Merge(widths[index]) if stage < stages[-1] and widths[index + 1] > widths[index] else None,
            )
            for index, (stage, depth) in enumerate(zip(range(2, stages[-1] + 1), depths, strict=False))
        )
        self.channels = [widths[stage - 2] for stage in stages]
        self._initialize()
        if weights is not None:
            load_weights(self, weights)
        for module in self._frozen():
            module.requires_grad_(False)

    def _initialize(self) -> None:
        """As for training on ImageNet, but for a cut at 100 sigma; official detectors never start without weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _frozen(self) -> Iterator[nn.Module]:
        """Norms of outputs are not in any checkpoint of ImageNet, so they are trained in any case."""
        if self.frozen_stages >= 1:
            yield self.patches
        for stage in self._stages()[: max(self.frozen_stages - 1, 0)]:
            yield stage.blocks
            if stage.merge is not None:
                yield stage.merge

    def _stages(self) -> list[Stage]:
        return [cast("Stage", stage) for stage in self.stages]

    def train(self, mode: bool = True) -> Swin:
        """What is frozen stays as in evaluation: no image loses a branch there."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> [(B, c, h, w)]"""
        x = self.patches(pixels)
        maps = []
        for stage in self._stages():
            for block in stage.blocks:
                if self.gradient_checkpointing and block.training and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            if stage.norm is not None:
                maps.append(stage.norm(x).permute(0, 3, 1, 2))
            if stage.merge is not None:
                x = stage.merge(x)
        return maps


class Stage(nn.Module):
    """Blocks of one width; behind them, where needed, the norm of the map that is given, and what leads to the next."""

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module | None, merge: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.merge = merge


class Block(nn.Module):
    """Window attention and FFN, each a branch behind a norm (section 3.1, figure 3b).

    Args:
        embed_dim: width C.
        num_heads: heads of the attention.
        window_size: side of a window, in tokens.
        shifted: whether windows lie half a window further.
        drop_path: probability of leaving out a branch, for an image in training.
        mlp_ratio: hidden width of the FFN, in widths.
        qkv_bias: whether queries, keys and values have biases.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window_size: int,
        shifted: bool,
        drop_path: float,
        mlp_ratio: float,
        qkv_bias: bool,
    ) -> None:
        super().__init__()
        shift = window_size // 2 if shifted else 0
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = WindowAttention(embed_dim, num_heads, window_size, shift, qkv_bias)
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, int(embed_dim * mlp_ratio), nn.GELU)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        x = x + self.drop_path(self.attention.on_map(self.attention_norm(x)))
        output: Tensor = x + self.drop_path(self.ffn(self.ffn_norm(x)))
        return output


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


def _alternating(depth: int) -> list[bool]:
    return [bool(index % 2) for index in range(depth)]


def _check(
    depths: Sequence[int], num_heads: Sequence[int], stages: Sequence[int], frozen_stages: int, drop_path: float
) -> None:
    if len(depths) != len(num_heads) or min(depths, default=0) < 1:
        raise ValueError(
            f"backbone.depths={list(depths)}, backbone.num_heads={list(num_heads)}: expected a number of blocks and of "
            "heads for each stage"
        )
    last = len(depths) + 1
    check_stages(stages, range(2, last + 1))
    if not 0 <= frozen_stages <= last:
        raise ValueError(f"backbone.frozen_stages={frozen_stages}: expected 0 (nothing) to {last} (everything)")
    if not 0 <= drop_path < 1:
        raise ValueError(f"backbone.drop_path={drop_path}: expected a probability of at least 0, less than 1")
