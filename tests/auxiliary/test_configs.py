"""The choices of the group: what they say, and that a head can be made of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from detfamily.auxiliary import AuxiliaryHead
from detfamily.config import build, validate
from detfamily.config.registry import configs_dir

FOLDER = configs_dir() / "auxiliary"
HEADS = sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem != "none")
MODEL = {"embed_dim": 32, "num_classes": 5, "anchor_scale": 0.5}
MODEL |= {"region_scale": 56.0, "num_regions": 16, "region_dim": 8}


def head_of(name: str) -> AuxiliaryHead:
    cfg = OmegaConf.create({"model": MODEL, "auxiliary": read(FOLDER / f"{name}.yaml")})
    validate(cfg)
    head: AuxiliaryHead = build(cfg.auxiliary)(strides=[8, 16, 32])
    return head


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return found


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_each(name: str) -> None:
    head = head_of(name)
    assert head.name == name and head.weights == read(FOLDER / f"{name}.yaml")["weights"]


def test_no_head() -> None:
    assert read(FOLDER / "none.yaml") == {"auxiliary": None}


def test_sizes_for_small_images() -> None:
    assert head_of("atss").anchors.size == 4.0
    both = head_of("faster_rcnn")
    assert both.rpn.anchors.size == 2.0 and both.roi.finest_scale == 28.0 and both.roi.strides == (8, 16)
