"""Golden cases of what DAT's blocks are made of, beyond what the check needs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from detfamily.checkpoints.adapter import Adapter
from detfamily.parity import dat_modules
from detfamily.parity.case import MUST_COMPARE, Case, role_of
from detfamily.parity.check import check

Copy = Callable[..., Path]
DEFORMABLE = "dat/deformable_attention"
OF_MODULES = [
    *("deformable_attention", "deformable_attention_2022", "deformable_attention_dwc_pe"),
    *("deformable_attention_fixed_pe", "deformable_attention_log_cpb", "deformable_attention_no_off"),
    *("deformable_attention_no_pe", "deformable_attention_range", "local_attention", "shift_window_attention"),
    *("pyramid_attention", "pyramid_attention_sr1", "qna", "qna_sigmoid", "slide_attention"),
    *("neighborhood_attention", "neighborhood_attention_k3"),
    *("transformer_mlp", "transformer_mlp_with_conv", "transformer_mlp_with_conv_cmt"),
]


def change(case: Path, **args: Any) -> None:
    info = json.loads((case / "case.json").read_text())
    info["args"] |= args
    (case / "case.json").write_text(json.dumps(info))


@pytest.mark.parametrize("name", OF_MODULES)
def test_modules(goldens: Path, name: str) -> None:
    (verdict,) = check([goldens / "dat" / name])
    assert verdict.passed and not verdict.in_double, verdict
    assert verdict.worst[0] < 0.3


@pytest.mark.parametrize("name", OF_MODULES)
def test_weights_there_and_back(goldens: Path, name: str) -> None:
    """Everything comes back but what nobody needs."""
    case = Case.load(goldens / "dat" / name)
    kind = dat_modules.kind_of(case.info["module"], case.info["args"])
    adapter = Adapter(kind.rules("stages.{n}.", "x.{n}."), kind.ignored)
    weights = {f"x.3.{name}": value for name, value in case.weights.items()}
    back = adapter.to_official(adapter.to_ours(weights), computed=True)
    assert all(back[name].equal(weights[name]) for name in back)
    assert {name for name in set(weights) - set(back) if not re.search("conv_offset|attn_mask", name)} == set()


def test_every_single_number_counts(copy_of: Copy) -> None:
    case = copy_of(DEFORMABLE)
    tensors = load_file(case / "io.safetensors")
    changed = {key for key in tensors if role_of(key, case) in MUST_COMPARE}
    for key in changed:
        flat = tensors[key].view(-1)
        flat[len(flat) // 2] += 0.01 * (1 + flat.abs().max())
    save_file(tensors, case / "io.safetensors")
    (verdict,) = check([case])
    assert len(changed) == 34 and set(verdict.failed) == changed and not verdict.error


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("deformable_attention", {"offset_range_factor": 3}),
        ("deformable_attention", {"n_groups": 2, "n_heads": 8, "n_head_channels": 4}),
        ("deformable_attention", {"stride": 3}),
        ("deformable_attention", {"use_pe": False}),
        ("deformable_attention", {"ksize": 3}),
        ("shift_window_attention", {"shift_size": 3}),
        ("slide_attention", {"num_heads": 2}),
        ("slide_attention", {"rpb": False}),
        ("qna", {"n_heads": 4}),
        ("qna", {"qna_activation": "sigmoid"}),
        ("pyramid_attention", {"num_heads": 8}),
    ],
)
def test_arguments_are_heeded(copy_of: Copy, name: str, changed: dict[str, Any]) -> None:
    case = copy_of(f"dat/{name}")
    change(case, **changed)
    (verdict,) = check([case])
    assert not verdict.passed and "counterpart" not in verdict.error


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("deformable_attention", {"another": 1}, "there is no counterpart for another"),
        ("deformable_attention_2022", {"no_off": True}, "no_off=True has no counterpart: the official code of 2022"),
        (
            "deformable_attention_2022",
            {"fixed_pe": True},
            "fixed_pe=True has no counterpart: the official code",
        ),
        ("slide_attention", {"share_qkv": True}, "share_qkv=True has no counterpart; expected False"),
        ("slide_attention", {"padding_mode": "circular"}, "padding_mode=circular has no counterpart; expected zeros"),
        ("qna", {"padding": 0}, "padding=0 has no counterpart; expected 1"),
        ("qna", {"stride": 2}, "stride=2 has no counterpart; expected 1"),
        ("qna", {"qna_activation": "sigmoyd"}, "qna_activation=sigmoyd has no counterpart; did you mean 'sigmoid'"),
    ],
)
def test_what_has_no_counterpart_is_said(copy_of: Copy, name: str, changed: dict[str, Any], message: str) -> None:
    case = copy_of(f"dat/{name}")
    change(case, **changed)
    (verdict,) = check([case])
    assert not verdict.passed and message in verdict.error


def test_modules_are_found_by_their_names_in_the_case(copy_of: Copy) -> None:
    case = copy_of("dat/qna")
    renamed = case.rename(case.parent / "some_other_name")
    (verdict,) = check([renamed])
    assert verdict.passed
    info = json.loads((renamed / "case.json").read_text())
    (renamed / "case.json").write_text(json.dumps(info | {"module": "models/qna.py:FusedQnA"}))
    (verdict,) = check([renamed])
    assert "models/qna.py:FusedQnA has no counterpart; did you mean 'FusedKQnA'" in verdict.error


def test_dropout_in_training_cannot_be_compared(copy_of: Copy) -> None:
    case = copy_of("dat/pyramid_attention")
    change(case, attn_drop=0.1)
    (verdict,) = check([case])
    assert verdict.passed
    info = json.loads((case / "case.json").read_text())
    (case / "case.json").write_text(json.dumps(info | {"mode": "train"}))
    (verdict,) = check([case])
    assert "attn_drop=0.1: what is dropped at random" in verdict.error
