"""How the heads start: what mmdet's configs say."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from detfamily.auxiliary import ATSS
from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import ATSSAssigner, MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.initialise import start_small
from detfamily.auxiliary.roi_head import RoIHead
from detfamily.auxiliary.rpn import RPN
from detfamily.auxiliary.samplers import RandomSampler


def test_small_weights_and_one_bias() -> None:
    layer = nn.Linear(300, 300)
    start_small(layer, std=0.02, bias=-1.5)
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (layer.bias == -1.5).all()
    start_small(nn.Conv2d(2, 2, 1, bias=False))


def test_the_heads() -> None:
    anchors, coder, sampler = partial(Anchors, size=8, scales=1, ratios=(1.0,)), DeltaCoder(), RandomSampler(8, 0.5)
    weights, selection = dict.fromkeys(ATSS.losses, 1.0), BestBoxes(0.5)
    rpn = RPN([8], 128, anchors, coder, MaxIoUAssigner(0.7, 0.3), sampler)
    roi = RoIHead([8], 8, 80, 56.0, 7, 256, coder, MaxIoUAssigner(0.5, 0.5), sampler, selection)
    atss = ATSS([8], 128, 80, 1, 32, anchors, coder, ATSSAssigner(), weights, selection)
    small = [rpn.conv, roi.class_head, atss.class_head, atss.box_tower[0].conv]
    for layer, std in [*((one, 0.01) for one in small), (roi.box_head, 0.001)]:
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
    assert not any(one.bias.any() for one in (rpn.conv, roi.class_head, roi.box_head, *roi.shared, atss.box_head))
    assert atss.class_head.bias.sigmoid().tolist() == pytest.approx([0.01] * 80)
    # uniform between the bounds of Xavier
    bound = math.sqrt(6 / (8 * 49 + 256))
    first = roi.shared[0].weight
    assert 0.99 * bound < first.abs().max() <= bound
    assert torch.stack([*atss.scales]).tolist() == [1.0]
