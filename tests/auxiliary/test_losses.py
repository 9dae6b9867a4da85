"""Losses of single anchors against loops over their numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detfamily.auxiliary.losses import distribution_focal, focal, giou, quality_focal

from . import naive


def some() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, whether there is an object, its label, and how good the box is."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(2, 3, 4, dtype=torch.float64)
    matched = torch.tensor([[True, False, True], [False, False, True]])
    return logits.requires_grad_(), matched, torch.randint(4, (2, 3)), torch.rand(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.4, 1.5)])
def test_focal(alpha: float, gamma: float) -> None:
    logits, matched, labels, _ = some()
    found = focal(logits, matched, labels, alpha, gamma)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        label = int(labels[*place]) if matched[*place] else None
        torch.testing.assert_close(found[*place], naive.focal(logits[*place], label, alpha, gamma))
    assert torch.autograd.gradcheck(lambda x: focal(x, matched, labels, alpha, gamma), logits)


@pytest.mark.parametrize("beta", [2.0, 1.5])
def test_quality_focal(beta: float) -> None:
    logits, matched, labels, quality = some()
    found = quality_focal(logits, matched, labels, quality, beta)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        label = int(labels[*place]) if matched[*place] else None
        wanted = naive.quality_focal(logits[*place], label, quality[*place].item(), beta)
        torch.testing.assert_close(found[*place], wanted)
    assert torch.autograd.gradcheck(lambda x: quality_focal(x, matched, labels, quality, beta), logits)


def test_extreme_logits_are_finite() -> None:
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    for label in (0, 1):
        args = logits, torch.tensor([True]), torch.tensor([label])
        (focal(*args, 0.25, 2.0) + quality_focal(*args, torch.tensor([0.5]), 2.0)).sum().backward()
        assert logits.grad is not None and logits.grad.isfinite().all()


def test_distribution_focal() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 4, 7, dtype=torch.float64, requires_grad=True)
    distances = 5.9 * torch.rand(5, 4, dtype=torch.float64)
    distances[0, 0], distances[0, 1] = 0.0, 3.0
    found = distribution_focal(logits, distances)
    for row in range(5):
        for edge in range(4):
            share = [max(0.0, 1 - abs(distances[row, edge].item() - whole)) for whole in range(7)]
            wanted = F.cross_entropy(logits[row, edge], torch.tensor(share, dtype=torch.float64))
            torch.testing.assert_close(found[row, edge], wanted)
    assert torch.autograd.gradcheck(lambda x: distribution_focal(x, distances), logits)


def test_giou() -> None:
    torch.manual_seed(0)
    low = 10 * torch.rand(2, 6, 2, dtype=torch.float64)
    a, b = torch.cat([low, low + 1 + 8 * torch.rand(2, 6, 2, dtype=torch.float64)], -1)
    found = giou(a.requires_grad_(), b)
    wanted = [1 - naive.iou_and_giou(*pair)[1] for pair in zip(a, b, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: giou(x, b), a)
