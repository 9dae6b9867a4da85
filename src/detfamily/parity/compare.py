"""How far a tensor of ours may lie from the official one, by its role."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

TIE = 1e-5
"""Scores and costs nearer than this count as equal: rounding decides their order."""

_HUGE = 1e12
"""Stands for NaN and infinity where numbers are compared."""


def error_ratio(role: str, expected: Tensor, ours: Tensor, key: str) -> float:
    """The largest error as a multiple of the limit: at most 1 passes.

    Args:
        role: output, loss, gradient, training, pixels or match (equality).
        expected: the official tensor.
        ours: compared with it; any float type.
        key: where it is stored; some limits depend on it.

    Returns:
        The ratio; infinity where shapes differ or one side has NaN or infinity and the other has not.
    """
    if tuple(expected.shape) != tuple(ours.shape):
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    exact = expected.dtype == torch.float64
    a, b = expected.to(torch.float64), ours.to(torch.float64)
    special = ~torch.isfinite(a) | ~torch.isfinite(b)
    if special.any():
        same = (a == b) | (a.isnan() & b.isnan())
        if not bool(same[special].all()):
            return float("inf")
        if bool(special.all()):
            return 0.0
    error = (a - b).abs()[~special]
    largest = float(a[~special].abs().max())
    if role == "pixels":
        return _pixels(key, error)
    return float((error / _limit(role, a[~special], largest, exact, key)).max())


def _limit(role: str, expected: Tensor, largest: float, exact: bool, key: str) -> Tensor:
    if role == "match":
        limit = torch.tensor(0.5)
    elif role == "output":
        limit = torch.tensor((1e-9 if exact else 3e-5) * max(1.0, largest))
    elif role == "loss":
        limit = 2e-5 * expected.abs() + 1e-6
    elif role == "gradient":
        zero = largest < 1e-5 and not exact
        limit = torch.tensor(1e-4 if zero else (1e-8 * largest + 1e-12 if exact else 2e-4 * largest + 1e-6))
    elif role == "training":
        limit = torch.tensor(1e-3) if ".param." in key else 1e-3 * expected.abs() + 1e-9
    else:
        raise ValueError(f"there is no limit for the role {role!r}")
    return limit


def _pixels(key: str, error: Tensor) -> float:
    if "resized" in key or "padded" in key:
        return float(error.max()) / 1.0
    return max(float(error.mean()) / 2e-3, float(error.max()) / 0.02)


def detections_ratio(expected: dict[str, Tensor], ours: dict[str, Tensor]) -> tuple[float, str]:
    """Compare one image's detections; where scores tie, any order among them will do.

    Args:
        expected: "scores" (N,), "labels" (N,), "boxes" (N, 4) in pixels.
        ours: the same.

    Returns:
        The largest error as a multiple of the limit, and which of the three it is.
    """
    if any(tuple(expected[name].shape) != tuple(ours[name].shape) for name in expected):
        return float("inf"), "shape"
    if not len(expected["scores"]):
        return 0.0, "scores"
    scores = (expected["scores"] - ours["scores"]).abs()
    tied = (expected["scores"][:, None] - ours["scores"]).abs() <= TIE
    partners = (tied | torch.eye(len(scores), dtype=torch.bool)) & (expected["labels"][:, None] == ours["labels"])
    boxes = (expected["boxes"][:, None] - ours["boxes"]).abs().amax(-1).nan_to_num(nan=_HUGE, posinf=_HUGE)
    # each of theirs needs one of ours for itself, and whatever ties may change places
    chosen = linear_sum_assignment(torch.where(partners, boxes.clamp(max=_HUGE), 1e3 * _HUGE).numpy())
    if not bool(partners[chosen].all()):
        return float("inf"), "labels"
    return max(
        (float(scores.nan_to_num(nan=_HUGE).max()) / 3e-5, "scores"), (float(boxes[chosen].max()) / 2e-3, "boxes")
    )
