"""Names of Co-DETR's auxiliary heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from detfamily.checkpoints.adapter import Adapter
from detfamily.checkpoints.co_detr_heads import rules
from detfamily.config import build
from detfamily.config.registry import configs_dir


def published() -> nn.ModuleDict:
    """Those of Co-DINO, as shapes alone."""
    model = {"embed_dim": 256, "num_classes": 80, "anchor_scale": 1.0}
    found = {}
    with torch.device("meta"):
        for name in ("faster_rcnn", "atss"):
            own = OmegaConf.load(configs_dir() / "auxiliary" / f"{name}.yaml")
            head = build(OmegaConf.create({"model": model, "auxiliary": own}).auxiliary)
            found[name] = head(strides=[4, 8, 16, 32, 64, 128])
    return nn.ModuleDict(found)


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
