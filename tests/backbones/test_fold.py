from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import FrozenBatchNorm2d

from detfamily.backbones.fold import conv_norm
from detfamily.backbones.resnet import ResNet


def randomised(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, low in (("weight", 0.5), ("bias", -1), ("running_mean", -1), ("running_var", 0.5)):
            tensor = getattr(norm, name, None)
            if tensor is not None:
                tensor.uniform_(low, 1.5)
    return norm


def resnet(
    name: str = "resnet18", norm: Callable[[int], nn.Module] = FrozenBatchNorm2d, frozen_stages: int = 0
) -> ResNet:
    torch.manual_seed(0)
    backbone = ResNet(name, [3, 4, 5], norm, frozen_stages, weights=None)  # type: ignore[arg-type]
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            randomised(module)
    return backbone


def gradients(module: nn.Module, maps: list[Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    torch.stack([one.square().mean() for one in maps]).sum().backward()
    return {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}


@pytest.mark.parametrize(
    "norm",
    [
        FrozenBatchNorm2d,
        nn.BatchNorm2d,
        partial(nn.BatchNorm2d, track_running_stats=False),
        partial(nn.BatchNorm2d, affine=False),
        partial(nn.GroupNorm, 2),
    ],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}])
def test_is_the_norm_of_the_convolution(
    norm: Callable[[int], nn.Module], training: bool, settings: dict[str, int]
) -> None:
    conv, layer = nn.Conv2d(4, 6, 3, **{"bias": False, **settings}).double(), norm(6).double().train(training)
    randomised(layer)
    other = deepcopy(layer)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    ours, expected = (x.clone().requires_grad_() for _ in range(2))
    a, b = conv_norm(conv, layer, ours), other(conv(expected))
    torch.testing.assert_close(a, b)
    inputs = [[ours, *conv.parameters(), *layer.parameters()], [expected, *conv.parameters(), *other.parameters()]]
    for one, two in zip(
        torch.autograd.grad(a.square().sum(), inputs[0]), torch.autograd.grad(b.square().sum(), inputs[1]), strict=True
    ):
        torch.testing.assert_close(one, two)
    for name, buffer in layer.named_buffers():  # running statistics move as they would
        torch.testing.assert_close(buffer, other.get_buffer(name))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
def test_maps_and_gradients_are_those_of_torchvision(
    name: str, norm: Callable[[int], nn.Module], training: bool
) -> None:
    backbone = resnet(name, norm).double().train(training)
    theirs = deepcopy(backbone.body)
    pixels = torch.randn(2, 3, 65, 50, dtype=torch.float64)
    ours = backbone(pixels)
    x = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(pixels)))))
    expected = [x := stage(x) for stage in (theirs.layer2, theirs.layer3, theirs.layer4)]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    wanted = gradients(theirs, expected)
    found = gradients(backbone, ours)
    assert {f"body.{key}" for key in wanted} == set(found)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[f"body.{key}"], gradient)


def test_channels_last_stays_and_changes_nothing() -> None:
    backbone = resnet().double()
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for a, b in zip(backbone(pixels), backbone(pixels.contiguous(memory_format=torch.channels_last)), strict=True):
        assert b.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, b)


def test_names_in_the_state_dict_are_those_of_torchvision() -> None:
    theirs = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d).state_dict()
    assert {f"body.{name}" for name in theirs if not name.startswith("fc.")} == set(resnet().state_dict())


@torch.no_grad()
def test_nothing_is_remembered_of_weights_that_were_replaced() -> None:
    backbone, other = resnet().eval(), resnet().eval()
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.mul_(1.1)
    pixels = torch.randn(1, 3, 64, 64)
    before, expected = backbone(pixels)[-1], other(pixels)[-1]
    copy = deepcopy(backbone)
    copy.load_state_dict(other.state_dict())
    torch.testing.assert_close(copy(pixels)[-1], expected, rtol=0, atol=0)
    torch.testing.assert_close(backbone(pixels)[-1], before, rtol=0, atol=0)


def test_runs_in_16_bits_under_autocast() -> None:
    backbone = resnet(frozen_stages=2).train()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(pixels)
    found, expected = gradients(backbone, maps), backbone(pixels)
    for one, exact in zip(maps, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - exact).norm() < 0.03 * exact.norm()
    exact_gradients = gradients(backbone, expected)
    assert set(found) == set(exact_gradients)
    assert all(one.dtype == torch.float32 and one.isfinite().all() for one in found.values())


@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(training: bool) -> None:
    backbone = resnet(frozen_stages=2).train(training)
    pixels = torch.randn(2, 3, 64, 64)
    maps, compiled = backbone(pixels), torch.compile(backbone, backend="aot_eager", fullgraph=True)(pixels)
    for a, b in zip(maps, compiled, strict=True):
        torch.testing.assert_close(a, b)
    expected, found = gradients(backbone, maps), gradients(backbone, compiled)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_trains_wrapped_for_several_processes() -> None:
    backbone = resnet(frozen_stages=2).train()
    pixels = torch.randn(2, 3, 64, 64)
    expected = gradients(backbone, backbone(pixels))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    try:
        wrapped = DistributedDataParallel(backbone)
        found = gradients(backbone, wrapped(pixels))
    finally:
        dist.destroy_process_group()
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
