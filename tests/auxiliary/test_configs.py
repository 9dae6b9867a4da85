"""The choices of the group: what they say, and that a head can be made of each."""

from __future__ import annotations

from collections.abc import Sequence
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
MODEL = {"embed_dim": 32, "num_classes": 5, "anchor_scale": 0.5, "region_scale": 56.0}
MODEL |= {"num_regions": 512, "region_dim": 1024}


TOWERS = 2 * (9 * 256 * 256 + 2 * 256)
PARAMETERS = {
    "atss": TOWERS + 9 * 256 * (80 + 4 + 1) + 80 + 4 + 1 + 5,
    "fcos": TOWERS + 9 * 256 * (80 + 4 + 1) + 80 + 4 + 1 + 5,
    "gfl": TOWERS + 9 * 256 * (80 + 4 * 17) + 80 + 4 * 17 + 5,
    "paa": TOWERS + 9 * 256 * (80 + 4 + 1) + 80 + 4 + 1 + 5,
    "retinanet": TOWERS + (9 * 256 + 1) * 9 * (80 + 4),
}


def head_of(
    name: str,
    settings: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    strides: Sequence[int] = (8, 16, 32),
) -> AuxiliaryHead:
    """What a choice gives, with other settings and other numbers of the model."""
    own = OmegaConf.merge(read(FOLDER / f"{name}.yaml"), settings or {})
    cfg = OmegaConf.create({"model": MODEL | (model or {}), "auxiliary": own})
    validate(cfg)
    head: AuxiliaryHead = build(cfg.auxiliary)(strides=strides)
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
    assert head_of("fcos").assigner.size == 4.0
    both = head_of("faster_rcnn")
    assert both.rpn.anchors.size == 2.0 and both.roi.finest_scale == 28.0 and both.roi.strides == (8, 16)


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_the_published_sizes(name: str, parameters: int) -> None:
    head = head_of(name, model={"embed_dim": 256, "num_classes": 80}, strides=(8, 16, 32, 64, 128))
    assert sum(one.numel() for one in head.parameters()) == parameters
