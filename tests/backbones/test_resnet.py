from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from detfamily.backbones.resnet import ResNet
from detfamily.errors import CheckpointError


def resnet(name: str = "resnet18", **settings: object) -> ResNet:
    given = {"stages": [2, 3, 4, 5], "norm": FrozenBatchNorm2d, "frozen_stages": 2, "weights": None, **settings}
    return ResNet(name, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "stages", "dilation", "channels", "strides"),
    [
        ("resnet18", [2, 3, 4, 5], False, [64, 128, 256, 512], [4, 8, 16, 32]),
        ("resnet34", [5], False, [512], [32]),
        ("resnet50", [3, 5], False, [512, 2048], [8, 32]),
        ("resnet50", [3, 4, 5], True, [512, 1024, 2048], [8, 16, 16]),
        ("resnet101", [4], False, [1024], [16]),
        ("resnext101_64x4d", [2, 5], True, [256, 2048], [4, 16]),
    ],
)
def test_channels_and_strides(
    name: str, stages: list[int], dilation: bool, channels: list[int], strides: list[int]
) -> None:
    with torch.device("meta"):
        backbone = resnet(name, stages=stages, dilation=dilation)
        maps = backbone(torch.zeros(2, 3, 128, 96))
    assert backbone.channels == channels
    assert [tuple(one.shape) for one in maps] == [
        (2, c, 128 // stride, 96 // stride) for c, stride in zip(channels, strides, strict=True)
    ]


def test_maps_are_those_of_torchvision() -> None:
    torch.manual_seed(0)
    backbone = resnet(norm=nn.BatchNorm2d).eval()
    theirs = torchvision.models.resnet18().eval()
    theirs.load_state_dict(backbone.body.state_dict(), strict=False)
    wanted = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
    reference = torchvision.models._utils.IntermediateLayerGetter(theirs, wanted)
    pixels = torch.randn(1, 3, 65, 50)
    with torch.no_grad():
        for ours, expected in zip(backbone(pixels), reference(pixels).values(), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("frozen_stages", range(6))
def test_frozen_stages(frozen_stages: int) -> None:
    backbone = resnet(norm=nn.BatchNorm2d, frozen_stages=frozen_stages)
    stage_of = {"conv1": 1, "bn1": 1, "layer1": 2, "layer2": 3, "layer3": 4, "layer4": 5}
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (stage_of[name.split(".")[1]] > frozen_stages), name


def test_frozen_norms_have_no_parameters_and_do_not_move() -> None:
    backbone = resnet().train()
    assert not [name for name, _ in backbone.named_parameters() if ".bn" in name]
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    assert len(before) == 4 * 20
    backbone(torch.randn(2, 3, 64, 64))
    for name, buffer in backbone.named_buffers():
        assert torch.equal(buffer, before[name])


def test_weights_of_a_file_with_and_without_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.resnet18(num_classes=7).state_dict()  # not 1000: the classifier is not wanted anyway
    body = {k: v for k, v in state.items() if not k.startswith("fc.")}
    for name, content in {"whole": state, "body": body, "wrapped": {"model": state, "epoch": 3}}.items():
        torch.save(content, tmp_path / name)
        for norm in (FrozenBatchNorm2d, nn.BatchNorm2d):
            loaded = resnet(norm=norm, weights=str(tmp_path / name)).body.state_dict()
            for key, value in loaded.items():
                assert torch.equal(value, state[key]), key


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    wrong = {
        "prefixed": ({f"module.{name}": value for name, value in state.items()}, "are unknown .*module.conv1.weight"),
        "deeper": ({**state, "layer1.2.conv1.weight": state["conv1.weight"]}, "1 are unknown .*layer1.2"),
        "wider": ({**state, "conv1.weight": torch.zeros(8, 3, 7, 7)}, "is of another network"),
        "list": ([1, 2], "it holds no state dict"),
    }
    for name, (content, message) in wrong.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            resnet(weights=str(tmp_path / name))
    (tmp_path / "text").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be used: .* is cut off or damaged, or no file of PyTorch"):
        resnet(weights=str(tmp_path / "text"))
    with pytest.raises(CheckpointError, match="no such file; expected a path, 'imagenet' or null"):
        resnet(weights=str(tmp_path / "missing.pth"))


@pytest.mark.parametrize("error", [OSError("no route"), URLError("no route"), RuntimeError("invalid hash value")])
def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    with pytest.raises(CheckpointError, match=r"weights of resnet18 .*backbone\.weights=PATH.*backbone\.weights=null"):
        resnet(weights="imagenet")


def test_downloaded_weights_are_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torchvision.models.resnet18().state_dict()
    urls = []

    def give(url: str, **_: object) -> dict[str, torch.Tensor]:
        urls.append(url)
        return state

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", give)
    backbone = resnet(weights="imagenet")
    assert urls == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url]
    assert torch.equal(backbone.body.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": []}, "expected ascending stages out of"),
        ({"stages": [5, 4]}, "expected ascending stages"),
        ({"stages": [4, 4]}, "expected ascending stages"),
        ({"stages": [1, 5]}, r"out of \[2, 3, 4, 5\]"),
        ({"frozen_stages": 6}, "frozen_stages=6: expected 0"),
        ({"frozen_stages": -1}, "frozen_stages=-1"),
        ({"dilation": True}, "needs bottlenecks, which resnet18 has not"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resnet(**settings)
