"""A classifier and a set of generated shapes that train in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from detfamily.config import compose
from detfamily.structures import Images, Targets


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="session")
def tiny(shapes_root) -> list[str]:
    """Overrides for the command line: 2 epochs of 3 steps of 4 images."""
    return [
        "data=shapes",
        "backbone=small",
        "backbone.stem_width=8",
        "backbone.widths=[8,16,16,16]",
        "data.train_size=12",
        "data.val_size=5",
        "data.image_size=48",
        f"data.root={shapes_root}",
        "schedule.epochs=2",
        "schedule.total_batch_size=4",
        "runtime.num_workers=0",
        "runtime.threads=1",
        "runtime.device=cpu",
    ]


@pytest.fixture
def config(tiny, tmp_path) -> Callable[..., DictConfig]:
    """The tiny run with further overrides; choosing a group drops its settings. Its folder is "run"."""

    def make(*more: str) -> DictConfig:
        chosen = tuple(f"{one.partition('=')[0]}." for one in more if one.startswith(("backbone=", "data=")))
        kept = [one for one in tiny if not one.startswith(chosen)]
        return compose("classify", [*kept, f"output_dir={tmp_path / 'run'}", *more])

    return make


@pytest.fixture
def batch() -> Callable[..., tuple[Images, Targets]]:
    """Images (B, 3, 32, 32) of one size, with one label each."""

    def make(labels: Tensor, seed: int = 0) -> tuple[Images, Targets]:
        count, ids = len(labels), tuple(range(len(labels)))
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator).byte()
        sizes = ((32, 32),) * count
        images = Images(pixels, torch.zeros(count, 32, 32, dtype=torch.bool), sizes, sizes, ids)
        boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
        return images, Targets.from_lists([one[None] for one in labels], [boxes] * count, ids)

    return make


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """Runs set torch's global switches."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
