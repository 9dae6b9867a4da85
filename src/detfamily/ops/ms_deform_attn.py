"""The functional interface of multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1, eq. 3).

Everything above this file calls these two functions; what computes them lies beneath.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detfamily.ops.reference import ms_deform_attn_reference
from detfamily.structures import Size


def ms_deform_attn(
    value: Tensor, spatial_shapes: tuple[Size, ...], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum the values found at a few sampled places of every level, for each query and head.

    A place between pixels is interpolated bilinearly; pixel (i, j) has its centre at ((j + 0.5) / w, (i + 0.5) / h),
    and everything outside a map counts as zero.

    Args:
        value: (B, S, M, D), the tokens of all levels one after another, M heads of width D.
        spatial_shapes: ((h, w), ...) of the L levels, Python ints; their areas add up to S.
        sampling_locations: (B, Q, M, L, P, 2) x, y normalised to the padded map: 0 and 1 are its borders.
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D)

    Raises:
        ValueError: a shape does not fit the others.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_projected(
    value: Tensor,
    spatial_shapes: tuple[Size, ...],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """The same from a module's raw projections: softmax over levels and points, and locations from offsets.

    Offsets around a point count in cells of the level; around a box, in half its width and height per sampling point
    (official code, ``MSDeformAttn.forward``).

    Args:
        value: (B, S, M, D).
        spatial_shapes: ((h, w), ...) of the L levels.
        reference_points: (B, Q, L, R) x, y or cx, cy, w, h normalised to each padded level.
        sampling_offsets: (B, Q, M, L, P, 2) x, y.
        attention_logits: (B, Q, M, L * P).

    Returns:
        (B, Q, M * D)

    Raises:
        ValueError: a shape does not fit the others.
    """
    _check_projected(reference_points, sampling_offsets, attention_logits)
    batch, queries, heads, levels, points, _ = sampling_offsets.shape
    weights = attention_logits.softmax(-1).view(batch, queries, heads, levels, points)
    centers = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[-1] == 2:
        sizes = torch.tensor([(w, h) for h, w in spatial_shapes], dtype=centers.dtype, device=centers.device)
        locations = centers + sampling_offsets / sizes[:, None]
    else:
        locations = centers + sampling_offsets * (reference_points[:, :, None, :, None, 2:] * (0.5 / points))
    return ms_deform_attn(value, spatial_shapes, locations, weights)


def _check_projected(references: Tensor, offsets: Tensor, logits: Tensor) -> None:
    if offsets.ndim != 6 or offsets.shape[-1] != 2:
        raise ValueError(f"sampling_offsets has shape {tuple(offsets.shape)}; expected (B, Q, M, L, P, 2)")
    batch, queries, heads, levels, points, _ = offsets.shape
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


def _check(value: Tensor, shapes: tuple[Size, ...], locations: Tensor, weights: Tensor) -> None:
    tokens = sum(h * w for h, w in shapes)
    if value.ndim != 4 or value.shape[1] != tokens:
        raise ValueError(
            f"value has shape {tuple(value.shape)}; expected (B, S, M, D) with S = {tokens}, the cells of {shapes}"
        )
    batch, _, heads, _ = value.shape
    expected = (batch, locations.shape[1], heads, len(shapes), locations.shape[4], 2) if locations.ndim == 6 else None
    if tuple(locations.shape) != expected:
        raise ValueError(
            f"sampling_locations has shape {tuple(locations.shape)}; expected (B, Q, M, L, P, 2) with "
            f"B, M, L = {batch}, {heads}, {len(shapes)}"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"attention_weights has shape {tuple(weights.shape)}; expected {tuple(locations.shape[:-1])}, "
            "as sampling_locations"
        )
