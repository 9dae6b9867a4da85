"""Official names of DAT and DAT++, there and back, and files of their authors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detfamily.attention import DenseAttention, WindowAttention
from detfamily.backbones.dat import DAT, ConvStem
from detfamily.backbones.dat_blocks import ConvFeedForward
from detfamily.checkpoints.dat import PREFIX, dat_adapter
from detfamily.config import build, compose
from detfamily.errors import CheckpointError
from detfamily.parity.case import Case
from detfamily.parity.dat_backbones import network_of

Read = Callable[[str], dict[str, Any]]

# official models -> the config, the maps that are given, the side of the images
CLASSIFIERS = {
    "2022:dat_tiny": ("dat_t", 224),
    "2022:dat_small": ("dat_s", 224),
    "2022:dat_base": ("dat_b", 224),
    "2022:dat_base_384": ("dat_b_384", 384),
    "2023:dat_p": ("dat_plus", 224),
    "2023:dat_tiny": ("datpp_t", 224),
    "2023:dat_small": ("datpp_s", 224),
    "2023:dat_base": ("datpp_b", 224),
    "2023:dat_base_384": ("datpp_b", 224),
}
DETECTORS = {
    "rtn_tiny_1x_4n_dp00_lr2": ("datpp_t", [3, 4, 5]),
    "rtn_small_1x_4n_dp01_lr2": ("datpp_s", [3, 4, 5]),
    "mrcn_tiny_1x_4n_dp00_lr4": ("datpp_t", [2, 3, 4, 5]),
    "cmrcn_small_3x_4n_dp05_lr4": ("datpp_s", [2, 3, 4, 5]),
    "cmrcn_base_3x_8n_dp08_lr4": ("datpp_b", [2, 3, 4, 5]),
}


@cache
def built(*choices: str) -> DAT:
    """The backbone of a config, as shapes alone."""
    cfg = compose("train", ["family=deformable_detr", *choices, "backbone.weights=null"])
    with torch.device("meta"):
        dat: DAT = build(cfg.backbone)
    return dat


def is_output_norm(name: str) -> bool:
    return ".norm." in name and name.split(".")[2] == "norm"


def stored(entry: dict[str, Any]) -> dict[str, tuple[list[int], str]]:
    others = entry["dtypes_other_than_float32"]
    return {name: (shape, others.get(name, "float32")) for name, shape in entry["state_dict"].items()}


def described(state: dict[str, Tensor]) -> dict[str, tuple[list[int], str]]:
    return {name: ([*one.shape], str(one.dtype).removeprefix("torch.")) for name, one in state.items()}


@pytest.mark.parametrize("official", CLASSIFIERS)
def test_all_names_of_classifiers_there_and_back(stored_json: Read, official: str) -> None:
    name, image_size = CLASSIFIERS[official]
    entry = stored_json("dat/checkpoint_keys.json")["models"][official]
    dat = built(f"backbone={name}")
    state = {key: one for key, one in dat.state_dict().items() if not is_output_norm(key)}
    adapter = dat_adapter(dat, image_size=image_size)
    width = 8 * dat.stages[0].blocks[0].ffn_norm.weight.numel()
    classifier = {"cls_norm.norm.weight": [width], "cls_norm.norm.bias": [width]}
    classifier |= {"cls_head.weight": [1000, width], "cls_head.bias": [1000]}
    expected = stored(entry)
    assert described(adapter.to_official(state, computed=True)) == {
        key: value for key, value in expected.items() if key not in classifier
    }
    assert {key: expected[key][0] for key in classifier} == classifier
    file = {key: torch.empty(shape, device="meta") for key, (shape, _) in expected.items()}
    assert {key: one.shape for key, one in adapter.to_ours(file).items()} == {k: one.shape for k, one in state.items()}
    parameters = sum(one.numel() for one in state.values()) + sum(torch.Size(s).numel() for s in classifier.values())
    assert parameters == entry["number_of_parameters"]


@pytest.mark.parametrize("official", DETECTORS)
def test_all_names_of_detectors_there_and_back(stored_json: Read, official: str) -> None:
    name, stages = DETECTORS[official]
    models = stored_json("dat/checkpoint_keys.json")["models"]
    (entry,) = [one for key, one in models.items() if key.startswith(f"detection:{official} ")]
    dat = built(f"backbone={name}", f"model.stages={stages}")
    adapter = dat_adapter(dat, "backbone.", PREFIX, detection=True)
    expected = {PREFIX + key: value for key, value in stored(entry).items()}
    ours = {f"backbone.{key}": one for key, one in dat.state_dict().items()}
    assert described(adapter.to_official(ours, computed=True)) == expected
    file = {key: torch.empty(shape, device="meta") for key, (shape, _) in expected.items()}
    assert {key: one.shape for key, one in adapter.to_ours(file).items()} == {k: one.shape for k, one in ours.items()}
    assert sum(one.numel() for one in dat.parameters()) == entry["number_of_parameters"]


@pytest.mark.parametrize("case", ["tiny_backbone", "tiny_backbone_2022", "detection_backbone", "transformer_stage"])
def test_numbers_of_golden_weights_come_back(goldens: Path, case: str) -> None:
    """Among them masks and indices of windows, which are not read but computed."""
    found = Case.load(goldens / "dat" / case)
    network = network_of(found)
    network.load(found.weights)
    adapter = dat_adapter(network.dat, image_size=found.info["args"].get("img_size", 56))
    back = adapter.to_official(network.dat.state_dict(), computed=True)
    expected = {network.prefix + key: value for key, value in found.weights.items() if not key.startswith("cls_")}
    unused = {key for key in expected if key not in back}
    # the factors of a block without attention are in files, and nobody reads them
    assert unused == ({f"stages.0.layer_scales.{i}.weight" for i in (10, 11)} if case == "transformer_stage" else set())
    assert set(back) <= set(expected)
    for key, value in back.items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


def tiny(**settings: Any) -> DAT:
    def attention(embed_dim: int, num_heads: int) -> WindowAttention:
        return WindowAttention(embed_dim, num_heads, window_size=2)

    given = {
        **{"embed_dim": 8, "depths": [2], "num_heads": [2], "spec": [["a", "conv"]], "attention": {"a": attention}},
        **{"ffn": ConvFeedForward, "stem": ConvStem, "merge_kernel": 2, "stages": [2], "layer_scale": 0.5},
    }
    return DAT(**{**given, **settings})


@pytest.mark.parametrize(("detection", "name"), [(False, "weight"), (True, "gamma")])
def test_factors_of_branches_have_two_official_names(detection: bool, name: str) -> None:
    dat = tiny()
    official = dat_adapter(dat, detection=detection).to_official(dat.state_dict())
    factors = {key for key in official if "layer_scales" in key}
    assert factors == {f"stages.0.layer_scales.{branch}.{name}" for branch in (0, 1)}
    assert torch.equal(official[f"stages.0.layer_scales.1.{name}"], torch.full((8,), 0.5))
    assert official["stages.0.attns.1.weight"].shape == (8, 1, 7, 7)


def test_attention_that_no_official_dat_has() -> None:
    dat = tiny(attention={"a": partial(DenseAttention, dropout=0.0)})
    with pytest.raises(
        CheckpointError, match=r"has a DenseAttention in its blocks, as stages\.0\.blocks\.0\.attention"
    ):
        dat_adapter(dat)
