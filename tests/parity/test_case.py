from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detfamily.errors import DataError
from detfamily.parity.case import Case, find_cases, role_of

Copy = Callable[..., Path]


def test_a_case_a_family_or_a_folder_of_families(copy_of: Copy, tmp_path: Path) -> None:
    one, other, third = copy_of("detr/postnorm"), copy_of("detr/empty_image"), copy_of("coco_eval/basic")
    assert find_cases(one) == [one]
    assert find_cases(one.parent) == [other, one]
    assert find_cases(tmp_path) == [third, other, one]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no golden case"):
        find_cases(tmp_path / "nothing")


def test_what_a_case_knows_about_itself(goldens: Path) -> None:
    case = Case.load(goldens / "detr" / "empty_image")
    assert (case.family, case.name, case.dtype) == ("detr", "detr/empty_image", torch.float32)
    assert case.sub_cases() == ["", "all_empty.", "many."]
    assert Case.load(goldens / "coco_eval" / "basic").io == {}


def test_the_nearest_roles_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tmp_path / "family" / "case"
    case.mkdir(parents=True)
    usual = tmp_path / "usual"
    usual.mkdir()
    monkeypatch.setattr("detfamily.parity.case.usual_folders", lambda: [usual])
    with pytest.raises(DataError, match="no roles.json at or above"):
        role_of("a.b", case / "deeper")
    (usual / "roles.json").write_text(json.dumps({"rules": [["", "info"]]}))
    assert role_of("a.b", case / "elsewhere") == "info"
    (tmp_path / "roles.json").write_text(json.dumps({"rules": [["^a", "output"], ["b", "input"]]}))
    assert [role_of(key, case) for key in ("a.b", "b.a")] == ["output", "input"]
    with pytest.raises(DataError, match="no rule for 'c'"):
        role_of("c", case)


def hashed(index: int, k: int) -> float:
    """The formula in Python's own integers: a number in (-1, 1) from an index."""
    word = 2**32 - 1
    x = (index + k * 0x9E3779B9) & word
    x ^= x >> 16
    x = (x * 0x7FEB352D) & word
    x ^= x >> 15
    x = (x * 0x846CA68B) & word
    x ^= x >> 16
    return x / 2**31 - 1


def test_weights_from_a_formula(tmp_path: Path) -> None:
    (tmp_path / "case.json").write_text("{}")
    tensors = {
        "a": {"shape": [3, 2], "k": 5, "offset": 1.0, "scale": 0.25},
        "b": {"shape": [4], "k": 70000, "offset": [0.0, 1.0, 2.0, 3.0], "scale": 2.0},
    }
    (tmp_path / "weights_formula.json").write_text(json.dumps({"tensors": tensors}))
    weights = Case.load(tmp_path).weights
    expected = torch.tensor([1 + 0.25 * hashed(i, 5) for i in range(6)]).view(3, 2)
    torch.testing.assert_close(weights["a"], expected, rtol=0, atol=1e-7)
    expected = torch.tensor([i + 2 * hashed(i, 70000) for i in range(4)])
    torch.testing.assert_close(weights["b"], expected, rtol=0, atol=1e-6)
