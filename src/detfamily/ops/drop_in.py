"""Stands in for the compiled ``MultiScaleDeformableAttention`` that official repositories import.

Deformable DETR, DAB-, DN- and H-DETR, DINO, Mask2Former and others build the same extension and wrap it in the same
``MSDeformAttnFunction``. After ``install()`` their unchanged code runs on our op: on any device, in any of its types.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from detfamily.ops import backends, registration
from detfamily.ops.ms_deform_attn import ms_deform_attn
from detfamily.structures import Size

OFFICIAL_NAME = "MultiScaleDeformableAttention"
"""What the official repositories call their extension."""


def install() -> None:
    """Make ``import MultiScaleDeformableAttention`` find this module; call it before importing the repository.

    Raises:
        RuntimeError: the compiled extension is imported already, so that others hold on to it.
    """
    ours = sys.modules[__name__]
    present = sys.modules.get(OFFICIAL_NAME, ours)
    if present is not ours:
        raise RuntimeError(
            f"{OFFICIAL_NAME} is imported already, from {getattr(present, '__file__', present)}; "
            "call install() before anything imports it"
        )
    sys.modules[OFFICIAL_NAME] = ours


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The forward pass with the official signature; differentiable.

    Args:
        value: (B, S, M, D).
        spatial_shapes: (L, 2) integers h, w, on any device.
        level_start_index: (L,) integers, the first token of each level, on any device.
        sampling_locations: (B, Q, M, L, P, 2) x, y normalised to the padded map.
        attention_weights: (B, Q, M, L, P).
        im2col_step: has no effect; any batch will do.

    Returns:
        (B, Q, M * D) in the type of value, whether or not autocast is on.

    Raises:
        ValueError: an argument does not fit the others.
    """
    shapes = _host_shapes(spatial_shapes, level_start_index)
    with _no_autocast(value.device.type):
        return ms_deform_attn(value, shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> list[Tensor]:
    """The backward pass with the official signature; arguments as in ``ms_deform_attn_forward``.

    Args:
        value: (B, S, M, D).
        spatial_shapes: (L, 2).
        level_start_index: (L,).
        sampling_locations: (B, Q, M, L, P, 2).
        attention_weights: (B, Q, M, L, P).
        grad_output: (B, Q, M * D).
        im2col_step: has no effect.

    Returns:
        The gradients of value, sampling_locations and attention_weights, each in the type of its input.

    Raises:
        ValueError: an argument does not fit the others.
    """
    expected = (*sampling_locations.shape[:2], value.shape[2:].numel())
    if grad_output.shape != expected:
        raise ValueError(f"grad_output has shape {tuple(grad_output.shape)}; expected (B, Q, M * D) = {expected}")
    shapes = _host_shapes(spatial_shapes, level_start_index)
    return list(_Gradients.apply(grad_output.to(value.dtype), shapes, value, sampling_locations, attention_weights))


class MSDeformAttnFunction(torch.autograd.Function):
    """The official autograd function; a second derivative is refused, as there."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """See ``ms_deform_attn_forward``."""
        tensors = (value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)
        ctx.save_for_backward(*tensors)
        return ms_deform_attn_forward(*tensors, im2col_step)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the forward pass's arguments."""
        value, shapes, starts, locations, weights = ctx.saved_tensors
        grads = ms_deform_attn_backward(value, shapes, starts, locations, weights, grad_output, im2col_step=1)
        return grads[0], None, None, grads[1], grads[2], None


class _Gradients(torch.autograd.Function):
    """Where graphs are made of gradients, it stays in them to refuse: without a past they would count as constants."""

    @staticmethod
    def forward(
        ctx: Any, grad_output: Tensor, shapes: tuple[Size, ...], value: Tensor, locations: Tensor, weights: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradients of the last three, each in its type."""
        reference = backends.backend_for(value.device.type) == backends.REFERENCE
        return (_by_autograd if reference else _by_kernel)(grad_output, shapes, value, locations, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Refuses."""
        raise NotImplementedError("ms_deform_attn has no second derivative: leave out create_graph=True")


def _by_autograd(
    grad_output: Tensor, shapes: tuple[Size, ...], value: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    """The reference has no backward pass of its own."""
    inputs = [one.detach().requires_grad_() for one in (value, locations, weights)]
    with torch.enable_grad(), _no_autocast(value.device.type):
        output = ms_deform_attn(inputs[0], shapes, *inputs[1:])
    return torch.autograd.grad(output, inputs, grad_output)


def _by_kernel(
    grad_output: Tensor, shapes: tuple[Size, ...], value: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    flat = [size for shape in shapes for size in shape]
    precise = torch.float64 if value.dtype == torch.float64 else torch.float32
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = registration.ops.ms_deform_attn_backward(
        grad_output, value, flat, locations.to(precise), weights.to(precise), deterministic
    )
    return tuple(grad.to(one.dtype) for grad, one in zip(grads, (value, locations, weights), strict=True))


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """The official extension knows no autocast: what it is given in float32 it computes in float32."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


class _Known(NamedTuple):
    """What was read from a tensor of shapes together with a tensor of starts, and in which state these were."""

    starts: TensorWeakRef
    versions: tuple[int, int]
    shapes: tuple[Size, ...]


# Reading from a GPU waits for it. All layers of a model are given the same two tensors, so one wait serves them all.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _host_shapes(spatial_shapes: Tensor, level_start_index: Tensor) -> tuple[Size, ...]:
    """The shapes as Python ints, read once as long as both tensors live unchanged."""
    _require_integers("spatial_shapes", spatial_shapes)
    _require_integers("level_start_index", level_start_index)
    if spatial_shapes.is_inference() or level_start_index.is_inference():
        return _read_shapes(spatial_shapes, level_start_index)  # such tensors do not tell when they are changed
    versions = (spatial_shapes._version, level_start_index._version)
    known: _Known | None = _known.get(spatial_shapes)
    if known is None or known.versions != versions or known.starts() is not level_start_index:
        known = _Known(TensorWeakRef(level_start_index), versions, _read_shapes(spatial_shapes, level_start_index))
        _known[spatial_shapes] = known
    return known.shapes


def _read_shapes(spatial_shapes: Tensor, level_start_index: Tensor) -> tuple[Size, ...]:
    if spatial_shapes.ndim != 2 or spatial_shapes.shape[1] != 2:
        raise ValueError(f"spatial_shapes has shape {tuple(spatial_shapes.shape)}; expected (L, 2): h, w of each level")
    levels = len(spatial_shapes)
    if level_start_index.shape != (levels,):
        raise ValueError(
            f"level_start_index has shape {tuple(level_start_index.shape)}; expected ({levels},), "
            "one number for each level of spatial_shapes"
        )
    numbers = torch.cat([spatial_shapes.flatten(), level_start_index.to(spatial_shapes.device)]).tolist()
    sizes, starts = numbers[: 2 * levels], numbers[2 * levels :]
    shapes = tuple(zip(sizes[::2], sizes[1::2], strict=True))
    expected = [0, *itertools.accumulate(h * w for h, w in shapes)][:-1]
    if starts != expected:
        raise ValueError(
            f"level_start_index is {starts}; expected {expected}: levels lie one after another, "
            f"with the cells of spatial_shapes {shapes}"
        )
    return shapes


def _require_integers(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; expected a tensor of integers")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected integers")
