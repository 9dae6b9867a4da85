"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the ops.

It counts two operations for each multiply-add, and nothing for what is done element by element: here the softmax of the
logits, and the arithmetic of places and corner weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from detfamily.ops.registration import ops

MULTIPLY_ADDS = 5
"""For each sampled place and channel: the four corners, then the attention weight (arXiv 2010.04159, A.1)."""


def watched() -> bool:
    """Whether a mode looks at the ops of this thread, as ``FlopCounterMode`` does.

    The op is then called as one, and its device's kernel computes it, where plain PyTorch would else run in pieces that
    have no formula.
    """
    return not torch.compiler.is_compiling() and is_in_torch_dispatch_mode(include_infra_modes=False)


def forward_flops(value: Sequence[int], places: Sequence[int]) -> int:
    """Operations of a forward pass.

    Args:
        value: shape (B, S, M, D).
        places: shape (B, Q, M, L, P, 2), of sampling locations or offsets.
    """
    return 2 * MULTIPLY_ADDS * math.prod(places[:-1]) * value[-1]


def backward_flops(value: Sequence[int], places: Sequence[int]) -> int:
    """Operations of a backward pass: as many for the values as forward, and as many for places and weights."""
    return 2 * forward_flops(value, places)


@register_flop_formula(ops.ms_deform_attn)
def _plain(value: Sequence[int], shapes: Any, locations: Sequence[int], weights: Any, out_shape: Any = None) -> int:
    return forward_flops(value, locations)


@register_flop_formula(ops.ms_deform_attn_projected)
def _projected(
    value: Sequence[int], shapes: Any, references: Any, offsets: Sequence[int], logits: Any, out_shape: Any = None
) -> int:
    return forward_flops(value, offsets)


@register_flop_formula(ops.ms_deform_attn_backward)
def _plain_backward(
    grad: Any, value: Sequence[int], shapes: Any, locations: Sequence[int], *others: Any, out_shape: Any = None
) -> int:
    return backward_flops(value, locations)


@register_flop_formula(ops.ms_deform_attn_projected_backward)
def _projected_backward(
    grad: Any,
    value: Sequence[int],
    shapes: Any,
    references: Any,
    offsets: Sequence[int],
    *others: Any,
    out_shape: Any = None,
) -> int:
    return backward_flops(value, offsets)
