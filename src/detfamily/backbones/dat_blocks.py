"""What the blocks of DAT and DAT++ have besides attention (arXiv 2201.00520; DAT++: arXiv 2309.01430).

All work on maps (B, h, w, C). They start with PyTorch's own weights, as officially.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detfamily.attention.maps import conv_on_map
from detfamily.blocks.layers import Dropout


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (CaiT, arXiv 2103.17239, section 2).

    Args:
        embed_dim: the width C.
        value: what all factors start with.
    """

    def __init__(self, embed_dim: int, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((embed_dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        return x * self.scale


class LocalPerception(nn.Module):
    """x + a depth-wise 3 x 3 convolution of x, the first thing in a block (CMT, arXiv 2107.06263, equation 1)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.depthwise = depthwise(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        return x + conv_on_map(self.depthwise, x)


class _DepthwiseFeedForward(nn.Module):
    """The parts of an FFN with a depth-wise convolution; subclasses say in which order they come."""

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, hidden_dim)
        self.depthwise = depthwise(hidden_dim)
        self.activation = nn.GELU()
        self.linear2 = nn.Linear(hidden_dim, embed_dim)
        self.dropout = Dropout(dropout)


class ConvFeedForward(_DepthwiseFeedForward):
    """An FFN whose tokens see their neighbours: linear, x + depth-wise convolution, GELU, linear (DAT++).

    There is no activation before the convolution.

    Args:
        embed_dim: width C in and out.
        hidden_dim: width between.
        dropout: before the convolution, and of what comes out.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        x = self.dropout(self.linear1(x))
        x = self.activation(x + conv_on_map(self.depthwise, x))
        output: Tensor = self.dropout(self.linear2(x))
        return output


class MixFeedForward(_DepthwiseFeedForward):
    """An FFN whose tokens see their neighbours: linear, depth-wise convolution, GELU, linear (SegFormer, arXiv
    2105.15203, equation 3); DAT's official code of 2022 has it.

    Args:
        embed_dim: width C in and out.
        hidden_dim: width between.
        dropout: after the activation, and of what comes out.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        x = self.dropout(self.activation(conv_on_map(self.depthwise, self.linear1(x))))
        output: Tensor = self.dropout(self.linear2(x))
        return output


class NormedConvFeedForward(nn.Module):
    """The FFN of CMT (arXiv 2107.06263, section 3.4), with BatchNorm; DAT's official code for detection has it.

    Linear, GELU, norm; x + depth-wise convolution, GELU, norm; linear, norm.

    Args:
        embed_dim: width C in and out.
        hidden_dim: width between.
        dropout: before the convolution, and of what comes out.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, hidden_dim)
        self.norm1 = nn.BatchNorm2d(hidden_dim)
        self.depthwise = depthwise(hidden_dim)
        self.norm2 = nn.BatchNorm2d(hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embed_dim)
        self.norm3 = nn.BatchNorm2d(embed_dim)
        self.activation = nn.GELU()
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        x = self.activation(self.linear1(x)).permute(0, 3, 1, 2)
        x = self.dropout(self.norm1(x))
        x = self.norm2(self.activation(x + self.depthwise(x)))
        x = self.linear2(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        output: Tensor = self.dropout(self.norm3(x)).permute(0, 2, 3, 1)
        return output


def depthwise(channels: int, kernel_size: int = 3) -> nn.Conv2d:
    """A convolution of each channel by itself, of odd kernel, that keeps the size; to be called by ``conv_on_map``."""
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
