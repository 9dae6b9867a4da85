"""The functional interface of multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1, eq. 3).

Everything above this file calls these two functions; what computes them lies beneath: compiled code for the CPU or for
CUDA, or PyTorch (``backends.py`` chooses).
"""

from __future__ import annotations

import torch
from torch import Tensor

from detfamily.ops import backends, flops, registration
from detfamily.ops.reference import ms_deform_attn_projected_reference, ms_deform_attn_reference
from detfamily.structures import Size

_VALUE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def ms_deform_attn(
    value: Tensor, spatial_shapes: tuple[Size, ...], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum the values found at a few sampled places of every level, for each query and head.

    A place between pixels is interpolated bilinearly; pixel (i, j) has its centre at ((j + 0.5) / w, (i + 0.5) / h),
    and everything outside a map counts as zero. Sums are in float32 (float64 for float64 values) and rounded once.

    Args:
        value: (B, S, M, D), the tokens of all levels one after another, M heads of width D; float64, float32, float16
            or bfloat16.
        spatial_shapes: ((h, w), ...) of the L levels, Python ints; their areas add up to S.
        sampling_locations: (B, Q, M, L, P, 2) x, y normalised to the padded map: 0 and 1 are its borders. float32, or
            float64 with float64 values; narrower numbers are widened, though what they lost stays lost.
        attention_weights: (B, Q, M, L, P), as sampling_locations.

    Returns:
        (B, Q, M * D) of the dtype of value

    Raises:
        ValueError: a shape, dtype or device does not fit the others.
        ConfigError: the backend asked for is not there.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    locations = _precise("sampling_locations", sampling_locations, value)
    weights = _precise("attention_weights", attention_weights, value)
    if _in_pieces(value):
        return ms_deform_attn_reference(value, spatial_shapes, locations, weights)
    flat = [size for shape in spatial_shapes for size in shape]
    output: Tensor = registration.ops.ms_deform_attn(value, flat, locations, weights)
    return output


def ms_deform_attn_projected(
    value: Tensor,
    spatial_shapes: tuple[Size, ...],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """The same from a module's raw projections: softmax over levels and points, and locations from offsets.

    Offsets around a point count in cells of the level; around a box, in half its width and height per sampling point
    (official code, ``MSDeformAttn.forward``). Compiled backends do all of it in one pass, forward and backward.

    Args:
        value: (B, S, M, D), as in ``ms_deform_attn``.
        spatial_shapes: ((h, w), ...) of the L levels.
        reference_points: (B, Q, L, R) x, y or cx, cy, w, h normalised to each padded level; dtypes as for locations.
        sampling_offsets: (B, Q, M, L, P, 2) x, y; dtypes as for locations, but 16-bit ones are read as they are.
        attention_logits: (B, Q, M, L * P), as sampling_offsets.

    Returns:
        (B, Q, M * D) of the dtype of value

    Raises:
        ValueError: a shape, dtype or device does not fit the others.
        ConfigError: the backend asked for is not there.
    """
    _check_projected(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)
    references = _precise("reference_points", reference_points, value)
    if sampling_offsets.dtype == attention_logits.dtype == value.dtype:
        offsets, logits = sampling_offsets, attention_logits
    else:
        offsets = _precise("sampling_offsets", sampling_offsets, value)
        logits = _precise("attention_logits", attention_logits, value)
    if _in_pieces(value):
        return ms_deform_attn_projected_reference(value, spatial_shapes, references, offsets, logits)
    flat = [size for shape in spatial_shapes for size in shape]
    output: Tensor = registration.ops.ms_deform_attn_projected(value, flat, references, offsets, logits)
    return output


def _in_pieces(value: Tensor) -> bool:
    """Whether plain PyTorch computes the op step by step; not where only shapes count, or the ops themselves do."""
    return backends.backend_for(value.device.type) == "reference" and not (value.is_meta or flops.watched())


def _precise(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    """What says where to sample, and how much, in the type that is computed in."""
    expected = torch.float64 if value.dtype == torch.float64 else torch.float32
    if tensor.dtype == expected:
        return tensor
    if tensor.dtype in _VALUE_DTYPES and tensor.dtype.itemsize < expected.itemsize:
        return tensor.to(expected)
    raise ValueError(f"{name} has dtype {tensor.dtype}; expected {expected}, as value has dtype {value.dtype}")


def _check(value: Tensor, shapes: tuple[Size, ...], locations: Tensor, weights: Tensor) -> None:
    if locations.ndim != 6 or locations.shape[-1] != 2:
        raise ValueError(f"sampling_locations has shape {tuple(locations.shape)}; expected (B, Q, M, L, P, 2)")
    _check_value(value, shapes, {"sampling_locations": locations, "attention_weights": weights})
    batch, _, heads, _ = value.shape
    if locations.shape[0] != batch or locations.shape[2] != heads or locations.shape[3] != len(shapes):
        raise ValueError(
            f"sampling_locations has shape {tuple(locations.shape)}; expected (B, Q, M, L, P, 2) with "
            f"B, M, L = {batch}, {heads}, {len(shapes)}"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"attention_weights has shape {tuple(weights.shape)}; expected {tuple(locations.shape[:-1])}, "
            "as sampling_locations"
        )


def _check_projected(
    value: Tensor, shapes: tuple[Size, ...], references: Tensor, offsets: Tensor, logits: Tensor
) -> None:
    if offsets.ndim != 6 or offsets.shape[-1] != 2:
        raise ValueError(f"sampling_offsets has shape {tuple(offsets.shape)}; expected (B, Q, M, L, P, 2)")
    others = {"reference_points": references, "sampling_offsets": offsets, "attention_logits": logits}
    _check_value(value, shapes, others)
    batch, queries, heads, levels, points, _ = offsets.shape
    if (batch, heads, levels) != (value.shape[0], value.shape[2], len(shapes)):
        raise ValueError(
            f"sampling_offsets has shape {tuple(offsets.shape)}; expected (B, Q, M, L, P, 2) with "
            f"B, M, L = {value.shape[0]}, {value.shape[2]}, {len(shapes)}"
        )
    if references.shape[:-1] != (batch, queries, levels) or references.shape[-1] not in (2, 4):
        raise ValueError(
            f"reference_points has shape {tuple(references.shape)}; expected (B, Q, L, 2) for points or (B, Q, L, 4) "
            f"for boxes with B, Q, L = {batch}, {queries}, {levels}"
        )
    if logits.shape != (batch, queries, heads, levels * points):
        raise ValueError(
            f"attention_logits has shape {tuple(logits.shape)}; expected {(batch, queries, heads, levels * points)}, "
            "B, Q, M and L * P of sampling_offsets"
        )


def _check_value(value: Tensor, shapes: tuple[Size, ...], others: dict[str, Tensor]) -> None:
    if not shapes:
        raise ValueError("spatial_shapes is empty; expected the (h, w) of at least one level")
    if any(h < 1 or w < 1 for h, w in shapes):
        raise ValueError(f"spatial_shapes is {shapes}; expected heights and widths of at least 1")
    tokens = sum(h * w for h, w in shapes)
    if value.ndim != 4 or value.shape[1] != tokens:
        raise ValueError(
            f"value has shape {tuple(value.shape)}; expected (B, S, M, D) with S = {tokens}, the cells of {shapes}"
        )
    if value.dtype not in _VALUE_DTYPES:
        raise ValueError(f"value has dtype {value.dtype}; expected one of {', '.join(map(str, _VALUE_DTYPES))}")
    for name, other in others.items():
        if other.device != value.device:
            raise ValueError(
                f"{name} is on {other.device}, value on {value.device}: nothing is copied between devices, so move it"
            )
