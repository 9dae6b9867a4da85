"""Names of Co-DETR's auxiliary heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from detfamily.auxiliary import ATSS, FasterRCNN
from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import ATSSAssigner, MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.positives import PositiveQueries
from detfamily.auxiliary.roi_head import RoIHead
from detfamily.auxiliary.rpn import RPN
from detfamily.auxiliary.samplers import RandomSampler
from detfamily.checkpoints.adapter import Adapter
from detfamily.checkpoints.co_detr_heads import rules


def published() -> nn.ModuleDict:
    """Those of Co-DINO, as shapes alone."""
    strides = [4, 8, 16, 32, 64, 128]
    queries, coder, sampler = PositiveQueries(), DeltaCoder(), RandomSampler(512, 0.25)
    with torch.device("meta"):
        rpn = RPN(256, Anchors(strides, 4, 3, (0.5, 1.0, 2.0)), coder, MaxIoUAssigner(0.7, 0.3, 0.3), sampler)
        roi = RoIHead(256, 80, strides[:-1], 56.0, 7, 1024, coder, MaxIoUAssigner(0.5, 0.5), sampler)
        atss = ATSS(256, 80, 1, 32, Anchors(strides, 8, 1, (1.0,)), coder, ATSSAssigner(), queries)
        return nn.ModuleDict({"faster_rcnn": FasterRCNN(rpn, roi, queries), "atss": atss})


def test_all_names_of_a_published_file_there_and_back(stored_json: Callable[[str], dict[str, Any]]) -> None:
    keys = stored_json("co_detr/checkpoint_keys.json")["models"]["co_dino_5scale_r50"]["keys"]
    heads = ("rpn_head.", "roi_head.", "bbox_head.")
    stored = {name: one["shape"] for name, one in keys.items() if name.startswith(heads)}
    adapter = Adapter(rules("auxiliary."))
    ours = {f"auxiliary.{name}": value for name, value in published().state_dict().items()}
    found = adapter.to_official(ours)
    assert {name: [*one.shape] for name, one in found.items()} == stored
    back = adapter.to_ours(found)
    assert {name: one.shape for name, one in back.items()} == {name: one.shape for name, one in ours.items()}


def test_behind_a_prefix() -> None:
    adapter = Adapter(rules(official="module."))
    assert adapter.our_names("module.rpn_head.rpn_cls.bias") == ("faster_rcnn.rpn.class_head.bias",)
    assert adapter.our_names("rpn_head.rpn_cls.bias") == ()
