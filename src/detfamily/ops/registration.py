"""The ops as PyTorch knows them: schemas, shapes for tracing, gradients, autocast, and the kernels of last resort.

One op for each form and one for its gradients, whatever computes them: the compiled libraries add their kernels for the
CPU and for CUDA; on every other device, and where a library is missing, the reference runs. ``spatial_shapes`` is flat
here (h0, w0, h1, w1, ...), as schemas know no pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from detfamily.ops.reference import ms_deform_attn_projected_reference, ms_deform_attn_reference
from detfamily.structures import Size

_PLAIN = "Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights"
_PROJECTED = (
    "Tensor value, SymInt[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits"
)
_SCHEMAS = {
    "ms_deform_attn": f"({_PLAIN}) -> Tensor",
    "ms_deform_attn_backward": f"(Tensor grad_output, {_PLAIN}, bool deterministic) -> (Tensor, Tensor, Tensor)",
    "ms_deform_attn_projected": f"({_PROJECTED}) -> Tensor",
    "ms_deform_attn_projected_backward": (
        f"(Tensor grad_output, {_PROJECTED}, bool deterministic, bool reference_grad) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
}

_library = torch.library.Library("detfamily", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

ops = torch.ops.detfamily


def pairs(flat: Sequence[int]) -> tuple[Size, ...]:
    """(h0, w0, h1, w1, ...) -> ((h0, w0), (h1, w1), ...)"""
    return tuple(zip(flat[::2], flat[1::2], strict=True))


# ----------------------------------------------------------------------------------------------- kernels of last resort


def _plain(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn_reference(value, pairs(shapes), locations, weights)


def _projected(value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return ms_deform_attn_projected_reference(value, pairs(shapes), references, offsets, logits)


def _plain_backward(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool
) -> tuple[Tensor, ...]:
    return _differentiate(_plain, grad_output, value, shapes, locations, weights)


def _projected_backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
    deterministic: bool,
    reference_grad: bool,
) -> tuple[Tensor, ...]:
    grads = _differentiate(_projected, grad_output, value, shapes, references, offsets, logits)
    return grads if reference_grad else (grads[0], references.new_empty(0), *grads[2:])


def _differentiate(
    function: Callable[..., Tensor], grad_output: Tensor, value: Tensor, shapes: Sequence[int], *others: Tensor
) -> tuple[Tensor, ...]:
    # Kernels run with autograd left out: here it computes the gradients.
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), autograd:
        inputs = [tensor.detach().requires_grad_() for tensor in (value, *others)]
        output = function(inputs[0], shapes, *inputs[1:])
        return torch.autograd.grad(output, inputs, grad_output)


for _name, _kernel in {
    "ms_deform_attn": _plain,
    "ms_deform_attn_backward": _plain_backward,
    "ms_deform_attn_projected": _projected,
    "ms_deform_attn_projected_backward": _projected_backward,
}.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


# --------------------------------------------------------------------------------------------------- shapes for tracing


def _plain_fake(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _projected_fake(
    value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


def _plain_backward_fake(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool
) -> tuple[Tensor, ...]:
    return _empty(value), _empty(locations), _empty(weights)


def _projected_backward_fake(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
    deterministic: bool,
    reference_grad: bool,
) -> tuple[Tensor, ...]:
    grad_references = _empty(references) if reference_grad else references.new_empty(0)
    return _empty(value), grad_references, _empty(offsets), _empty(logits)


def _empty(like: Tensor) -> Tensor:
    """Results are contiguous, whatever the layout of the inputs."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


_FAKES: dict[str, Callable[..., Any]] = {
    "ms_deform_attn": _plain_fake,
    "ms_deform_attn_backward": _plain_backward_fake,
    "ms_deform_attn_projected": _projected_fake,
    "ms_deform_attn_projected_backward": _projected_backward_fake,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"detfamily::{_name}", _fake, lib=_library)


# ------------------------------------------------------------------------------------------------------------ gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _plain_grad(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = ops.ms_deform_attn_backward(grad_output, value, ctx.shapes, locations, weights, deterministic)
    return grads[0], None, grads[1], grads[2]


def _projected_grad(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, *others = ctx.saved_tensors
    deterministic, reference_grad = torch.are_deterministic_algorithms_enabled(), ctx.needs_input_grad[2]
    grads = ops.ms_deform_attn_projected_backward(
        grad_output, value, ctx.shapes, *others, deterministic, reference_grad
    )
    return grads[0], None, grads[1] if reference_grad else None, grads[2], grads[3]


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    raise NotImplementedError(
        "ms_deform_attn has no second derivative: leave out create_graph=True, or differentiate numerically"
    )


for _name, _grad, _setup in (
    ("ms_deform_attn", _plain_grad, _keep),
    ("ms_deform_attn_projected", _projected_grad, _keep),
    ("ms_deform_attn_backward", _refuse, _keep_nothing),
    ("ms_deform_attn_projected_backward", _refuse, _keep_nothing),
):
    torch.library.register_autograd(f"detfamily::{_name}", _grad, setup_context=_setup, lib=_library)


# ------------------------------------------------------------------------------------------------------------- autocast


def _autocast(op: Callable[..., Tensor], device_type: str) -> Callable[..., Tensor]:
    """Values go to autocast's type, as a matrix product's; what says where to sample keeps float32."""

    def run(value: Tensor, shapes: Sequence[int], *others: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        if value.dtype != torch.float64:
            value = value.to(dtype)
            narrow = len({other.dtype for other in others[1:]} | {dtype}) == 1 and len(others) == 3
            others = (others[0].float(), *(others[1:] if narrow else (other.float() for other in others[1:])))
        with torch.autocast(device_type, enabled=False):
            return op(value, shapes, *others)

    return run


for _name in ("ms_deform_attn", "ms_deform_attn_projected"):
    for _device in ("cpu", "cuda"):
        _library.impl(_name, _autocast(getattr(ops, _name).default, _device), f"Autocast{_device.upper()}")
