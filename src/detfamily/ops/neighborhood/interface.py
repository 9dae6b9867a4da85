"""The functional interface of neighborhood attention (NAT, arXiv 2204.07143, section 3.1), and what computes it."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from detfamily.errors import ConfigError
from detfamily.ops.neighborhood import flex, natten, registration

logger = logging.getLogger(__name__)

Backend = Literal["auto", "pytorch", "flex", "natten"]

_said: set[str] = set()


def neighborhood_attn(
    qkv: Tensor,
    kernel_size: int,
    dilation: int = 1,
    position_bias: Tensor | None = None,
    padding_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of each token of a map to the kernel_size x kernel_size tokens around it, in steps of the dilation.

    Where the window would hang over the map it is shifted inside; an axis with fewer tokens than that (of the token's
    residue class, with a dilation) is seen as a whole. Queries are scaled by 1 / sqrt(D).

    Backends: "pytorch" runs everywhere; "flex" is FlexAttention, compiled for a GPU, and on the CPU without gradients;
    "natten" is the library of NAT's authors, for windows that fit into the map, without biases and padding. "auto" is
    natten's kernels where they can compute this, FlexAttention on a GPU unless biases are learned, and "pytorch" for
    the rest.

    Args:
        qkv: (B, h, w, 3, M, D) queries, keys and values of M heads of width D.
        kernel_size: side K of a window, in tokens.
        dilation: step between the tokens of a window.
        position_bias: (M, 2K - 1, 2K - 1) added to logits, at (y_k - y_q, x_k - x_q) / dilation + K - 1.
        padding_mask: (B, h, w) bool, True at tokens that nobody may look at; a query with no other in its window reads
            the mean of their values.
        backend: what computes it.

    Returns:
        (B, h, w, M * D)

    Raises:
        ConfigError: the backend asked for cannot compute this.
    """
    chosen = choose(qkv, kernel_size, dilation, position_bias, padding_mask, backend)
    if chosen == "natten":
        return natten.attend(qkv, kernel_size, dilation)
    if chosen == "flex":
        return flex.attend(qkv, kernel_size, dilation, position_bias, padding_mask)
    output: Tensor = registration.ops.neighborhood_attention(qkv, position_bias, padding_mask, kernel_size, dilation)
    return output


def choose(
    qkv: Tensor,
    kernel_size: int,
    dilation: int,
    position_bias: Tensor | None,
    padding_mask: Tensor | None,
    backend: Backend,
) -> Backend:
    """The backend that computes a call; said once in the log for each kind of device.

    Raises:
        ConfigError: the one asked for cannot.
    """
    needs_grad = torch.is_grad_enabled() and (
        qkv.requires_grad or (position_bias is not None and position_bias.requires_grad)
    )
    plain = position_bias is None and padding_mask is None
    obstacles = {
        "natten": lambda: natten.obstacle(qkv, kernel_size, dilation, plain, needs_grad),
        "flex": lambda: flex.obstacle(qkv, needs_grad),
    }
    if backend in obstacles and (reason := obstacles[backend]()):
        raise ConfigError(f"backend={backend!r} cannot compute this neighborhood attention: {reason}; use 'auto'")
    chosen = backend
    if backend == "auto":
        chosen = "pytorch"
        learned = position_bias is not None and position_bias.requires_grad and needs_grad
        if qkv.is_cuda and not learned and not obstacles["flex"]():
            chosen = "flex"
        if qkv.is_cuda and natten.has_kernels() and not obstacles["natten"]():
            chosen = "natten"
    _say(f"neighborhood attention on {qkv.device.type} is computed by {chosen}")
    return chosen


def _say(text: str) -> None:
    if not torch.compiler.is_compiling() and text not in _said:
        _said.add(text)
        logger.info(text)
