"""Tiny detectors whose attentions look somewhere, and images for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from detfamily.build import build_detector
from detfamily.config import compose, to_container
from detfamily.data.batches import collate
from detfamily.data.labels import LabelMap
from detfamily.detector import Detector
from detfamily.engine import checkpoint
from detfamily.predict.restore import as_sample
from detfamily.structures import Images

CLASSES = LabelMap.contiguous([{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 9, "name": "eel"}])
TINY = [
    *("backbone=small", "backbone.stem_width=8", "backbone.widths=[8,16,16,16]"),
    *("model.embed_dim=32", "model.num_heads=4", "model.ffn_dim=32", "model.num_queries=12"),
    *("encoder.num_layers=2", "decoder.num_layers=3", "augmentation=none", "runtime.num_workers=0"),
    *("runtime.device=cpu", "runtime.threads=1"),
]
DEFORMABLE = ["family=deformable_detr", "neck.num_groups=8"]
DETECTORS = {
    "detr": ["family=detr", "model.stages=[4]"],
    "conditional_detr": ["family=conditional_detr"],
    "deformable_detr": DEFORMABLE,
    "refinement": [*DEFORMABLE, "decoder=refine"],
    "two_stages": [*DEFORMABLE, "decoder=refine", "query_source=proposals"],
    "own_level": [*DEFORMABLE, "encoder_attention=ms_deform_own_level"],
    "on_maps": [*DEFORMABLE, "encoder_attention=[neighborhood,deformable]"],
    "dat": [*DEFORMABLE, "backbone=dat_t", "backbone.embed_dim=12", "backbone.weights=null", "model.num_levels=4"],
    "swin": [*DEFORMABLE, "backbone=swin_t", "backbone.embed_dim=12", "backbone.weights=null", "model.num_levels=4"],
}


def config(name: str) -> DictConfig:
    words = DETECTORS[name]
    own = {word.partition("=")[0] for word in words}
    small = [one for one in TINY if one.partition("=")[0].partition(".")[0] != "backbone" or "backbone" not in own]
    return compose("train", [words[0], *small, *words[1:]])


def enliven(detector: Detector) -> Detector:
    """Attentions, heads and queries that do not do the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return detector


@pytest.fixture(scope="session")
def detectors() -> Callable[[str], Detector]:
    """Detectors by name, in evaluation mode; made once."""

    @functools.cache
    def make(name: str) -> Detector:
        torch.manual_seed(0)
        return enliven(build_detector(config(name), CLASSES.num_classes, pretrained=False)).eval()

    return make


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, detectors: Callable[[str], Detector]
) -> Callable[[str], Path]:
    """Checkpoints of these, as training leaves them."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def write(name: str) -> Path:
        path = folder / f"{name}.pt"
        if path.exists():
            return path
        cfg = config(name)
        template = OmegaConf.to_container(cfg, resolve=False)
        cfg.model.num_classes = CLASSES.num_classes
        state = {"config": to_container(cfg), "template": template, "label_map": CLASSES.state_dict()}
        checkpoint.save(path, {**state, "model": detectors(name).state_dict(), "ema": None})
        return path

    return write


def photo(height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    """(3, H, W) uint8, blocks of random color."""
    colors = np.random.default_rng(seed).integers(0, 256, (1 + height // 16, 1 + width // 16, 3), dtype=np.uint8)
    return torch.from_numpy(colors.repeat(16, 0).repeat(16, 1)[:height, :width].copy()).permute(2, 0, 1)


def one_image(pixels: torch.Tensor) -> Images:
    return collate([as_sample(pixels, lambda sample, generator: sample)]).images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate(("a.png", "b.png")):
        Image.fromarray(photo(seed=seed).permute(1, 2, 0).numpy()).save(folder / name)
    return folder
