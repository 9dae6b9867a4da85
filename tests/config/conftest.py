"""A small tree of configs, and the blocks that it names."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

import detfamily
from detfamily.config import compose, validate
from detfamily.errors import ConfigError

TREE = {
    "train.yaml": """
        defaults:
          - _self_
          - encoder: deep
          - attention: dense
          - recipe: adamw
          - data: folder
          - extras: []
          - family: base
          - experiment: null
        seed: 42
        name: run
        resume: null
        scale: 1.0
        flag: true
        sizes: [480, 512]
        published: []
        model: {width: 64, heads: 8}
        """,
    "evaluate.yaml": "defaults:\n  - data: folder\n  - _self_\ncheckpoint: null\n",
    "encoder/deep.yaml": """
        _target_: detfamily.example_blocks.Encoder
        depth: 3
        layer: ${attention}
        norm: {_target_: torch.nn.LayerNorm, normalized_shape: "${model.width}"}
        """,
    "attention/dense.yaml": """
        _target_: detfamily.example_blocks.Attention
        _partial_: true
        width: ${model.width}
        heads: ${model.heads}
        """,
    "attention/narrow.yaml": "defaults:\n  - dense\n  - _self_\nheads: 2\n",
    "recipe/adamw.yaml": """
        _target_: detfamily.example_blocks.Recipe
        lr: 1.0e-4
        epochs: 50
        drops: [40]
        betas: [0.9, 0.999]
        width: auto
        precision: fp32
        decay: null
        weights: {giou: 2.0, l1: 5.0}
        nesterov: false
        note: plain
        """,
    "recipe/50.yaml": "defaults:\n  - adamw\n  - _self_\nepochs: 50\nnote: fifty\n",
    "data/folder.yaml": "_target_: detfamily.example_blocks.Folder\nroot: ???\n",
    "data/here.yaml": "_target_: detfamily.example_blocks.Folder\nroot: .\n",
    "extras/atss.yaml": "# @package extras.atss\n_target_: torch.nn.Identity\n",
    "extras/rcnn.yaml": "# @package extras.rcnn\n_target_: torch.nn.Identity\n",
    "family/base.yaml": "# @package _global_\nmodel: {heads: 4}\n",
    "family/narrow.yaml": "# @package _global_\ndefaults:\n  - override /attention: narrow\nmodel: {width: 32}\n",
    "experiment/long.yaml": """
        # @package _global_
        defaults:
          - override /family: narrow
          - override /data: here
        published: [{AP: 43.8, source: table 1}]
        recipe: {epochs: 150}
        model: {heads: 16}
        """,
}


@pytest.fixture(scope="session", autouse=True)
def blocks() -> Iterator[None]:
    """Make ``detfamily.example_blocks`` importable: configs may only name modules of the package."""
    folder = str(Path(__file__).parent / "blocks")
    detfamily.__path__.append(folder)
    yield
    detfamily.__path__.remove(folder)
    sys.modules.pop("detfamily.example_blocks", None)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text).strip("\n") + "\n")
    return folder


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """The configs of ``TREE``, not to be changed."""
    return write(tmp_path_factory.mktemp("configs"), TREE)


@pytest.fixture
def write_tree(tmp_path) -> Callable[..., Path]:
    """Writes other configs, on top of those of ``TREE`` unless ``alone``."""

    def write_files(files: dict[str, str], alone: bool = False) -> Path:
        return write(tmp_path, files if alone else {**TREE, **files})

    return write_files


@pytest.fixture
def composed(tree) -> Callable[..., DictConfig]:
    """Composes ``train`` with ``data=here``, since ``data=folder`` misses a value."""

    def compose_tree(*overrides: str, configs: Path = tree, data: bool = True) -> DictConfig:
        return compose("train", ["data=here", *overrides] if data else overrides, configs)

    return compose_tree


@pytest.fixture
def refusal(composed) -> Callable[..., str]:
    """What is said about overrides that are wrong."""

    def refused(*overrides: str, **settings) -> str:
        with pytest.raises(ConfigError) as caught:
            validate(composed(*overrides, **settings))
        return str(caught.value)

    return refused
