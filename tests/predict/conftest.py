"""Checkpoints of tiny detectors with random weights that say something about every image."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from detfamily.build import build_detector
from detfamily.config import compose, to_container
from detfamily.data.labels import LabelMap
from detfamily.detector import Detector
from detfamily.engine import checkpoint
from detfamily.predict import Predictor, load

CLASSES = LabelMap.contiguous([{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 9, "name": "eel"}])
TINY = [
    *("backbone=small", "backbone.stem_width=8", "backbone.widths=[8,16,16,16]"),
    *("model.embed_dim=32", "model.num_heads=4", "model.ffn_dim=32", "model.num_queries=12"),
    *("encoder.num_layers=1", "decoder.num_layers=3", "augmentation=none", "runtime.num_workers=0"),
    *("runtime.device=cpu", "runtime.threads=1"),
]
DEFORMABLE = ["family=deformable_detr", "neck.num_groups=8"]
FAMILIES = {
    "detr": ["family=detr"],
    "deformable_detr": DEFORMABLE,
    "refinement": [*DEFORMABLE, "decoder=refine"],
    "two_stages": [*DEFORMABLE, "decoder=refine", "query_source=proposals"],
}


def enliven(detector: Detector) -> None:
    """Norms with statistics, and heads that do not say the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    for module in detector.modules():
        if hasattr(module, "running_var"):
            for name, low, high in (("running_mean", -0.3, 0.3), ("running_var", 0.5, 2), ("weight", 0.5, 1.5)):
                getattr(module, name).data.uniform_(low, high, generator=generator)
            module.bias.data.uniform_(-0.3, 0.3, generator=generator)  # type: ignore[union-attr, operator]
    heads = [*detector.heads.class_heads, *detector.heads.box_heads, detector.query_source]
    for head in heads:
        for linear in (one for one in head.modules() if isinstance(one, nn.Linear)):
            linear.weight.data.normal_(0, 0.25, generator=generator)
            linear.bias.data.normal_(0, 0.25, generator=generator)
    if getattr(detector.query_source, "pos", None) is not None:
        detector.query_source.pos.data.mul_(5)  # type: ignore[union-attr, operator]


def make(path: Path, overrides: list[str], label_map: LabelMap = CLASSES, **more: Any) -> Path:
    """Write a checkpoint as training does, without any training."""
    cfg = compose("train", [*overrides[:1], *TINY, *overrides[1:]])
    torch.manual_seed(0)
    detector = build_detector(cfg, label_map.num_classes, pretrained=False)
    enliven(detector)
    cfg.model.num_classes = label_map.num_classes
    template = OmegaConf.to_container(cfg, resolve=False)
    template["model"]["num_classes"] = None  # type: ignore[index, call-overload]
    state = {"config": to_container(cfg), "template": template, "label_map": label_map.state_dict()}
    checkpoint.save(path, {**state, "model": detector.state_dict(), "ema": None, **more})
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint of a family, with overrides."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def of(family: str, *overrides: str) -> Path:
        path = folder / f"{family}-{abs(hash(overrides))}.pt"
        return path if path.exists() else make(path, [*FAMILIES[family], *overrides])

    return of


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of random color, (H, W, 3) uint8."""
    colors = np.random.default_rng(seed).integers(0, 256, (1 + height // 16, 1 + width // 16, 3), dtype=np.uint8)
    return colors.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]


@pytest.fixture(scope="session")
def predictors(checkpoints: Callable[..., Path]) -> Callable[..., Predictor]:
    """A predictor of a family with overrides of its checkpoint, which gives all that it finds; loaded once."""
    return functools.cache(lambda family, *overrides: load(checkpoints(family), threshold=0, overrides=overrides))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with images of two formats, some in a folder below, all of different looks."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    places = ["a.jpg", "a.png", "below/a.jpg", "below/b.JPG"]
    for seed, (name, size) in enumerate(zip(places, [(64, 96), (96, 64), (64, 96), (80, 80)], strict=True)):
        Image.fromarray(photo(*size, seed)).save(folder / name, quality=95)
    return folder
