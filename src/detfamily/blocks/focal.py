"""Focal losses of single logits: what a column costs as background, and what it costs otherwise as an object's.

Sums take every column as background first and exchange the few columns of objects, so that no one-hot tensor of all
columns is made.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def background(logits: Tensor, gamma: float, weight: float = 1.0) -> Tensor:
    """What logits cost that are to say no, (...) -> (...)."""
    return weight * logits.sigmoid() ** gamma * F.softplus(logits)


def focal_exchange(own: Tensor, alpha: float, gamma: float) -> Tensor:
    """What the logits of objects' classes cost more than as background (RetinaNet, arXiv 1708.02002, eq. 5)."""
    return alpha * (1 - own.sigmoid()) ** gamma * F.softplus(-own) - background(own, gamma, 1 - alpha)


def quality_exchange(own: Tensor, quality: Tensor, beta: float) -> Tensor:
    """The same where they are to say how good the box is, from 0 to 1 (GFL, arXiv 2006.04388)."""
    wrong = F.binary_cross_entropy_with_logits(own, quality.expand_as(own), reduction="none")
    return wrong * (quality - own.sigmoid()).abs() ** beta - background(own, beta)
