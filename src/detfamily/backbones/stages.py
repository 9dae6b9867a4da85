"""What Swin and DAT have in common: patches, stages of blocks of one width, a norm for each map that is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from detfamily.attention.maps import on_map
from detfamily.backbones.resnet import check_stages

PATCH = 4
"""Side of the patches that become tokens, in pixels; with another one the stages would have other strides."""


class StagedBackbone(nn.Module):
    """C2, C3, ... from stages behind each other, in maps of any size; subclasses make the stages.

    Args:
        patches: (B, 3, H, W) -> (B, h, w, C), the tokens of the first stage.
        stages: C2, C3, ..., up to the last that is given.
        channels: of the maps that are given.
        frozen_stages: stages without gradient and drop path from the patches (C1) on: 2 freezes patches and C2.
        gradient_checkpointing: in training, compute blocks once more in the backward pass instead of keeping what it
            needs of them.
    """

    def __init__(
        self,
        patches: nn.Module,
        stages: Sequence[Stage],
        channels: Sequence[int],
        frozen_stages: int,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.patches = patches
        self.stages = nn.ModuleList(stages)
        self.channels = list(channels)
        self.strides = _strides(stages)
        self.frozen_stages = frozen_stages
        self.gradient_checkpointing = gradient_checkpointing
        for module in self._frozen():
            module.requires_grad_(False)

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

    def train(self, mode: bool = True) -> Self:
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


def _strides(stages: Sequence[Stage]) -> list[int]:
    """Pixels between neighbouring tokens of the maps that are given."""
    strides, stride = [], PATCH
    for stage in stages:
        if stage.norm is not None:
            strides.append(stride)
        if stage.merge is not None:
            stride *= 2
    return strides


class Stage(nn.Module):
    """Blocks of one width; behind them, where needed, the norm of the map that is given, and what leads to the next."""

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module | None, merge: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.merge = merge


class Block(nn.Module):
    """Attention and FFN, each a branch behind a norm.

    Args:
        embed_dim: width C.
        attention: any that an encoder may have.
        ffn: (B, h, w, C) -> (B, h, w, C).
        drop_path: probability of leaving out a branch, for an image in training.
        local: (B, h, w, C) -> (B, h, w, C), ahead of the attention; None for nothing.
        scale: factory of what multiplies each branch; None leaves them as they are.
    """

    def __init__(
        self,
        embed_dim: int,
        attention: nn.Module,
        ffn: nn.Module,
        drop_path: float,
        local: nn.Module | None = None,
        scale: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.local = local
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = attention
        self.attention_scale = scale(embed_dim) if scale is not None else nn.Identity()
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.ffn = ffn
        self.ffn_scale = scale(embed_dim) if scale is not None else nn.Identity()
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        if self.local is not None:
            x = self.local(x)
        x = x + self.drop_path(self.attention_scale(on_map(self.attention, self.attention_norm(x))))
        output: Tensor = x + self.drop_path(self.ffn_scale(self.ffn(self.ffn_norm(x))))
        return output


def make_stages(
    widths: Sequence[int],
    depths: Sequence[int],
    stages: Sequence[int],
    block: Callable[[int, int], nn.Module],
    merge: Callable[[int], nn.Module],
) -> list[Stage]:
    """The stages up to the last that is given.

    Args:
        widths: of C2, C3, ...
        depths: blocks of C2, C3, ...
        stages: which of them are given, and so have a norm.
        block: called with the index of a stage, and the number of a block in it.
        merge: (B, h, w, C) -> (B, h / 2, w / 2, 2C), called with C; left out between stages of one width.
    """
    made = []
    for index, (stage, depth) in enumerate(zip(range(2, stages[-1] + 1), depths, strict=False)):
        blocks = [block(index, number) for number in range(depth)]
        norm = nn.LayerNorm(widths[index]) if stage in stages else None
        ends = stage == stages[-1] or widths[index + 1] == widths[index]
        made.append(Stage(blocks, norm, None if ends else merge(widths[index])))
    return made


def drop_path_rates(drop_path: float, depths: Sequence[int]) -> list[list[float]]:
    """The probability of each block of each stage, evenly from 0 to that of the last (arXiv 1603.09382)."""
    return [part.tolist() for part in torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))]


def check_settings(
    depths: Sequence[int], num_heads: Sequence[int], stages: Sequence[int], frozen_stages: int, drop_path: float
) -> None:
    """Raise ValueError unless the settings that all such backbones have fit together."""
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
