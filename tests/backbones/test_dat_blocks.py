"""What DAT's blocks have besides attention, token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.backbones.dat_blocks import ConvFeedForward, LayerScale, LocalPerception, NormedConvFeedForward


def drawn(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def around(conv: nn.Conv2d, x: Tensor, y: int, column: int) -> Tensor:
    """A depth-wise 3 x 3 convolution of a map (h, w, C) at one token."""
    total = conv.bias
    for a in range(3):
        for b in range(3):
            if 0 <= y + a - 1 < x.shape[0] and 0 <= column + b - 1 < x.shape[1]:
                total = total + conv.weight[:, 0, a, b] * x[y + a - 1, column + b - 1]
    return total


def with_neighbours(conv: nn.Conv2d, x: Tensor) -> Tensor:
    rows = [torch.stack([x[y, c] + around(conv, x, y, c) for c in range(x.shape[1])]) for y in range(x.shape[0])]
    return torch.stack(rows)


@pytest.mark.parametrize("size", [(3, 4), (1, 1)])
def test_local_perception(size: tuple[int, int]) -> None:
    module = drawn(LocalPerception(6))
    x = torch.randn(2, *size, 6).double()
    expected = torch.stack([with_neighbours(module.depthwise, image) for image in x])
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def test_ffn_with_a_convolution() -> None:
    module = drawn(ConvFeedForward(6, 10))
    x = torch.randn(2, 3, 4, 6).double()
    hidden = torch.stack([with_neighbours(module.depthwise, module.linear1(image)) for image in x])
    torch.testing.assert_close(module(x), module.linear2(F.gelu(hidden)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_ffn_with_norms(training: bool) -> None:
    module = drawn(NormedConvFeedForward(6, 10)).train(training)
    x = torch.randn(2, 3, 4, 6).double()

    def norm(one: nn.BatchNorm2d, maps: Tensor) -> Tensor:
        tokens = maps.flatten(0, 2)
        mean, variance = tokens.mean(0), tokens.var(0, correction=0)
        if not training:  # those that it has seen: none yet
            mean, variance = torch.zeros_like(mean), torch.ones_like(variance)
        return (maps - mean) / (variance + 1e-5).sqrt() * one.weight + one.bias

    hidden = norm(module.norm1, F.gelu(module.linear1(x)))
    hidden = torch.stack([with_neighbours(module.depthwise, image) for image in hidden])
    expected = norm(module.norm3, module.linear2(norm(module.norm2, F.gelu(hidden))))
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", [ConvFeedForward, NormedConvFeedForward])
def test_dropout_in_training_alone(kind: type[nn.Module]) -> None:
    module = kind(16, 64, dropout=0.5).double()
    x = torch.randn(1, 5, 5, 16).double()
    outputs = module(x), module(x)
    assert not torch.allclose(*outputs) and 0.3 < float((outputs[0] == 0).double().mean()) < 0.7
    module.eval()
    assert torch.equal(module(x), module(x)) and not bool((module(x) == 0).any())


def test_a_factor_for_each_channel() -> None:
    module = LayerScale(3, 0.25)
    x = torch.randn(2, 2, 2, 3)
    assert torch.equal(module(x), 0.25 * x)
    with torch.no_grad():
        module.scale.copy_(torch.tensor([1.0, 0.0, -2.0]))
    assert torch.equal(module(x)[..., 2], -2 * x[..., 2]) and not bool(module(x)[..., 1].any())
