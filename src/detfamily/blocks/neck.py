"""Necks: from a backbone's maps to the levels that a transformer reads, all of one width.

A neck is built as ``neck(in_channels=[...])`` and called with the backbone's maps, finest first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork


class ChannelMapper(nn.Module):
    """A 1x1 convolution per map; levels beyond the backbone's come from 3x3 convolutions with stride 2.

    The first extra level reads the raw last map of the backbone, the next ones the level before them
    (Deformable DETR, A.3). DETR is the case of one level without a norm.

    Args:
        in_channels: channels of the backbone's maps.
        embed_dim: the width C.
        num_levels: levels to give, at least as many as maps.
        num_groups: groups of the GroupNorm after each convolution; None for no norm.
        bias: of the convolutions; mmdet has none in front of a norm.

    Raises:
        ValueError: fewer levels than maps; num_groups does not divide embed_dim.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        embed_dim: int,
        num_levels: int,
        num_groups: int | None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check_levels(in_channels, num_levels)
        if num_groups is not None and embed_dim % num_groups:
            raise ValueError(f"neck.num_groups={num_groups} does not divide embed_dim={embed_dim}")
        extra = num_levels - len(in_channels)
        convs = [nn.Conv2d(channels, embed_dim, 1, bias=bias) for channels in in_channels]
        sources = [in_channels[-1], *[embed_dim] * (extra - 1)][:extra]
        convs += [nn.Conv2d(channels, embed_dim, 3, stride=2, padding=1, bias=bias) for channels in sources]
        self.num_maps = len(in_channels)
        self.levels = nn.ModuleList(
            nn.Sequential(conv, nn.GroupNorm(num_groups, embed_dim) if num_groups is not None else nn.Identity())
            for conv in convs
        )
        if num_groups is not None:
            for conv in convs:
                _xavier(conv)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[(B, c, h, w)] -> [(B, C, h, w)]"""
        levels = [level(one) for level, one in zip(self.levels[: self.num_maps], maps, strict=True)]
        source = maps[-1]
        for level in self.levels[self.num_maps :]:
            source = level(source)
            levels.append(source)
        return levels


class FPN(nn.Module):
    """Feature pyramid network (arXiv 1612.03144): coarse maps are added to finer ones, top down.

    Args:
        in_channels: channels of the backbone's maps.
        embed_dim: the width C.
        num_levels: levels to give; those beyond the backbone's come from stride-2 convolutions on the coarsest one.
    """

    def __init__(self, in_channels: Sequence[int], embed_dim: int, num_levels: int) -> None:
        super().__init__()
        _check_levels(in_channels, num_levels)
        self.fpn = FeaturePyramidNetwork(list(in_channels), embed_dim)
        self.extra = _extra_levels(embed_dim, num_levels - len(in_channels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[(B, c, h, w)] -> [(B, C, h, w)]"""
        levels = list(self.fpn(OrderedDict((str(i), one) for i, one in enumerate(maps))).values())
        for conv in self.extra:
            levels.append(conv(levels[-1]))
        return levels


class BiFPN(nn.Module):
    """Weighted bi-directional pyramid (EfficientDet, arXiv 1911.09070, section 3).

    Args:
        in_channels: channels of the backbone's maps.
        embed_dim: the width C.
        num_levels: levels to give; those beyond the backbone's come from stride-2 convolutions on the coarsest one.
        num_rounds: times that information goes down and up again.
    """

    def __init__(self, in_channels: Sequence[int], embed_dim: int, num_levels: int, num_rounds: int = 3) -> None:
        super().__init__()
        _check_levels(in_channels, num_levels)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, embed_dim, 1) for channels in in_channels)
        for conv in self.lateral:
            _xavier(conv)
        self.extra = _extra_levels(embed_dim, num_levels - len(in_channels))
        self.rounds = nn.ModuleList(_BiFPNRound(embed_dim, num_levels) for _ in range(num_rounds))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[(B, c, h, w)] -> [(B, C, h, w)]"""
        levels = [conv(one) for conv, one in zip(self.lateral, maps, strict=True)]
        for conv in self.extra:
            levels.append(conv(levels[-1]))
        for one_round in self.rounds:
            levels = one_round(levels)
        return levels


class _BiFPNRound(nn.Module):
    """One way down (coarse to fine) and one way up, each sum followed by a separable convolution."""

    def __init__(self, embed_dim: int, num_levels: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(_WeightedSum(embed_dim, 2) for _ in range(num_levels - 1))
        # the coarsest level has no way-down result of its own, so two inputs; the others have three
        self.up = nn.ModuleList(_WeightedSum(embed_dim, 3 if i < num_levels - 2 else 2) for i in range(num_levels - 1))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        last = len(levels) - 1
        way_down = [levels[last]]
        for i in range(last - 1, -1, -1):
            coarser = F.interpolate(way_down[0], size=levels[i].shape[-2:])
            way_down.insert(0, self.down[i]([levels[i], coarser]))
        outputs = [way_down[0]]
        for i in range(1, last + 1):
            finer = F.adaptive_max_pool2d(outputs[-1], levels[i].shape[-2:])
            inputs = [levels[i], finer] if i == last else [levels[i], way_down[i], finer]
            outputs.append(self.up[i - 1](inputs))
        return outputs


class _WeightedSum(nn.Module):
    """Fast normalised fusion (eq. 5 there), swish, and a depthwise separable convolution with its norm."""

    def __init__(self, embed_dim: int, num_inputs: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_inputs))
        self.depthwise = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim, bias=False)
        self.pointwise = nn.Conv2d(embed_dim, embed_dim, 1)
        self.norm = nn.GroupNorm(32 if embed_dim % 32 == 0 else 1, embed_dim)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        weights = self.weights.relu()
        weights = weights / (weights.sum() + 1e-4)
        mixed = torch.stack([weight * one for weight, one in zip(weights, inputs, strict=True)]).sum(0)
        output: Tensor = self.norm(self.pointwise(self.depthwise(F.silu(mixed))))
        return output


def _extra_levels(embed_dim: int, count: int) -> nn.ModuleList:
    convs = [nn.Conv2d(embed_dim, embed_dim, 3, stride=2, padding=1) for _ in range(count)]
    for conv in convs:
        _xavier(conv)
    return nn.ModuleList(convs)


def _xavier(conv: nn.Module) -> None:
    assert isinstance(conv, nn.Conv2d)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _check_levels(in_channels: Sequence[int], num_levels: int) -> None:
    if num_levels < len(in_channels):
        raise ValueError(
            f"model.num_levels={num_levels} is less than the {len(in_channels)} maps of the backbone: "
            "raise it, or take fewer maps with model.stages=[...]"
        )
