"""Neighborhood attention by NATTEN, the library of NAT's authors (https://natten.org), from version 0.20 on."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


def attend(qkv: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """(B, h, w, M * D) from (B, h, w, 3, M, D)."""
    from natten.functional import na2d

    q, k, v = qkv.unbind(3)
    output: Tensor = na2d(q, k, v, kernel_size=kernel_size, dilation=dilation)
    return output.flatten(3)


def obstacle(qkv: Tensor, kernel_size: int, dilation: int, plain: bool, needs_grad: bool) -> str:
    """Why NATTEN cannot compute a call; empty where it can.

    Args:
        qkv: (B, h, w, 3, M, D).
        kernel_size: side of a window, in tokens.
        dilation: step between them.
        plain: whether there are neither biases nor padding.
        needs_grad: whether gradients are wanted.
    """
    if not installed():
        return "the package natten is not installed (pip install natten)"
    if not plain:
        return "natten has known neither position biases nor padding since version 0.20"
    if kernel_size < 2 or kernel_size * dilation > min(qkv.shape[1:3]):
        h, w = qkv.shape[1:3]
        return (
            "natten's windows have at least 2 tokens a side and fit into the map, and "
            f"kernel_size={kernel_size} with dilation={dilation} does not fit into {h} x {w}"
        )
    if needs_grad and not qkv.is_cuda:
        return f"natten has no gradients on {qkv.device.type}"
    return ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("natten") is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_kernels() -> bool:
    """Whether the package came with compiled kernels: without them it calls FlexAttention, as we do ourselves."""
    if not installed():
        return False
    import natten

    return bool(getattr(natten, "HAS_LIBNATTEN", False))
