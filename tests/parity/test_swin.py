"""The golden case of Swin, beyond what the check needs."""

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
from detfamily.parity.families import swin

Copy = Callable[..., Path]
CASE = "swin/tiny_public"


def change_args(case: Path, **changed: Any) -> None:
    info = json.loads((case / "case.json").read_text())
    info["args"] |= changed
    (case / "case.json").write_text(json.dumps(info))


def test_what_lies_between_the_blocks_is_the_same_too(goldens: Path) -> None:
    case = Case.load(goldens / CASE)
    ours = swin.results(case)
    stored = {key: value for key, value in case.io.items() if key.startswith("mid.")}
    assert len(stored) == 8
    for key, value in stored.items():
        assert error_ratio("output", value, ours[key], key) < 0.5, key


def test_every_single_number_counts(copy_of: Copy) -> None:
    case = copy_of(CASE)
    tensors = load_file(case / "io.safetensors")
    changed = set()
    for key, value in tensors.items():
        if role_of(key, case) in MUST_COMPARE:
            changed.add(key)
            flat, middle = value.view(-1), value.numel() // 2
            flat[middle] = ~flat[middle] if value.dtype == torch.bool else flat[middle] + 0.01 * (1 + flat.abs().max())
    save_file(tensors, case / "io.safetensors")
    (verdict,) = check([case])
    assert len(changed) > 200 and set(verdict.failed) == changed and not verdict.error


def test_maps_may_be_named_in_their_order(copy_of: Copy) -> None:
    """Detectors count the maps that they take, and not the stages."""
    case = copy_of(CASE)
    tensors = load_file(case / "io.safetensors")
    kept = {key: value for key, value in tensors.items() if key in ("image", "mask")}
    for index, stage in enumerate((1, 3)):
        for name in ("probe", "out", "out.mask"):
            kept[f"{name}.{index}"] = tensors[f"{name}.{stage}"]
    save_file(kept, case / "io.safetensors")
    change_args(case, out_indices=[1, 3])
    weights = load_file(case / "weights.safetensors")
    save_file({k: v for k, v in weights.items() if k[:6] not in ("norm0.", "norm2.")}, case / "weights.safetensors")
    (verdict,) = check([case])
    assert verdict.passed and verdict.compared == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ape": True}, "ape=True has no counterpart, only False has"),
        ({"patch_size": 2}, "patch_size=2 has no counterpart, only 4 has"),
        ({"qk_scale": 0.5}, "qk_scale=0.5 has no counterpart"),
        ({"another": 1}, "there is no counterpart for another"),
        ({"depths": [2, 2, 3, 2]}, r"Missing key.*stages\.2\.blocks\.2"),
    ],
)
def test_what_has_no_counterpart_is_said(copy_of: Copy, changed: dict[str, Any], message: str) -> None:
    case = copy_of(CASE)
    change_args(case, **changed)
    (verdict,) = check([case])
    assert not verdict.passed and re.search(message, verdict.error)
