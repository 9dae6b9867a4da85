"""Bipartite matching of predictions and targets (DETR, section 3.1): costs on the device, the assignment on the host.

All layers and images of all groups travel to the host together, in one copy, and their assignments come back in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from detfamily.blocks.boxes import iou_and_giou
from detfamily.errors import NonFiniteError
from detfamily.structures import Predictions, Targets


@dataclass(frozen=True)
class Assignment:
    """Which query answers for each target.

    Attributes:
        query: (D, B, T) int64, the query's index; 0 where there is none.
        matched: (D, B, T) bool, False in the padding and for targets beyond the number of queries.
    """

    query: Tensor
    matched: Tensor

    def gather(self, values: Tensor) -> Tensor:
        """(D, B, N, X) of the queries to (D, B, T, X) of their targets."""
        return values.gather(2, self.query[..., None].expand(*self.query.shape, values.shape[-1]))


class SoftmaxClassCost(nn.Module):
    """Minus the probability of the target's class (DETR, eq. 1)."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(D, B, N, K), (B, T) -> (D, B, N, T)"""
        return -_columns(logits.softmax(-1), labels)


class FocalClassCost(nn.Module):
    """What the focal loss would save if the query took the target (official code, ``models/matcher.py``).

    Args:
        alpha: weight of the positive part; 0.25 in all official matchers, whatever the loss has.
        gamma: focusing power.
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(D, B, N, K), (B, T) -> (D, B, N, T)"""
        prob = _columns(logits, labels).sigmoid()
        negative = (1 - self.alpha) * prob**self.gamma * -(1 - prob + 1e-8).log()
        positive = self.alpha * (1 - prob) ** self.gamma * -(prob + 1e-8).log()
        return positive - negative


def _columns(scores: Tensor, labels: Tensor) -> Tensor:
    """(D, B, N, K) -> (D, B, N, T), the columns of each image's targets."""
    index = labels[None, :, None].expand(*scores.shape[:3], -1)
    return scores.gather(3, index)


class Matcher(nn.Module):
    """The cheapest one-to-one assignment by class, L1 distance and generalised IoU (DETR, eq. 1 and A.2).

    Args:
        class_cost: module giving the class part.
        weights: of the parts "class", "l1" and "giou".
        eps: in the denominators of IoU.

    Raises:
        ValueError: a part is missing or unknown, or all weights are zero.
    """

    def __init__(self, class_cost: nn.Module, weights: Mapping[str, float], eps: float = 0.0) -> None:
        super().__init__()
        if set(weights) != {"class", "l1", "giou"}:
            raise ValueError(f"criterion.matcher.weights has {sorted(weights)}; expected 'class', 'l1' and 'giou'")
        if not any(weights.values()):
            raise ValueError("criterion.matcher.weights are all zero: nothing would tell queries apart")
        self.class_cost = class_cost
        self.weights = dict(weights)
        self.eps = eps

    @torch.no_grad()
    def cost(self, predictions: Predictions, targets: Targets) -> Tensor:
        """(D, B, N, T) float32 or more; the padding of the targets holds numbers without meaning."""
        boxes, wanted = predictions.boxes[..., None, :], targets.boxes[:, None]
        cost = self.weights["class"] * self.class_cost(predictions.logits, targets.labels)
        if self.weights["l1"]:
            cost = cost + self.weights["l1"] * (boxes - wanted).abs().sum(-1)
        if self.weights["giou"]:
            cost = cost - self.weights["giou"] * iou_and_giou(boxes, wanted, self.eps)[1]
        return cost


def assign(
    costs: Mapping[str, Tensor], targets: Mapping[str, Targets], ride: Tensor | None = None
) -> tuple[dict[str, Assignment], np.ndarray | None]:
    """Solve all assignments of all groups with one copy to the host and one back.

    Args:
        costs: for each group (D, B, N, T).
        targets: for each group, what its costs are about.
        ride: (X,) numbers on the device that are wanted on the host, too, and share the copy.

    Returns:
        The assignments by group, and ``ride`` on the host.

    Raises:
        NonFiniteError: a cost is NaN or infinite; names group, layer and image.
    """
    passengers = [] if ride is None else [ride.to(next(iter(costs.values())).dtype)]
    host = torch.cat([*(cost.reshape(-1) for cost in costs.values()), *passengers]).cpu().numpy()
    solved, start = [], 0
    for name, cost in costs.items():
        size = cost.numel()
        solved.append(_solve(host[start : start + size].reshape(cost.shape), targets[name], name))
        start += size
    device = next(iter(costs.values())).device
    back = torch.from_numpy(np.concatenate([one.reshape(-1) for one in solved])).to(device, non_blocking=True)
    parts = back.split([one.size for one in solved])
    assignments = {}
    for name, part, one in zip(costs, parts, solved, strict=True):
        query = part.view(one.shape)
        assignments[name] = Assignment(query.clamp(min=0), query >= 0)
    return assignments, host[start:] if ride is not None else None


def _solve(costs: np.ndarray, targets: Targets, group: str) -> np.ndarray:
    """(D, B, N, T) -> (D, B, T), the query of each target or -1."""
    layers, batch, _, most = costs.shape
    query = np.full((layers, batch, most), -1, dtype=np.int64)
    for image, count in enumerate(targets.counts):
        for layer in range(layers):
            cost = costs[layer, image, :, :count]
            if not np.isfinite(cost).all():
                raise NonFiniteError(
                    f"the matching cost of group {group!r}, layer {layer}, image {targets.image_ids[image]} has NaN or "
                    "infinite numbers, so the model's output has: lower the learning rate, or check the image's boxes"
                )
            rows, columns = linear_sum_assignment(cost)
            query[layer, image, columns] = rows
    return query


def pairs(assignment: Assignment, counts: Sequence[int], layer: int) -> list[tuple[Tensor, Tensor]]:
    """For each image the matched (query, target) indices of one layer, queries ascending, on the host."""
    result = []
    for image, count in enumerate(counts):
        target = assignment.matched[layer, image, :count].nonzero().flatten().cpu()
        query = assignment.query[layer, image, :count].cpu()[target]
        order = query.argsort()
        result.append((query[order], target[order]))
    return result
