"""Names of Co-DETR's auxiliary heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from detfamily.build import with_num_classes
from detfamily.checkpoints.adapter import Adapter
from detfamily.checkpoints.co_detr_heads import rules
from detfamily.config import build, compose


def published() -> nn.ModuleDict:
    """Those of Co-DINO, as shapes alone."""
    cfg = with_num_classes(compose("train", ["family=co_dino"]), 80)
    with torch.device("meta"):
        heads = [build(one)(strides=[4, 8, 16, 32, 64, 128]) for one in cfg.auxiliary]
    return nn.ModuleDict({head.name: head for head in heads})


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
