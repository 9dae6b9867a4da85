"""Two groups of numbers told apart: a mixture of two normal distributions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EPS = 10 * torch.finfo(torch.float64).eps


@torch.no_grad()
def low_and_high(
    values: Tensor, valid: Tensor, steps: int = 100, tolerance: float = 1e-3, least_variance: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Fit a mixture to each row, by expectation-maximisation, and say which values belong to its lower component.

    It starts from the least and the greatest value as means, variances of 1 and equal shares, and ends where the mean
    log-likelihood changes by less than the tolerance: what PAA (arXiv 2007.08103) does with scikit-learn. All rows
    are fitted at once, in float64, each one to its own end.

    Args:
        values: (G, K).
        valid: (G, K) bool, False in slots that hold nothing.
        steps: of the fit, at most.
        tolerance: of the mean log-likelihood of a row.
        least_variance: added to the variances.

    Returns:
        (G, K) bool, whether the component that began at the least value is the more probable one; (G, K) float64, the
        logarithm of the density of the whole mixture. They mean nothing where nothing is valid.
    """
    x = torch.where(valid, values, 0.0).double()
    count = valid.sum(1).clamp(min=1)
    least, greatest = torch.where(valid, x, torch.inf).amin(1), torch.where(valid, x, -torch.inf).amax(1)
    mean = torch.stack([least, greatest], -1)
    mean = torch.where(valid.any(1, keepdim=True), mean, 0.0)
    variance, share = torch.ones_like(mean), torch.full_like(mean, 0.5)
    before = x.new_full((len(x),), -torch.inf)
    running = valid.any(1)
    for _ in range(steps):
        joint = _joint(x, mean, variance, share)
        density = joint.logsumexp(-1)
        membership = torch.where(valid[..., None], (joint - density[..., None]).exp(), 0.0)
        size = membership.sum(1) + _EPS
        new_mean = (membership * x[..., None]).sum(1) / size
        spread = (x[..., None] - new_mean[:, None]) ** 2
        new_variance = (membership * spread).sum(1) / size + least_variance
        move = running[:, None]
        mean, variance = torch.where(move, new_mean, mean), torch.where(move, new_variance, variance)
        share = torch.where(move, size / count[:, None], share)
        likelihood = torch.where(valid, density, 0.0).sum(1) / count
        running = running & ((likelihood - before).abs() >= tolerance)
        before = likelihood
        if not running.any():
            break
    joint = _joint(x, mean, variance, share)
    return joint[..., 0] >= joint[..., 1], joint.logsumexp(-1)


def _joint(x: Tensor, mean: Tensor, variance: Tensor, share: Tensor) -> Tensor:
    """(G, K, 2) the logarithm of the density of each component, times its share."""
    square = (x[..., None] - mean[:, None]) ** 2 / variance[:, None]
    return share.log()[:, None] - 0.5 * (math.log(2 * math.pi) + variance.log()[:, None] + square)
