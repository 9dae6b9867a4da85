"""Losses of single anchors or boxes, before they are summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from detfamily.blocks.focal import background, focal_exchange, quality_exchange

_EPS = 1e-6


def focal(logits: Tensor, matched: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss (RetinaNet, arXiv 1708.02002, eq. 5), summed over the columns.

    Args:
        logits: (..., K).
        matched: (...) bool, whether there is an object.
        labels: (...) int64, of the object; any column where there is none.
        alpha: weight of the positive columns, against 1 - alpha of the negative ones.
        gamma: focusing power.

    Returns:
        (...)
    """
    own = logits.gather(-1, labels[..., None])[..., 0]
    exchange = focal_exchange(own, alpha, gamma)
    return background(logits, gamma, 1 - alpha).sum(-1) + torch.where(matched, exchange, 0.0)


def quality_focal(logits: Tensor, matched: Tensor, labels: Tensor, quality: Tensor, beta: float) -> Tensor:
    """Focal loss whose positive columns shall say how good the box is (GFL, arXiv 2006.04388, eq. 2), summed over them.

    Args:
        logits: (..., K).
        matched: (...) bool, whether there is an object.
        labels: (...) int64, of the object; any column where there is none.
        quality: (...) from 0 to 1, the overlap of the box with the object; anything where there is none.
        beta: focusing power.

    Returns:
        (...)
    """
    own = logits.gather(-1, labels[..., None])[..., 0]
    exchange = quality_exchange(own, quality.to(own.dtype), beta)
    return background(logits, beta).sum(-1) + torch.where(matched, exchange, 0.0)


def distribution_focal(logits: Tensor, distances: Tensor) -> Tensor:
    """Cross entropy with the two whole numbers around a distance, each by its nearness (GFL, eq. 6).

    Args:
        logits: (..., n + 1) of the whole numbers 0 .. n.
        distances: (...) in [0, n).

    Returns:
        (...)
    """
    below = distances.long()
    near = distances - below
    minus_log = -logits.log_softmax(-1)
    pair = minus_log.gather(-1, torch.stack([below, below + 1], -1))
    return (1 - near) * pair[..., 0] + near * pair[..., 1]


def binary(logits: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross entropy of logits (...) with numbers (...) from 0 to 1, (...)."""
    return F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none")


def giou(boxes_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
    """1 - GIoU (arXiv 1902.09630) of paired boxes (..., 4), (...)."""
    apart: Tensor = generalized_box_iou_loss(boxes_xyxy, targets_xyxy, reduction="none", eps=_EPS)
    return apart
