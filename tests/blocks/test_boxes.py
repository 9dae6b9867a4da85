from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from detfamily.blocks.boxes import apply_delta, inverse_sigmoid, iou_and_giou, to_cxcywh, to_xyxy


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(count, 2, dtype=torch.float64, generator=generator)
    return torch.cat([centers, 0.02 + 0.5 * torch.rand(count, 2, dtype=torch.float64, generator=generator)], -1)


def test_formats_are_torchvisions() -> None:
    boxes = random_boxes(20, 0)
    corners = box_convert(boxes, "cxcywh", "xyxy")
    torch.testing.assert_close(to_xyxy(boxes), corners)
    torch.testing.assert_close(to_cxcywh(corners), boxes)
    assert to_xyxy(boxes.view(4, 5, 4)).shape == (4, 5, 4)


def test_overlaps_of_all_pairs_are_torchvisions() -> None:
    a, b = random_boxes(30, 0), random_boxes(20, 1)
    a[:3] = b[:3]  # equal
    a[3] = torch.tensor([0.1, 0.1, 0.1, 0.1])  # far apart
    b[3] = torch.tensor([0.9, 0.9, 0.1, 0.1])
    a[4, :2], a[4, 2:] = b[4, :2], b[4, 2:] / 2  # one inside the other
    iou, giou = iou_and_giou(a[:, None], b)
    torch.testing.assert_close(iou, box_iou(to_xyxy(a), to_xyxy(b)))
    torch.testing.assert_close(giou, generalized_box_iou(to_xyxy(a), to_xyxy(b)))
    assert float(giou[3, 3]) < -0.9


def test_eps_goes_into_both_denominators() -> None:
    a, b = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.6, 0.6, 0.2, 0.2]], dtype=torch.float64)
    # each 0.04; they share 0.1 x 0.1; the hull is 0.3 x 0.3
    iou, giou = iou_and_giou(a, b, eps=0.01)
    assert float(iou) == pytest.approx(0.01 / (0.07 + 0.01))
    assert float(giou) == pytest.approx(0.01 / (0.07 + 0.01) - (0.09 - 0.07) / (0.09 + 0.01))
    nothing = torch.zeros(4)
    assert iou_and_giou(nothing, nothing, eps=1e-6) == (0, 0)


def test_inverse_sigmoid_is_the_logit_up_to_eps() -> None:
    x = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x, 1e-5), torch.logit(x))
    for eps in (1e-3, 1e-5):
        ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, eps / 2, 1 - eps / 2, 1.0, 2.0]).double(), eps)
        low = torch.log(torch.tensor(eps, dtype=torch.float64))
        # x stops at eps while 1 - x goes on to 1, and the other way round
        torch.testing.assert_close(ends[:2], low.expand(2))
        torch.testing.assert_close(ends[4:], -low.expand(2))
        torch.testing.assert_close(ends[2], low - torch.log1p(torch.tensor(-eps / 2).double()))
        torch.testing.assert_close(ends[3], -ends[2])


def test_a_delta_moves_its_reference() -> None:
    delta = torch.randn(7, 4, dtype=torch.float64)
    reference = 0.1 + 0.8 * torch.rand(7, 4, dtype=torch.float64)
    torch.testing.assert_close(apply_delta(delta, None, 1e-5), torch.special.expit(delta))
    moved = torch.special.expit(delta + torch.logit(reference))
    torch.testing.assert_close(apply_delta(delta, reference, 1e-5), moved)
    point = apply_delta(delta, reference[:, :2], 1e-5)
    torch.testing.assert_close(point[:, :2], moved[:, :2])
    torch.testing.assert_close(point[:, 2:], torch.special.expit(delta[:, 2:]))
    # no delta: the reference itself
    torch.testing.assert_close(apply_delta(torch.zeros_like(delta), reference, 1e-5), reference)


def test_a_reference_learns_through_the_delta() -> None:
    reference = torch.rand(3, 2).clamp(0.1, 0.9).double().requires_grad_()
    delta = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, r: apply_delta(d, r, 1e-5), (delta, reference))
