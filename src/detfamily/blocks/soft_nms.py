"""Soft-NMS: boxes that overlap a better one of their class lose score instead of being dropped."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_nms(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou: float, min_score: float = 1e-3) -> Tensor:
    """Scores after linear Soft-NMS (arXiv 1704.04503, section 3), class by class.

    Best first, each box multiplies the scores of the worse boxes of its class that overlap it by ``iou`` or more with
    1 - IoU. A box is final as soon as no box that it overlaps is better: all such boxes of all classes and images are
    taken at once, so that the rounds are as many as boxes lie on one another, not as many as there are.

    Memory grows with the square of N. mmcv, which Co-DETR answers with, keeps the best box whatever its score; here
    it falls under ``min_score`` like any other.

    Args:
        boxes_xyxy: (B, N, 4) corners, in any unit.
        scores: (B, N) in (0, 1).
        labels: (B, N) int64.
        iou: the least overlap that costs score.
        min_score: a box that falls below is gone, and takes no score from others.

    Returns:
        (B, N) the scores that are left, 0 for boxes that are gone.
    """
    overlaps = _pairwise_iou(boxes_xyxy)
    near = (overlaps >= iou) & (labels[:, :, None] == labels[:, None])
    near &= ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    left_over = torch.where(near, 1 - overlaps, 1)
    first = torch.ones_like(near[0]).tril(-1)  # of equal boxes the first one counts as the better
    final = scores < min_score
    while not final.all():
        better = (scores[:, None] > scores[..., None]) | ((scores[:, None] == scores[..., None]) & first)
        taken = ~final & ~(near & better & ~final[:, None]).any(-1)
        final = final | taken
        scores = torch.where(final, scores, scores * torch.where(taken[:, None], left_over, 1).prod(-1))
        final = final | (scores < min_score)
    return torch.where(scores < min_score, 0, scores)


def _pairwise_iou(boxes_xyxy: Tensor) -> Tensor:
    """(B, N, 4) to (B, N, N); NaN between two boxes without area, which overlap nothing."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    area = (high - low).prod(-1)
    sides = torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(low[:, :, None], low[:, None])
    shared = sides.clamp(min=0).prod(-1)
    return shared / (area[:, :, None] + area[:, None] - shared)
