"""Arithmetic of boxes: formats, overlaps, and the logit space in which boxes are refined."""

from __future__ import annotations

import torch
from torch import Tensor


def to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) cx, cy, w, h to x0, y0, x1, y1, in the same units."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - 0.5 * size, center + 0.5 * size], -1)


def to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) x0, y0, x1, y1 to cx, cy, w, h, in the same units."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def iou_and_giou(boxes: Tensor, others: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Overlap and generalised overlap (GIoU, arXiv 1902.09630) of broadcast boxes.

    Args:
        boxes: (..., 4) cx, cy, w, h.
        others: (..., 4) cx, cy, w, h, broadcast against boxes; for all pairs pass (N, 1, 4) and (T, 4).
        eps: added to both denominators; 0 in DETR and Deformable DETR, 1e-6 in the DAB line.

    Returns:
        IoU and GIoU, each with the broadcast shape without the last axis.
    """
    a, b = to_xyxy(boxes), to_xyxy(others)
    intersection, union = _intersection_and_union(a, b)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    iou = intersection / (union + eps)
    hull_area = hull[..., 0] * hull[..., 1]
    return iou, iou - (hull_area - union) / (hull_area + eps)


def iou_of(boxes: Tensor, others: Tensor, least: float = 1e-6) -> Tensor:
    """Overlap of broadcast boxes cx, cy, w, h (..., 4), whose union counts as ``least`` at least (mmdet's form)."""
    intersection, union = _intersection_and_union(to_xyxy(boxes), to_xyxy(others))
    return intersection / union.clamp(min=least)


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas, of corners (..., 4)."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    # areas from the corners, as everywhere in the field, so that rounding agrees
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    intersection = overlap[..., 0] * overlap[..., 1]
    return intersection, area_a + area_b - intersection


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """The logit of x in (0, 1), with both x and 1 - x kept at eps at least."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def apply_delta(delta: Tensor, reference_points: Tensor | None, eps: float) -> Tensor:
    """Boxes from what a box head says, relative to where its queries look from.

    Without references the head speaks of the whole image (DETR); relative to a point it moves the centre and says the
    size; relative to a box it changes all four. The sum is taken in logit space (Deformable DETR, A.4).

    Args:
        delta: (..., 4).
        reference_points: (..., 2) or (..., 4) in (0, 1), or None.
        eps: of the inverse sigmoid.

    Returns:
        (..., 4) cx, cy, w, h in (0, 1).
    """
    if reference_points is None:
        return delta.sigmoid()
    logit = inverse_sigmoid(reference_points, eps)
    if logit.shape[-1] == 2:
        logit = torch.cat([logit, torch.zeros_like(logit)], -1)
    return (delta + logit).sigmoid()
