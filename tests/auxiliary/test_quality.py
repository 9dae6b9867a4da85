"""How good places and boxes are."""

from __future__ import annotations

import math

import torch

from detfamily.auxiliary.quality import centerness_of, iou_of

from . import naive


def test_centerness() -> None:
    anchors = torch.tensor([[0.0, 0.0, 4.0, 4.0], [-2.0, 0.0, 2.0, 4.0], [-1.0, 1.0, 3.0, 5.0]])
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0]])
    torch.testing.assert_close(centerness_of(anchors, boxes), torch.tensor([1.0, 0.0, math.sqrt(1 / 3 * 1 / 3)]))


def test_overlap_without_a_gradient() -> None:
    torch.manual_seed(0)
    low = 3 * torch.rand(2, 6, 2, dtype=torch.float64)
    a, b = torch.cat([low, low + 1 + 8 * torch.rand(2, 6, 2, dtype=torch.float64)], -1)
    found = iou_of(a.requires_grad_(), b)
    wanted = torch.stack([naive.iou_and_giou(*pair)[0] for pair in zip(a, b, strict=True)])
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
    assert wanted.max() > 0.3 and not found.requires_grad
    assert iou_of(torch.zeros(1, 4), torch.zeros(1, 4)).tolist() == [0.0]
