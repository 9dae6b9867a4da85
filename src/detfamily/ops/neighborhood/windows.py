"""Where the windows of neighborhood attention lie (NAT, arXiv 2204.07143, section 3.1; dilated, arXiv 2209.15001)."""

from __future__ import annotations

import torch
from torch import Tensor


def axis_windows(length: int, kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """The window of each token along one axis.

    A token sees those of its own residue class (its place modulo the dilation) alone, of which kernel_size make a
    window: the token in its middle, except near the borders, where the window is shifted to stay inside. A class of
    fewer tokens is one window.

    Args:
        length: tokens along the axis.
        kernel_size: tokens of a window.
        dilation: step between them.

    Returns:
        (length,) int64 the first token of each one's window, and (length,) how many tokens, a dilation apart, it has.
    """
    tokens = torch.arange(length)
    residue, place = tokens % dilation, tokens // dilation
    members = (length - residue + dilation - 1) // dilation
    counts = members.clamp(max=kernel_size)
    starts = (place - kernel_size // 2).clamp(min=0).minimum(members - counts)
    return starts * dilation + residue, counts
