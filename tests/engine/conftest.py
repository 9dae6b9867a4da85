"""A detector and a data set that train in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from detfamily.config import compose


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="session")
def tiny(shapes_root) -> list[str]:
    """Overrides for the command line: 2 epochs of 3 steps of 4 images."""
    return [
        "family=deformable_detr",
        "backbone=small",
        "backbone.stem_width=8",
        "backbone.widths=[8,16,16,16]",
        "data=shapes",
        "augmentation=shapes",
        "data.train_size=12",
        "data.val_size=5",
        "data.image_size=96",
        "data.sides=[16,48]",
        "data.objects=[1,4]",
        f"data.root={shapes_root}",
        "model.embed_dim=32",
        "model.num_heads=4",
        "model.ffn_dim=32",
        "model.num_queries=10",
        "encoder.num_layers=1",
        "decoder.num_layers=2",
        "drop_epochs=[]",
        "schedule.epochs=2",
        "schedule.total_batch_size=4",
        "runtime.num_workers=0",
        "runtime.threads=1",
        "runtime.device=cpu",
        "evaluation.pictures=2",
    ]


@pytest.fixture(scope="session")
def composed(tiny) -> DictConfig:
    return compose("train", tiny)


@pytest.fixture
def config(composed, tmp_path) -> Callable[..., DictConfig]:
    """The tiny run with further fields set; its folder is "run"."""

    def make(*more: str) -> DictConfig:
        changes = OmegaConf.from_dotlist([f"output_dir={tmp_path / 'run'}", *more])
        cfg = OmegaConf.merge(composed, changes)
        assert isinstance(cfg, DictConfig)
        return cfg

    return make


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """Runs set torch's global switches."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
