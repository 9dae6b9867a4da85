"""The official DINO, its code as it is, with our deformable attention in it, as a rival for ``benchmark_models.py``.

export OFFICIAL_DINO=.../DINO
python scripts/benchmark_models.py --path scripts/rivals --against official_dino:dino --experiments dino_r50_4scale_12ep

What the official code gets from here: our op under the name of its extension, a ResNet-50 with random weights instead
of downloaded ones, and, where the pixels are on the CPU, "cuda" understood as that.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmark_models import CRITERION, Side
from torch import Tensor
from torch.profiler import record_function

from detfamily.ops import drop_in

RECIPES = {
    "dino_r50_4scale_12ep": ("DINO_4scale.py", 1.0),
    "dino_r50_4scale_noise04_12ep": ("DINO_4scale.py", 0.4),
    "dino_r50_5scale_12ep": ("DINO_5scale.py", 1.0),
}
"""Our experiment -> the official file of arguments, and the box noise of the training script."""


def dino(experiment: str, num_classes: int) -> Side:
    """The official model and criterion of an experiment."""
    if experiment not in RECIPES:
        raise SystemExit(f"official_dino knows {', '.join(RECIPES)}; not {experiment}")
    folder = official_folder()
    drop_in.install()
    sys.path.insert(0, str(folder))
    import models.dino.backbone
    import models.dino.dino
    from util.misc import NestedTensor

    models.dino.backbone.is_main_process = lambda: False  # the one that would download weights
    with warnings.catch_warnings(action="ignore"):
        model, criterion, _ = models.dino.dino.build_dino(arguments(folder, experiment, num_classes))

    def samples(pixels: Tensor) -> Any:
        batch, _, height, width = pixels.shape
        return NestedTensor(pixels, torch.zeros(batch, height, width, dtype=torch.bool, device=pixels.device))

    def predict(pixels: Tensor) -> object:
        with cuda_means(pixels.device):
            return model(samples(pixels))

    def loss(pixels: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        targets = [{"labels": a, "boxes": b} for a, b in zip(labels, boxes, strict=True)]
        with cuda_means(pixels.device), warnings.catch_warnings(action="ignore"):
            outputs = model(samples(pixels), targets)
            with record_function(CRITERION):
                losses = criterion(outputs, targets)
                weights = criterion.weight_dict
                total: Tensor = sum(losses[name] * weights[name] for name in losses if name in weights)
        return total

    return Side("official", model, predict, loss)


def official_folder() -> Path:
    """Where the clone lies."""
    given = os.environ.get("OFFICIAL_DINO")
    if not given:
        raise SystemExit("OFFICIAL_DINO is not set: the folder of a clone of IDEA-Research/DINO")
    folder = Path(given).absolute()
    if not (folder / "models" / "dino" / "dino.py").is_file():
        raise SystemExit(f"OFFICIAL_DINO={given}: expected a clone of IDEA-Research/DINO, with models/dino/dino.py")
    return folder


def arguments(folder: Path, experiment: str, num_classes: int) -> SimpleNamespace:
    """What the official command line would give."""
    name, noise = RECIPES[experiment]
    given = {
        key: value for key, value in runpy.run_path(str(folder / "config" / "DINO" / name)).items() if key[0] != "_"
    }
    given |= {
        "device": "cpu",
        "num_classes": num_classes,
        "dn_labelbook_size": num_classes,
        "dn_box_noise_scale": noise,
    }
    return SimpleNamespace(**given)


@contextmanager
def cuda_means(device: torch.device) -> Iterator[None]:
    """Where the pixels are on the CPU, ``x.cuda()`` and ``x.to("cuda")`` mean that; otherwise nothing changes."""
    if device.type == "cuda":
        yield
        return
    cuda: Callable[..., Tensor] = torch.Tensor.cuda
    to: Callable[..., Tensor] = torch.Tensor.to

    def to_device(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *(device if isinstance(one, str) and one == "cuda" else one for one in args), **kwargs)

    torch.Tensor.cuda = lambda self: to(self, device)  # type: ignore[assignment,method-assign,misc]
    torch.Tensor.to = to_device  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda, torch.Tensor.to = cuda, to  # type: ignore[assignment,method-assign]
