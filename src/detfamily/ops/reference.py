"""Multi-scale deformable attention in plain PyTorch: runs everywhere, and other backends are checked against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detfamily.structures import Size


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: Sequence[Size], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """See ``ms_deform_attn``; one bilinear ``grid_sample`` per level, with the heads folded into the batch."""
    batch, _, heads, width = value.shape
    queries = sampling_locations.shape[1]
    # 16-bit values keep places of higher precision: 8 bits do not tell the cells of a large map apart
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    # grid_sample counts from -1 to 1, and wants one sampling grid per image: (B * M, Q, P, 2) for each level
    grids = (2 * sampling_locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    weights = attention_weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in spatial_shapes], dim=-1)
    output: Tensor | None = None
    for level, (h, w) in enumerate(spatial_shapes):
        sampled = F.grid_sample(
            maps[level].reshape(batch * heads, width, h, w).to(dtype),
            grids[level].to(dtype),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        summed = (sampled * weights[level]).sum(-1)
        output = summed if output is None else output + summed
    assert output is not None
    return output.view(batch, heads * width, queries).transpose(1, 2).contiguous().to(value.dtype)


def ms_deform_attn_projected_reference(
    value: Tensor,
    spatial_shapes: Sequence[Size],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """See ``ms_deform_attn_projected``; locations and weights as tensors of their own, then the plain form."""
    locations, weights = sampling(spatial_shapes, reference_points, sampling_offsets, attention_logits)
    return ms_deform_attn_reference(value, spatial_shapes, locations, weights)


def sampling(
    spatial_shapes: Sequence[Size], reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Locations (B, Q, M, L, P, 2) and weights (B, Q, M, L, P) of what is sampled; see ``ms_deform_attn_projected``."""
    batch, queries, heads, levels, points, _ = sampling_offsets.shape
    dtype = reference_points.dtype
    weights = attention_logits.to(dtype).softmax(-1).view(batch, queries, heads, levels, points)
    offsets = sampling_offsets.to(dtype)
    centers = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[-1] == 2:
        sizes = torch.tensor([(w, h) for h, w in spatial_shapes], dtype=dtype, device=offsets.device)
        locations = centers + offsets / sizes[:, None]
    else:
        locations = centers + offsets * (reference_points[:, :, None, :, None, 2:] * (0.5 / points))
    return locations, weights
