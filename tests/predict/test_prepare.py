from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from detfamily.build import build_detector, build_postprocess
from detfamily.detector import Detector
from detfamily.engine.checkpoint import load_model, load_weights
from detfamily.engine.evaluate import on_top_of
from detfamily.predict.prepare import Preparation, prepare
from detfamily.structures import Images


def images() -> Images:
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 80:] = True
    return Images(pixels, padding, ((64, 96), (64, 80)), ((64, 96), (64, 80)), (1, 2))


def loaded(path: Path) -> tuple[Detector, Any]:
    stored = load_model(path)
    cfg = on_top_of(stored.config, [])
    detector = build_detector(cfg, 3, pretrained=False)
    load_weights(detector, stored.weights, path)
    return detector.eval(), build_postprocess(cfg)


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        ("detr", [], Preparation(13, 0, 0, 0, 0)),
        ("deformable_detr", [], Preparation(13, 0, 0, 0, 0)),
        ("refinement", [], Preparation(13, 0, 0, 2, 0)),
        ("two_stages", [], Preparation(13, 0, 0, 2, 0)),
        ("two_stages", ["postprocess.layer=1"], Preparation(13, 0, 1, 2, 1)),
        ("detr", ["postprocess.layer=-3"], Preparation(13, 0, 2, 0, 0)),
    ],
)
@torch.no_grad()
def test_detectors_answer_as_before(
    checkpoints: Callable[..., Path], family: str, overrides: list[str], expected: Preparation
) -> None:
    detector, postprocess = loaded(checkpoints(family, *overrides))
    whole = detector(images())["match"]
    layer = postprocess.layer
    before = len(list(detector.parameters()))
    assert prepare(detector, layer) == expected
    assert len(list(detector.parameters())) <= before
    found = detector(images())["match"]
    assert found.logits.shape == (1, *whole.logits.shape[1:])
    torch.testing.assert_close(found.logits[0], whole.logits[layer], rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(found.boxes[0], whole.boxes[layer], rtol=1e-3, atol=2e-4)
    assert whole.logits[layer].std() > 0.1 and whole.boxes[layer].std() > 0.05  # it does say something


@torch.no_grad()
def test_heads_of_each_layer_without_refinement(checkpoints: Callable[..., Path]) -> None:
    detector, _ = loaded(checkpoints("deformable_detr", "heads.shared=false"))
    whole = deepcopy(detector)(images())["match"]
    assert prepare(detector, -1) == Preparation(13, 0, 0, 2, 2)
    torch.testing.assert_close(detector(images())["match"].boxes[0], whole.boxes[-1], rtol=1e-3, atol=2e-4)


def test_words() -> None:
    assert Preparation(53, 0, 0, 5, 0).describe() == "53 batch norms folded; dropped: 5 class heads"
    assert Preparation(0, 2, 1, 1, 0).describe() == (
        "2 batch norms left as they are; dropped: 1 decoder layer, 1 class head"
    )
    assert Preparation(0, 0, 0, 0, 0).describe() == "nothing to fold or to drop"


def test_nothing_is_trained_any_more(checkpoints: Callable[..., Path]) -> None:
    detector, _ = loaded(checkpoints("refinement"))
    prepare(detector, -1)
    assert not any(one.requires_grad for one in detector.parameters()) and not detector.training
