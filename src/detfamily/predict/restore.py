"""A detector as its training left it, and an image as its tests see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from detfamily.build import build_postprocess
from detfamily.config import build, validate
from detfamily.data.labels import LabelMap
from detfamily.data.transforms import Sample, Transform
from detfamily.detector import Detector
from detfamily.engine.checkpoint import load_model
from detfamily.engine.evaluate import on_top_of, restore_detector
from detfamily.engine.runtime import Runtime
from detfamily.errors import ConfigError


@dataclass(frozen=True)
class Restored:
    """What a checkpoint says.

    Attributes:
        cfg: its config, with overrides.
        detector: with its weights, on the CPU.
        postprocess: predictions -> detections.
        transform: the test-time transform of the training.
        label_map: columns of the class head and their names.
        runtime: says the precision.
        device: where the detector is to be.
    """

    cfg: DictConfig
    detector: Detector
    postprocess: nn.Module
    transform: Transform
    label_map: LabelMap
    runtime: Runtime
    device: torch.device


def restore(checkpoint: str | Path, device: str | torch.device | None, overrides: Sequence[str]) -> Restored:
    """Build what a checkpoint describes; see ``load`` for the arguments and the errors."""
    stored = load_model(checkpoint)
    cfg = on_top_of(stored.config, overrides)
    validate(cfg)
    runtime: Runtime = build(cfg.runtime)
    place = device_of(device)
    label_map = LabelMap.from_state_dict(stored.label_map)
    detector = restore_detector(cfg, label_map.num_classes, stored.weights, checkpoint)
    return Restored(
        cfg=cfg,
        detector=detector,
        postprocess=build_postprocess(cfg),
        transform=build(cfg.augmentation.test),
        label_map=label_map,
        runtime=replace(runtime, device=cast("Any", place.type)),
        device=place,
    )


def as_sample(pixels: Tensor, transform: Transform) -> Sample:
    """An image (3, H, W) without objects, as it is tested."""
    none = torch.zeros(0)
    size = (pixels.shape[1], pixels.shape[2])
    sample = Sample(pixels, torch.zeros(0, 4), none.long(), none, none.long(), 0, size)
    return transform(sample, torch.Generator().manual_seed(0))


def device_of(wanted: str | torch.device | None) -> torch.device:
    """The device of that name, or an accelerator where there is one.

    Raises:
        ConfigError: it is not there.
    """
    if wanted is None or wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device={wanted!r} does not exist; expected cpu, cuda, cuda:1, ... or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={wanted!r} is not supported; expected cpu, cuda, cuda:1, ... or auto")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ConfigError(f"device={wanted!r}: torch finds {torch.cuda.device_count()} CUDA devices here; try auto")
    return device
