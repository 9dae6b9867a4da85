"""What a trained attention looks at, read off the attention itself: for pictures, not for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from detfamily.structures import Tokens


def weights_of(mix: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """The weight of each value in the sum of what an attention gives.

    Attention is linear in its values, so a weight is the derivative of the output by a value. No formula of the weights
    is written down a second time.

    Args:
        mix: the attention, from values to the outputs that are asked about.
        values: zeros; only shape, type and device matter.
    """
    with torch.enable_grad():
        values = values.detach().requires_grad_()
        (weights,) = torch.autograd.grad(mix(values).sum(), values)
    return weights


class ZeroValues(nn.Module):
    """Stands in for the projection of values: gives zeros, whose gradient is asked for later.

    Attributes:
        given: what it gave.
    """

    given: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        self.given = torch.zeros_like(x, requires_grad=True)
        return self.given


def token_at(tokens: Tokens, index: int) -> Tokens:
    """One of the tokens, as a query."""
    one = slice(index, index + 1)
    sine = getattr(tokens, "sine", None)
    return replace(
        tokens,
        content=tokens.content[:, one],
        pos=None if tokens.pos is None else tokens.pos[:, one],
        reference_points=None if tokens.reference_points is None else tokens.reference_points[:, one],
        grid=None,
        **({} if sine is None else {"sine": sine[:, one]}),
    )
