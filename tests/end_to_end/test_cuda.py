"""Whole detectors on a GPU: the same numbers as on the CPU, and training steps that a GPU can take. Needs a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from detfamily.build import build_detector
from detfamily.config import compose, groups_of
from detfamily.engine.runtime import Runtime
from detfamily.matrix.cell import OK, examine, make_batch
from detfamily.matrix.request import Cell, read_request
from detfamily.structures import Predictions

FAMILIES = groups_of("train")["family"]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def cell(family: str, *words: str) -> Cell:
    (one,) = read_request([f"families=[{family}]", "backbones=[small]", "size=[96,128]", "repeats=1", *words]).cells()
    return one


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gives_what_the_cpu_gives(family: str) -> None:
    """Predictions of all layers and gradients, in float32 without short products, relative to the largest of each."""
    Runtime(tf32=False).apply()
    torch.manual_seed(0)
    cfg = compose("train", cell(family, "attentions=[ms_deform]").overrides)
    here = build_detector(cfg, 80, pretrained=False).eval()
    there, batch = copy.deepcopy(here).cuda(), make_batch((96, 128), 2, 80)
    results = []
    for detector, images in ((here, batch.images), (there, batch.to("cuda").images)):
        said: Predictions = detector(images)["match"]
        (said.logits.square().mean() + said.boxes.square().mean()).backward()
        results.append([said.logits, said.boxes, *(one.grad for one in detector.parameters() if one.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for one, other in zip(*results, strict=True):
        error = (one - other.cpu()).norm() / one.norm().clamp(min=1e-6)
        assert error < 2e-3, f"{tuple(one.shape)}: {error:.1e}"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_steps(family: str, precision: str) -> None:
    """Losses and gradients are finite, and every parameter moves."""
    outcome = examine(cell(family, "attentions=[ms_deform]", "runtime.device=cuda", f"runtime.precision={precision}"))
    assert outcome.status == OK, f"{outcome.reason}\n{outcome.details}"
    assert outcome.figures is not None and outcome.figures.peak_bytes is not None


@pytest.mark.parametrize("attention", groups_of("train")["encoder_attention"])
def test_attentions(attention: str) -> None:
    outcome = examine(cell("deformable_detr", f"attentions=[{attention}]", "runtime=bf16"))
    assert outcome.status == OK, f"{outcome.reason}\n{outcome.details}"
