from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from detfamily.ops import ms_deform_attn
from detfamily.structures import Size

ODD_SHAPES = ((5, 7), (3, 1), (1, 1))


def bilinear(grid: Tensor, x: float, y: float) -> Tensor:
    """The value of a map (h, w, D) at a place in pixels, counted from the centre of the first one."""
    h, w, width = grid.shape
    total = torch.zeros(width, dtype=grid.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < h and 0 <= column < w:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * grid[row, column]
    return total


def naive(value: Tensor, shapes: tuple[Size, ...], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    output = torch.zeros(batch, queries, heads, width, dtype=value.dtype)
    starts = [0, *itertools.accumulate(h * w for h, w in shapes)]
    for b, q, m, level, p in itertools.product(*(range(n) for n in (batch, queries, heads, len(shapes), points))):
        h, w = shapes[level]
        grid = value[b, starts[level] : starts[level + 1], m].view(h, w, width)
        x, y = locations[b, q, m, level, p].tolist()
        output[b, q, m] += weights[b, q, m, level, p] * bilinear(grid, x * w - 0.5, y * h - 0.5)
    return output.flatten(2)


def random_inputs(shapes: tuple[Size, ...], seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    value = torch.randn(2, sum(h * w for h, w in shapes), 2, 3, dtype=torch.float64)
    locations = 0.5 + spread * (torch.rand(2, 5, 2, len(shapes), 3, 2, dtype=torch.float64) - 0.5)
    weights = torch.randn(2, 5, 2, len(shapes), 3, dtype=torch.float64)
    return value, locations, weights


@pytest.mark.parametrize("spread", [1.0, 3.0], ids=["inside", "two thirds outside"])
@pytest.mark.parametrize("shapes", [ODD_SHAPES, ((4, 6),), ((2, 2), (9, 3))])
def test_random_places_as_a_naive_loop(shapes: tuple[Size, ...], spread: float) -> None:
    value, locations, weights = random_inputs(shapes, spread=spread)
    torch.testing.assert_close(
        ms_deform_attn(value, shapes, locations, weights), naive(value, shapes, locations, weights), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(5, 7), (4, 8), (1, 3)])
def test_exact_borders_and_centres_as_a_naive_loop(shape: Size) -> None:
    h, w = shape
    # the places where the rule changes: the borders, half a cell outside (weight 0 from there on), and all centres
    xs = [0.0, 1.0, -0.5 / w, 1 + 0.5 / w, -1.0, 2.0, *((i + 0.5) / w for i in range(w))]
    ys = [0.0, 1.0, -0.5 / h, 1 + 0.5 / h, -1.0, 2.0, *((i + 0.5) / h for i in range(h))]
    places = torch.tensor(list(itertools.product(xs, ys)), dtype=torch.float64)
    locations = places[None, :, None, None, None]
    value = torch.randn(1, h * w, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(1, len(places), 1, 1, 1, dtype=torch.float64)
    output = ms_deform_attn(value, (shape,), locations, weights)
    torch.testing.assert_close(output, naive(value, (shape,), locations, weights), rtol=0, atol=1e-12)


def test_gradients_against_finite_differences() -> None:
    value, locations, weights = random_inputs(ODD_SHAPES, seed=3, spread=1.6)
    # away from whole pixels, where the function has a kink
    for level, (h, w) in enumerate(ODD_SHAPES):
        pixels = locations[..., level, :, :] * torch.tensor([w, h]) - 0.5
        near = (pixels - pixels.round()).abs() < 0.02
        locations[..., level, :, :] += near * 0.05 / torch.tensor([w, h])
    inputs = [one.requires_grad_() for one in (value[:1, :, :, :2], locations[:1, :2], weights[:1, :2])]
    assert torch.autograd.gradcheck(lambda v, p, a: ms_deform_attn(v, ODD_SHAPES, p, a), inputs)


def test_sixteen_bit_values_are_sampled_where_they_were_asked_for() -> None:
    """A place in bfloat16 would be off by up to a cell and a half in a map of this width."""
    torch.manual_seed(0)
    shape = (1, 400)
    value = torch.randn(1, 400, 1, 8).bfloat16()
    locations = torch.rand(1, 300, 1, 1, 1, 2) * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, 0.5])
    weights = torch.ones(1, 300, 1, 1, 1).bfloat16()
    output = ms_deform_attn(value, (shape,), locations, weights)
    assert output.dtype == torch.bfloat16
    expected = naive(value.double(), (shape,), locations.double(), weights.double())
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-2)


def test_official_core_in_float64(goldens: Path) -> None:
    """Outputs and gradients of the official implementation, odd widths, borders and far points included."""
    io = load_file(goldens / "ms_deform_attn" / "core_float64" / "io.safetensors")
    sizes = sorted({match[1] for key in io if (match := re.match(r"(\w+)\.value$", key))})
    assert len(sizes) > 5
    for size in sizes:
        case = {key.removeprefix(f"{size}."): tensor for key, tensor in io.items() if key.startswith(f"{size}.")}
        shapes = tuple((int(h), int(w)) for h, w in case["spatial_shapes"].tolist())
        inputs = [case[k].requires_grad_() for k in ("value", "sampling_locations", "attention_weights")]
        output = ms_deform_attn(inputs[0], shapes, inputs[1], inputs[2])
        torch.testing.assert_close(output, case["output"], rtol=0, atol=1e-9, msg=lambda text, s=size: f"{s}: {text}")
        gradients = torch.autograd.grad(output, inputs, case["grad_output"])
        for name, gradient in zip(("value", "sampling_locations", "attention_weights"), gradients, strict=True):
            expected = case[f"grad_{name}"]
            wrong = (gradient - expected).abs() > 1e-8 * expected.abs().max() + 1e-12
            if name == "sampling_locations" and "disagree" in case:
                wrong &= ~case["disagree"]  # at whole pixels two one-sided derivatives are both right
            assert not wrong.any(), f"{size}: {int(wrong.sum())} of grad_{name}"
