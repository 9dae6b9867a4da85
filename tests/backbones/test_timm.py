from __future__ import annotations

import sys

import pytest
import torch

from detfamily.backbones.timm import TimmBackbone
from detfamily.errors import CheckpointError, ConfigError

timm = pytest.importorskip("timm", reason="backbone=timm is an extra")


@pytest.mark.parametrize("stages", [[3, 5], [2, 3, 4], [5]])
@pytest.mark.parametrize("name", ["test_convnext", "resnet10t"])
def test_maps_have_the_stride_of_their_stage(name: str, stages: list[int]) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(name, stages, pretrained=False).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    assert [one.shape[1] for one in maps] == backbone.channels
    assert [tuple(one.shape[-2:]) for one in maps] == [(64 // 2**stage, 96 // 2**stage) for stage in stages]


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="timm has no such model; did you mean.*'convnext_tiny'"):
        TimmBackbone("convnext_tinny", [5], pretrained=False)


def test_a_stage_that_the_model_has_not() -> None:
    with pytest.raises(ValueError, match=r"model\.stages=\[1, 5\]: expected ascending stages out of \[2, 3, 4, 5\]"):
        TimmBackbone("test_convnext", [1, 5], pretrained=False)


def test_without_timm_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'detfamily\[timm\]'"):
        TimmBackbone("test_convnext", [5])


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("no pretrained weights exist")])
def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **settings: object) -> torch.nn.Module:
        if pretrained:
            raise error
        model: torch.nn.Module = create(name, pretrained=False, **settings)
        return model

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"weights of test_convnext .*backbone\.pretrained=false"):
        TimmBackbone("test_convnext", [5], pretrained=True)
