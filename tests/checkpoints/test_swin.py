"""Swin's official names and index tensors, and which Swin a detector's file has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detfamily.backbones.swin import Swin
from detfamily.checkpoints.adapter import Adapter
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.swin import PREFIXES, SIZES, rules, window_of
from detfamily.checkpoints.variant import backbone
from detfamily.config import build, compose
from detfamily.errors import CheckpointError
from detfamily.parity.case import Case

Read = Callable[[str], dict[str, Any]]


def built(*choices: str) -> Swin:
    """The backbone of a config, as shapes alone."""
    cfg = compose("train", ["family=deformable_detr", *choices, "backbone.weights=null"])
    with torch.device("meta"):
        swin: Swin = build(cfg.backbone)
    return swin


@cache
def official(*choices: str, prefix: str = PREFIXES[0]) -> dict[str, Tensor]:
    """The official tensors of a config, with a prefix, as shapes alone."""
    adapter = Adapter(rules("backbone.", prefix))
    ours = {f"backbone.{name}": value for name, value in built(*choices).state_dict().items()}
    return adapter.to_official(ours, computed=True)


def test_all_names_of_dinos_backbone_there_and_back(stored_json: Read) -> None:
    keys = stored_json("dino/checkpoint_keys.json")["variants"]["4scale_swin_L_384_22k"]["keys"]
    stored = {name: (shape, dtype) for name, shape, dtype in keys if name.startswith("backbone.0.")}
    found = official("backbone=swin_l_384_22k")
    assert {name: ([*one.shape], str(one.dtype).removeprefix("torch.")) for name, one in found.items()} == {
        name: (shape, dtype) for name, (shape, dtype) in stored.items()
    }
    adapter = Adapter(rules())
    ours = adapter.to_ours(found)
    state = built("backbone=swin_l_384_22k").state_dict()
    assert {name: one.shape for name, one in ours.items()} == {f"backbone.{n}": one.shape for n, one in state.items()}
    # what a file has and nobody reads still counts as known
    assert all(set(adapter.our_names(name)) <= set(ours) and adapter.our_names(name) for name in found)


def test_numbers_of_golden_weights_come_back(goldens: Path) -> None:
    """Among them the index of each pair of places, which is not read but computed."""
    adapter = Adapter(rules("", ""))
    for path in goldens.glob("swin/*/weights.safetensors"):
        weights = Case.load(path.parent).weights
        ours = adapter.to_ours(weights)
        assert not [name for name in ours if "index" in name]
        back = adapter.to_official(ours, computed=True)
        assert set(back) == set(weights) and any(name.endswith("relative_position_index") for name in back)
        for name, value in weights.items():
            assert back[name].dtype == value.dtype and torch.equal(back[name], value), name
        assert set(adapter.to_official(ours)) == {name for name in weights if not name.endswith("_index")}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", SIZES)
def test_a_published_network_is_recognised(name: str, prefix: str) -> None:
    evidence = Evidence(official(f"backbone={name}", prefix=prefix), {}, "a.pth")
    assert backbone(evidence) == ([f"backbone={name}"], False)
    assert not evidence.doubts


@pytest.mark.parametrize(
    "choices",
    [
        ("backbone=swin_t", "backbone.window_size=12"),
        ("backbone=swin_b", "backbone.window_size=8", "backbone.dilation=true"),
        ("backbone=swin_s", "backbone.patch_norm=false", "backbone.qkv_bias=false", "backbone.mlp_ratio=2.0"),
        ("backbone=swin_t", "backbone.embed_dim=8", "backbone.depths=[1,3,2,1]", "backbone.num_heads=[1,2,2,4]"),
    ],
)
def test_another_network_is_recognised_by_what_differs(choices: tuple[str, ...]) -> None:
    chosen, dilated = backbone(Evidence(official(*choices), {}, "a.pth"))
    assert dilated == ("backbone.dilation=true" in choices)
    again = official(*chosen, *["backbone.dilation=true"] * dilated)
    expected = official(*choices)
    assert {name: one.shape for name, one in again.items()} == {name: one.shape for name, one in expected.items()}
    assert chosen[0] == choices[0]
    assert {*chosen} == {*choices} - {"backbone.dilation=true"}


def test_settings_that_name_another_network_are_doubted() -> None:
    state = official("backbone=swin_l_384_22k")
    for stored in ("swin_L_384_22k", "swin_large_window12"):
        evidence = Evidence(state, {"backbone": stored}, "a.pth")
        backbone(evidence)
        assert not evidence.doubts
    evidence = Evidence(state, {"backbone": "swin_L_224_22k"}, "a.pth")
    backbone(evidence)
    assert evidence.doubts == [
        "its stored setting backbone is 'swin_L_224_22k', its tensors are of 'swin_L_384_22k'",
    ]


def test_broken_files_are_refused() -> None:
    state = official("backbone=swin_t")
    first = "backbone.0.layers.0.blocks.0."
    table, norm = f"{first}attn.relative_position_bias_table", "backbone.0.layers.1.blocks.0.norm1.weight"
    many_blocks = "backbone.0.layers.2.blocks.900000000.norm1.weight"
    many_layers = "backbone.0.layers.900000000.blocks.0.norm1.weight"
    for change, message in (
        ({table: torch.zeros(170, 3)}, r"relative_position_bias_table: a table of biases .* this one has 170$"),
        ({table: torch.zeros(169)}, r"has the shape \[169\], expected 2 axes"),
        ({table: None}, r"is incomplete: .*layers\.0\.blocks\.0\.attn\.relative_position_bias_table is missing"),
        ({norm: None}, r"is incomplete: .*layers\.1\.blocks\.0\.norm1\.weight is missing"),
        ({many_blocks: torch.zeros(1)}, r"layers\.2\.blocks\.6\.norm1\.weight is missing"),
        ({many_layers: torch.zeros(1)}, r"layers\.4\.blocks\.0\.attn.* is missing"),
    ):
        broken = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            backbone(Evidence(broken, {}, "a.pth"))


def test_windows_by_the_rows_of_their_table() -> None:
    assert [window_of((2 * size - 1) ** 2) for size in (1, 2, 7, 12)] == [1, 2, 7, 12]
    for rows in (0, 4, 168, 170):
        with pytest.raises(ValueError, match=rf"this one has {rows}"):
            window_of(rows)
