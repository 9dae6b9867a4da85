"""Every name of the full-size official checkpoints, there and back."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detfamily.build import build_detector
from detfamily.checkpoints import adapter_for
from detfamily.config import compose
from detfamily.detector import Detector
from detfamily.errors import CheckpointError
from detfamily.parity.case import Case
from detfamily.parity.detection import StoredFeatures

VARIANTS = [
    *(("detr", name) for name in ("detr-r50", "detr-r101", "detr-r50-dc5", "detr-r101-dc5")),
    *(
        ("deformable_detr", f"r50_deformable_detr{suffix}")
        for suffix in (
            "",
            "_plus_iterative_bbox_refinement",
            "_plus_iterative_bbox_refinement_plus_plus_two_stage",
            "_single_scale",
            "_single_scale_dc5",
        )
    ),
    *(("dab_detr", f"dab_detr_r50{suffix}") for suffix in ("", "_3pat", "_dc5")),
    *(("dab_deformable_detr", f"dab_deformable_detr_r50{suffix}") for suffix in ("", "_fixxy", "_two_stage")),
    *(("dino", name) for name in ("4scale_r50", "5scale_r50", "4scale_swin_L_384_22k")),
]
STORED = {
    "detr": "detr",
    "deformable_detr": "deformable_detr",
    "dab_detr": "dab_detr",
    "dab_deformable_detr": "dab_detr",
    "dino": "dino",
}
"""Family -> the golden family whose folder has its lists of names."""
CASES = {
    "conditional_detr": "conditional_detr",
    "dab_detr": "dab_detr",
    "dab_deformable_detr": "dab_deformable_detr",
    "dn_dab_detr": "dn_detr",
    "dn_dab_deformable_detr": "dn_deformable_detr",
    "dino": "dino",
    "h_deformable_detr": "h_deformable_detr",
}
"""Golden family -> ours, where names of weights are the list of names."""
COMPUTED = "relative_position_index"
"""Which windows' tables are read where: the same in all files of a size."""
Read = Callable[[str], dict[str, Any]]
Build = Callable[..., Detector]


def variant(stored_json: Read, family: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = stored_json(f"{STORED[family]}/checkpoint_keys.json")["variants"][name]
    return found


def stand_ins(found: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of the stored shapes and types without memory: each filled with a number of its own, copies with one."""
    alias = {name: group[0] for group in found["shared"] for name in group}
    number = {name: float(index) for index, (name, _, _) in enumerate(found["keys"])}
    return {
        name: torch.tensor(number[alias.get(name, name)], dtype=getattr(torch, dtype)).expand(shape)
        for name, shape, dtype in found["keys"]
    }


def test_no_variant_is_forgotten(stored_json: Read) -> None:
    for folder in set(STORED.values()):
        stored = stored_json(f"{folder}/checkpoint_keys.json")["variants"]
        assert {name for name in stored if "panoptic" not in name} == {v for f, v in VARIANTS if STORED[f] == folder}


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_all_names_there_and_back(stored_json: Read, official_detector: Build, family: str, name: str) -> None:
    found = variant(stored_json, family, name)
    official = stand_ins(found)
    assert len(official) == found["num_keys"]
    classes = next(value for key, value in official.items() if key.startswith("class_embed"))
    with torch.device("meta"):
        detector = official_detector(family, found["args"], len(classes))
    adapter = adapter_for(family, detector)
    ours, state = adapter.to_ours(official), detector.state_dict()
    assert set(ours) == set(state)
    for key, value in state.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
    back = adapter.to_official(ours, computed=True)
    assert set(back) == set(official)
    for key, value in back.items():
        assert (value.shape, value.dtype) == (official[key].shape, official[key].dtype), key
        if not key.endswith(COMPUTED):
            assert torch.equal(value.flatten()[:1], official[key].flatten()[:1]), key
    parameters = dict(detector.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == found["num_parameters"]
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == found["num_trainable_parameters"]


@pytest.mark.parametrize("folder", CASES)
def test_all_names_of_golden_weights_there_and_back(goldens: Path, folder: str) -> None:
    cases = [Case.load(path.parent) for path in sorted(goldens.glob(f"{folder}/*/weights.safetensors"))]
    for case in (case for case in cases if any(name.startswith("class_embed") for name in case.weights)):
        cfg = compose("train", import_module(f"detfamily.parity.families.{folder}").overrides(case))
        with torch.device("meta"):
            backbone = StoredFeatures([case.io[key] for key in sorted(case.io) if key.startswith("features.")])
            detector = build_detector(cfg, case.info["num_classes"], pretrained=False, backbone=backbone)
        adapter = adapter_for(CASES[folder], detector)
        ours = adapter.to_ours(case.weights)
        assert set(ours) == {name for name in detector.state_dict() if not name.startswith("backbone.")}, case.name
        back = adapter.to_official(ours)
        assert set(back) == set(case.weights)
        assert all(torch.equal(back[name], value) for name, value in case.weights.items())
    if not cases:
        pytest.skip(f"no golden case of {folder}")


def test_a_damaged_checkpoint_is_refused(stored_json: Read, official_detector: Build) -> None:
    found = variant(stored_json, "deformable_detr", VARIANTS[5][1])
    official = stand_ins(found)
    with torch.device("meta"):
        detector = official_detector("deformable_detr", found["args"], 91)
    adapter = adapter_for("deformable_detr", detector)
    copy = "transformer.decoder.bbox_embed.3.layers.1.bias"
    with pytest.raises(CheckpointError, match=r"bbox_embed\.3\.layers\.1\.bias should be a copy of .*box_heads\.3"):
        adapter.to_ours({**official, copy: official[copy] + 1})
    with pytest.raises(CheckpointError, match=r"without a counterpart: mask_head\.lay1\.weight$"):
        adapter.to_ours({**official, "mask_head.lay1.weight": torch.zeros(1)})
    # a head more than the decoder has layers is of the two-stage model
    with pytest.raises(CheckpointError, match=r"without a counterpart: class_embed\.6\.weight$"):
        adapter.to_ours({**official, "class_embed.6.weight": official["class_embed.5.weight"]})


def test_a_family_without_official_weights(official_detector: Build, stored_json: Read) -> None:
    with torch.device("meta"):
        detector = official_detector("detr", variant(stored_json, "detr", "detr-r50")["args"], 92)
    with pytest.raises(CheckpointError, match="for the family 'deformable-detr'; did you mean 'deformable_detr'"):
        adapter_for("deformable-detr", detector)
