"""The golden cases of whole DATs and of stages, beyond what the check needs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from detfamily.parity.case import MUST_COMPARE, Case, role_of
from detfamily.parity.check import check
from detfamily.parity.compare import error_ratio
from detfamily.parity.dat_backbones import network_of

Copy = Callable[..., Path]
CASES = {"transformer_stage": 148, "tiny_backbone": 32, "tiny_backbone_2022": 24, "detection_backbone": 60}
RESIZED = "load_pretrained_resize"


def change_args(case: Path, **changed: Any) -> None:
    info = json.loads((case / "case.json").read_text())
    info["args"] |= changed
    (case / "case.json").write_text(json.dumps(info))


def judged(case: Path) -> str:
    (verdict,) = check([case])
    assert not verdict.passed
    return verdict.error


@pytest.mark.parametrize(("name", "compared"), [*CASES.items(), (RESIZED, 9)])
def test_everything_in_a_case_is_compared(goldens: Path, name: str, compared: int) -> None:
    (verdict,) = check([goldens / "dat" / name])
    assert verdict.passed and verdict.compared == compared and not verdict.in_double, verdict


@pytest.mark.parametrize("name", ["tiny_backbone", "tiny_backbone_2022"])
def test_stems_give_the_same_tokens(goldens: Path, name: str) -> None:
    case = Case.load(goldens / "dat" / name)
    network = network_of(case)
    network.load(case.weights)
    tokens = network.double().dat.patches(case.io["image"].double()).permute(0, 3, 1, 2)
    assert error_ratio("output", case.io["mid.stem"], tokens.detach(), "mid.stem") < 0.5


def test_every_single_number_counts(copy_of: Copy) -> None:
    case = copy_of("dat/tiny_backbone_2022")
    tensors = load_file(case / "io.safetensors")
    changed = set()
    for key, value in tensors.items():
        if role_of(key, case) in MUST_COMPARE:
            changed.add(key)
            flat, middle = value.view(-1), value.numel() // 2
            flat[middle] += 0.01 * (1 + flat.abs().max())
    save_file(tensors, case / "io.safetensors")
    (verdict,) = check([case])
    assert len(changed) == CASES["tiny_backbone_2022"] and set(verdict.failed) == changed and not verdict.error


@pytest.mark.parametrize(
    ("changed", "passes"),
    [
        ({"drop_path_rate": 0.3, "heads_q": [1, 2, 3, 4], "lower_lr_kvs": {}}, True),  # evaluation does not see them
        ({"strides": [8, 4, 2, 2]}, False),
        ({"offset_range_factor": [-1, -1, 2, -1]}, False),
        ({"use_pes": [True, True, True, False]}, None),
        ({"nat_ksizes": [7, 5, 7, 7]}, None),
        ({"layer_scale_values": [-1, 1.0, -1, -1]}, None),
        ({"use_lpus": [True, True, True, False]}, None),
        ({"use_conv_patches": False}, None),
    ],
)
def test_no_argument_is_overlooked(copy_of: Copy, changed: dict[str, Any], passes: bool | None) -> None:
    """With another value, other numbers come out, or other weights are needed (None)."""
    case = copy_of("dat/detection_backbone")
    change_args(case, **changed)
    (verdict,) = check([case])
    assert verdict.passed == bool(passes)
    assert bool(re.search("another network|without a counterpart", verdict.error)) == (passes is None)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("tiny_backbone", {"another": 1}, "there is no counterpart for another"),
        ("tiny_backbone", {"patch_size": 2}, "patch_size=2 has no counterpart; expected 4"),
        ("tiny_backbone", {"dims": [8, 16, 32, 48]}, r"dims=\[8, 16, 32, 48\] has no counterpart"),
        ("transformer_stage", {"another": 1}, "there is no counterpart for another"),
        ("transformer_stage", {"stage_spec": ["Q"] * 7}, "stage_spec has 'Q'"),
        ("transformer_stage", {"stage_spec": ["A"] * 7}, "stage_spec has 'A'"),
    ],
)
def test_what_has_no_counterpart_is_said(copy_of: Copy, name: str, changed: dict[str, Any], message: str) -> None:
    case = copy_of(f"dat/{name}")
    change_args(case, **changed)
    assert re.search(message, judged(case))


def test_training_with_drops_cannot_be_compared(copy_of: Copy) -> None:
    case = copy_of("dat/transformer_stage")
    info = json.loads((case / "case.json").read_text()) | {"mode": "train"}
    (case / "case.json").write_text(json.dumps(info))
    (verdict,) = check([case])
    assert verdict.passed
    change_args(case, drop_path_rate=[0.1] * 7)
    assert re.search(r"drop_path_rate=\[0\.1.*cannot be compared", judged(case))


def test_tables_are_the_loaded_ones_even_without_a_change_of_size(copy_of: Copy) -> None:
    """A checkpoint of the size of the model is loaded as it is: the stored tables are then others."""
    case = copy_of(f"dat/{RESIZED}")
    info = json.loads((case / "case.json").read_text())
    change_args(case, img_size=96, window_sizes=info["args_of_the_checkpoint"]["window_sizes"])
    (verdict,) = check([case])
    assert not verdict.error and len(verdict.failed) == 9 and torch.inf == verdict.worst[0]
