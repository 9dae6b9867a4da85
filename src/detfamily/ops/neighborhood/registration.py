"""Neighborhood attention in plain PyTorch as one op: shapes for tracing, gradients, operations counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from detfamily.ops.neighborhood import tiles
from detfamily.ops.neighborhood.windows import axis_windows

_ARGUMENTS = "Tensor qkv, Tensor? position_bias, Tensor? padding_mask, int kernel_size, int dilation"
_library = torch.library.Library("detfamily", "FRAGMENT")
_library.define(f"neighborhood_attention({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"neighborhood_attention_backward(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("neighborhood_attention", tiles.forward, "CompositeExplicitAutograd")
_library.impl("neighborhood_attention_backward", tiles.backward, "CompositeExplicitAutograd")

ops = torch.ops.detfamily


def _fake(qkv: Tensor, position_bias: Tensor | None, mask: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    batch, h, w, _, heads, depth = qkv.shape
    return qkv.new_empty(batch, h, w, heads * depth)


def _backward_fake(
    grad_output: Tensor,
    qkv: Tensor,
    position_bias: Tensor | None,
    padding_mask: Tensor | None,
    kernel_size: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    table = qkv.new_empty(0) if position_bias is None else position_bias.new_empty(position_bias.shape)
    return qkv.new_empty(qkv.shape), table


torch.library.register_fake("detfamily::neighborhood_attention", _fake, lib=_library)
torch.library.register_fake("detfamily::neighborhood_attention_backward", _backward_fake, lib=_library)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel_size, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    qkv, position_bias, padding_mask = ctx.saved_tensors
    grads = ops.neighborhood_attention_backward(
        grad_output, qkv, position_bias, padding_mask, ctx.kernel_size, ctx.dilation
    )
    return grads[0], None if position_bias is None else grads[1], None, None, None


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    raise NotImplementedError(
        "neighborhood attention has no second derivative: leave out create_graph=True, or differentiate numerically"
    )


torch.library.register_autograd("detfamily::neighborhood_attention", _grad, setup_context=_keep, lib=_library)
torch.library.register_autograd(
    "detfamily::neighborhood_attention_backward", _refuse, setup_context=_keep_nothing, lib=_library
)


@register_flop_formula(ops.neighborhood_attention)
def forward_flops(
    qkv: Any, position_bias: Any, padding_mask: Any, kernel_size: int, dilation: int, out_shape: Any = None
) -> int:
    """Two products of the query with each token of its window; what tiles compute in vain does not count."""
    batch, h, w, _, heads, depth = qkv
    pairs = 1
    for length in (h, w):
        pairs *= int(axis_windows(length, kernel_size, dilation)[1].sum())
    return 2 * 2 * batch * heads * depth * pairs


@register_flop_formula(ops.neighborhood_attention_backward)
def backward_flops(
    grad: Any,
    qkv: Any,
    position_bias: Any,
    padding_mask: Any,
    kernel_size: int,
    dilation: int,
    out_shape: Any = None,
) -> int:
    """Four products, for the gradients of weights, queries, keys and values, and one more to have weights again."""
    return forward_flops(qkv, None, None, kernel_size, dilation) * 5 // 2
