"""A model that is made anew starts where the official one starts: full-size models of the official builders."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from detfamily.checkpoints import adapter_for
from detfamily.detector import Detector

STORED = {
    "deformable_detr/base/official_r50_init.json": "deformable_detr",
    "deformable_detr/base/official_r50_refine_init.json": "deformable_detr",
    "deformable_detr/two_stage/official_r50_init.json": "deformable_detr",
    "dab_deformable_detr/base/official_r50_init.json": "dab_deformable_detr",
    "dn_dab_detr/base/official_r50_init.json": "dn_detr",
}
DRAWN = {"transformer.decoder.ref_anchor_head.layers.1.bias": 1 / math.sqrt(256)}
"""Stored in full for its shortness, and drawn: uniform up to this bound, as PyTorch starts biases."""


@pytest.mark.parametrize("name", STORED)
def test_names_freezing_and_initial_values(
    stored_json: Callable[[str], dict[str, Any]], official_detector: Callable[..., Detector], name: str
) -> None:
    stored, family = stored_json(name), STORED[name]
    torch.manual_seed(0)
    detector = official_detector(family, stored["args"], stored["num_classes"], meta_backbone=True)
    adapter = adapter_for(family, detector)
    state = adapter.to_official(detector.state_dict())
    parameters = adapter.to_official(dict(detector.named_parameters()))
    assert set(state) == set(stored["tensors"]) and len(state) == stored["number_of_keys"]
    assert set(adapter.to_ours(state)) == set(detector.state_dict())
    wrong = []
    for key, wanted in stored["tensors"].items():
        value = state[key]
        assert list(value.shape) == wanted["shape"] and str(value.dtype) == f"torch.{wanted['dtype']}", key
        assert (key in parameters) == (wanted["kind"] == "parameter"), key
        if key in parameters:
            assert parameters[key].requires_grad != wanted.get("frozen", False), key
        if "same_tensor_as" in wanted:
            assert torch.equal(value, state[wanted["same_tensor_as"]]), key
        elif key in DRAWN:
            assert all(0 < max(map(abs, one)) <= DRAWN[key] for one in (value.tolist(), wanted["init"]["values"])), key
        elif "init" in wanted and (problem := difference(value, wanted["init"])):
            wrong.append(f"{key}: {problem}")
    assert not wrong, "\n".join(wrong)
    count = [p.numel() for p in detector.parameters()]
    trainable = [p.numel() for p in detector.parameters() if p.requires_grad]
    assert sum(count) == stored["number_of_parameters"]
    assert sum(trainable) == stored["number_of_trainable_parameters"]


def difference(value: torch.Tensor, init: dict[str, Any]) -> str:
    """What is beyond the sampling error of two random draws of one distribution; stored figures have three digits."""
    if "constant" in init:
        least, most = (float(one) for one in value.aminmax())
        exact = [pytest.approx(init["constant"], rel=1e-5, abs=0)] * 2
        return "" if [least, most] == exact else f"{least} to {most}, officially {init['constant']}"
    if "values" in init:
        return "" if value.tolist() == init["values"] else f"{value.tolist()}, officially {init['values']}"
    count, std = value.numel(), init["std"]
    ours = {"mean": float(value.mean()), "std": float(value.std()), "absmax": float(value.abs().max())}
    uniform = init["absmax"] < 2 * std
    # a uniform draw's largest value lies within a few 1 / count of the bound; a normal draw's wanders
    spread = 12 / count if uniform else 0.5
    limits = {
        "mean": 6 * std / math.sqrt(count / 2) + 1e-6,
        "std": std * (5 / math.sqrt(count) + 0.01),
        "absmax": init["absmax"] * (spread + 0.005),
    }
    bad = [
        f"{k} {ours[k]:.4g}, officially {init[k]:.4g} (± {limits[k]:.2g})"
        for k in ours
        if abs(ours[k] - init[k]) > limits[k]
    ]
    return ", ".join(bad)
