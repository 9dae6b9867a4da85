"""A convolution and the batch norm behind it as one convolution, where the norm's statistics stand still."""

from __future__ import annotations

from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)), (B, C, H, W) -> (B, C', H', W').

    A frozen batch norm, or one in evaluation, only scales and shifts: so does a convolution with scaled weights and a
    shift for its bias, without two more passes over the maps and with exact gradients. Scaling the weights anew each
    time costs nothing to speak of next to the maps, and nothing can be out of date.
    """
    if not _stands_still(norm) or conv.bias is not None:
        output: Tensor = norm(conv(x))
        return output
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def _stands_still(norm: nn.Module) -> TypeGuard[FrozenBatchNorm2d]:
    """Whether all that the norm does is known before its input is."""
    if isinstance(norm, nn.BatchNorm2d):
        return not norm.training and norm.track_running_stats and norm.affine
    return isinstance(norm, FrozenBatchNorm2d)
