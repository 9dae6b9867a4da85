from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from detfamily.blocks.query_scale import (
    BlockTransform,
    ElementwiseScale,
    LayerScale,
    OnlyContent,
    OnlyScale,
    ScalarScale,
)

WIDTH = 6
FROM_CONTENT = {
    "elementwise": lambda: ElementwiseScale(WIDTH),
    "scalar": lambda: ScalarScale(WIDTH),
    "block": lambda: BlockTransform(WIDTH, 2),
    "full": lambda: BlockTransform(WIDTH, 1),
    "only scale": lambda: OnlyScale(WIDTH),
    "only content": OnlyContent,
}


def content_and_code() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    content, code = torch.randn(2, 2, 3, WIDTH, dtype=torch.float64)
    return content, code


def built(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return FROM_CONTENT[kind]().double()


def said(ours: nn.Module, content: Tensor) -> list[float]:
    """The perceptron by hand: two matrices with a ReLU between."""
    state = ours.state_dict()
    hidden = [
        max(0.0, float(row @ content + b))
        for row, b in zip(state["mlp.layers.0.weight"], state["mlp.layers.0.bias"], strict=True)
    ]
    inner = torch.tensor(hidden, dtype=torch.float64)
    return [
        float(row @ inner + b) for row, b in zip(state["mlp.layers.1.weight"], state["mlp.layers.1.bias"], strict=True)
    ]


def naive(kind: str, ours: nn.Module, content: Tensor, code: Tensor) -> list[float]:
    """One query."""
    if kind == "only content":
        return content.tolist()
    numbers = said(ours, content)
    if kind == "only scale":
        return numbers
    if kind == "scalar":
        return [numbers[0] * float(x) for x in code]
    if kind == "elementwise":
        return [a * float(x) for a, x in zip(numbers, code, strict=True)]
    blocks = 2 if kind == "block" else 1
    side = WIDTH // blocks
    result = []
    for row in range(WIDTH):
        block = row // side
        start = row * side  # matrices one after another, row by row
        result.append(sum(numbers[start + j] * float(code[block * side + j]) for j in range(side)))
    return result


@pytest.mark.parametrize("kind", FROM_CONTENT)
@torch.no_grad()
def test_forms_as_a_naive_loop(kind: str) -> None:
    ours, (content, code) = built(kind), content_and_code()
    output = ours(2, content, code)
    assert output.shape == code.shape
    for image, n in itertools.product(range(2), range(3)):
        expected = torch.tensor(naive(kind, ours, content[image, n], code[image, n]), dtype=torch.float64)
        torch.testing.assert_close(output[image, n], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", FROM_CONTENT)
def test_the_first_layers_content_says_nothing(kind: str) -> None:
    content, code = content_and_code()
    assert built(kind)(0, content, code) is code


@pytest.mark.parametrize("kind", [kind for kind in FROM_CONTENT if kind != "only content"])
def test_every_parameter_learns(kind: str) -> None:
    ours, (content, code) = built(kind), content_and_code()
    ours(1, content, code).square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@torch.no_grad()
def test_blocks_of_one_channel_are_factors() -> None:
    blocks, factors = BlockTransform(WIDTH, WIDTH).double(), ElementwiseScale(WIDTH).double()
    factors.load_state_dict(blocks.state_dict())
    content, code = content_and_code()
    torch.testing.assert_close(blocks(1, content, code), factors(1, content, code))


@torch.no_grad()
def test_blocks_keep_heads_apart_and_a_full_matrix_does_not() -> None:
    content, code = content_and_code()
    changed = code.clone()
    changed[..., 3:] += 1
    for kind, apart in (("block", True), ("full", False)):
        ours = built(kind)
        before, after = ours(1, content, code), ours(1, content, changed)
        assert torch.equal(before[..., :3], after[..., :3]) == apart
        assert not torch.allclose(before[..., 3:], after[..., 3:])


def test_blocks_divide_the_width() -> None:
    for number in (0, -1, 4):
        with pytest.raises(ValueError, match=rf"query_scale\.num_blocks={number} does not divide embed_dim=6"):
            BlockTransform(WIDTH, number)


@torch.no_grad()
def test_layers_have_factors_of_their_own_whatever_the_content_is() -> None:
    ours, (content, code) = LayerScale(WIDTH, 3), content_and_code()
    assert ours.weight.shape == (3, WIDTH) and ours.weight.abs().max() <= (6 / (3 + WIDTH)) ** 0.5
    for layer in range(3):
        output = ours(layer, content, code)
        assert torch.equal(output, ours(layer, -content, code))
        for channel in range(WIDTH):
            factor = float(ours.weight[layer, channel])
            torch.testing.assert_close(output[..., channel], factor * code[..., channel], rtol=1e-6, atol=0)
