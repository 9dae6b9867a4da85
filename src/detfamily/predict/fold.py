"""Batch norms of a trained backbone folded into its convolutions, for good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
_TOLERANCE = 1e-3
"""Relative to the size of a map. Rounding is a hundred times smaller; a norm in the wrong convolution far larger."""


def fold_batch_norms(backbone: nn.Module) -> tuple[nn.Module, int]:
    """Fold each batch norm into the convolution before it, and make sure that nothing else has changed.

    A norm belongs to a convolution if it stands right behind it among the children of one module. Definitions may lie
    about what is called when, so the folded copy is compared with the original on random pixels.

    Args:
        backbone: pixels (B, 3, H, W) -> maps, in evaluation mode; it is not changed.

    Returns:
        The folded copy and the number of norms that are gone; the backbone itself and 0 where nothing can be folded
        or the copy answers otherwise.
    """
    folded = deepcopy(backbone)
    pairs = list(_pairs(folded))
    for parent, conv_name, norm_name in pairs:
        conv, norm = cast("nn.Conv2d", getattr(parent, conv_name)), getattr(parent, norm_name)
        setattr(parent, conv_name, folded_conv(conv, norm))
        setattr(parent, norm_name, _remainder(norm))
    return (folded, len(pairs)) if pairs and _agree(backbone, folded) else (backbone, 0)


def count_batch_norms(module: nn.Module) -> int:
    """How many batch norms there are."""
    return sum(isinstance(one, _NORMS) for one in module.modules())


@torch.no_grad()
def folded_conv(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """The convolution that gives norm(conv(x)), for a norm whose statistics stand still; computed in float64."""
    mean, variance = cast("Tensor", norm.running_mean).double(), cast("Tensor", norm.running_var).double()
    scale = (variance + cast("float", norm.eps)).rsqrt()
    scale = scale if norm.weight is None else scale * cast("Tensor", norm.weight).double()
    bias = -mean if conv.bias is None else conv.bias.double() - mean
    shift = bias * scale if norm.bias is None else bias * scale + cast("Tensor", norm.bias).double()
    one = deepcopy(conv)
    one.weight = nn.Parameter(
        (conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype), requires_grad=False
    )
    one.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
    return one


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Parent, name of the convolution and name of the norm."""
    uses = Counter(id(one) for _, one in module.named_modules(remove_duplicate=False))
    for parent in module.modules():
        children = [(name, one) for name, one in parent.named_children() if not isinstance(one, nn.Identity)]
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            fits = isinstance(conv, nn.Conv2d) and isinstance(norm, _NORMS) and norm.running_mean is not None
            if not fits or not (uses[id(conv)] == uses[id(norm)] == 1):
                continue
            if cast("nn.Conv2d", conv).out_channels == len(cast("Tensor", norm.running_mean)):
                yield parent, conv_name, norm_name


def _remainder(norm: nn.Module) -> nn.Module:
    """What a norm does besides: timm's norms have an activation inside."""
    parts = [part for name in ("drop", "act") if isinstance(part := getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*parts) if parts else nn.Identity()


@torch.inference_mode()
def _agree(one: nn.Module, other: nn.Module) -> bool:
    like = next(one.parameters())
    pixels = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        pairs = list(zip(one(pixels), other(pixels), strict=True))
    except (AssertionError, RuntimeError, ValueError):  # a backbone for images of one size
        return False
    return all((a - b).norm() <= _TOLERANCE * a.norm() for a, b in pairs)
