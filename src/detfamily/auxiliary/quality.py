"""How good a place or a box is: what dense heads learn to say beside the class."""

from __future__ import annotations

import torch
from torch import Tensor

from detfamily.blocks import boxes
from detfamily.blocks.boxes import to_cxcywh


def centerness_of(anchors_xyxy: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """How near the centres of anchors are to those of boxes they lie in (FCOS, arXiv 1904.01355, eq. 3).

    Args:
        anchors_xyxy: (..., 4).
        boxes_xyxy: (..., 4), which hold the anchors' centres.

    Returns:
        (...) from 0 at the edge to 1 at the centre.
    """
    center = to_cxcywh(anchors_xyxy)[..., :2]
    low, high = center - boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - center
    return (torch.minimum(low, high) / torch.maximum(low, high)).prod(-1).sqrt()


@torch.no_grad()
def iou_of(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """(..., 4), (..., 4) -> (...) the overlap of paired boxes, without a gradient."""
    return boxes.iou_of(to_cxcywh(boxes_xyxy), to_cxcywh(others_xyxy))
