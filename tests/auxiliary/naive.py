"""Losses of single anchors, number by number, with gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def focal(row: Tensor, label: int | None, alpha: float, gamma: float) -> Tensor:
    """Of the logits of one anchor; None is background."""
    total = torch.zeros((), dtype=row.dtype)
    for column, logit in enumerate(row):
        p = 1 / (1 + torch.exp(-logit))
        if column == label:
            total = total - alpha * (1 - p) ** gamma * p.log()
        else:
            total = total - (1 - alpha) * p**gamma * (1 - p).log()
    return total


def quality_focal(row: Tensor, label: int | None, quality: float, beta: float) -> Tensor:
    total = torch.zeros((), dtype=row.dtype)
    for column, logit in enumerate(row):
        wanted = quality if column == label else 0.0
        p = 1 / (1 + torch.exp(-logit))
        wrong = -wanted * p.log() - (1 - wanted) * (1 - p).log()
        total = total + abs(wanted - p) ** beta * wrong
    return total


def binary(logit: Tensor, wanted: float) -> Tensor:
    p = 1 / (1 + torch.exp(-logit))
    return -wanted * p.log() - (1 - wanted) * (1 - p).log()


def iou_and_giou(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of two boxes (x0, y0, x1, y1)."""
    zero = torch.zeros((), dtype=torch.float64)
    width, height = (torch.maximum(zero, torch.minimum(a[i + 2], b[i + 2]) - torch.maximum(a[i], b[i])) for i in (0, 1))
    hull = math.prod(torch.maximum(a[i + 2], b[i + 2]) - torch.minimum(a[i], b[i]) for i in (0, 1))
    union = sum((one[2] - one[0]) * (one[3] - one[1]) for one in (a, b)) - width * height
    iou = width * height / union
    return iou, iou - (hull - union) / hull


def step(anchor: Tensor, delta: Tensor, stds: Sequence[float]) -> list[Tensor]:
    """The box that a step leads to."""
    x0, y0, x1, y1 = anchor
    dx, dy, dw, dh = (one * std for one, std in zip(delta, stds, strict=True))
    x, y = (x0 + x1) / 2 + dx * (x1 - x0), (y0 + y1) / 2 + dy * (y1 - y0)
    w, h = (x1 - x0) * dw.exp(), (y1 - y0) * dh.exp()
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def centerness(anchor: Tensor, box: Tensor) -> float:
    (x0, y0, x1, y1), (left, top, right, bottom) = anchor.tolist(), box.tolist()
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    across = min(x - left, right - x) / max(x - left, right - x)
    return math.sqrt(across * min(y - top, bottom - y) / max(y - top, bottom - y))
