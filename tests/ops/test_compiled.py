"""Compiled backends against the reference in float64 on the CPU: the same tests for each device that is here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from detfamily.ops import backends, ms_deform_attn, ms_deform_attn_projected

Make = Callable[..., Any]
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def results(function: Callable[..., Tensor], shapes: object, leaves: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    output = function(leaves[0], shapes, *leaves[1:])
    return [output, *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if backends.backend_for(request.param) != request.param:
        pytest.skip(f"no compiled code here: {backends.describe(request.param)}")
    return str(request.param)


def compare(call: Any, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Output and all gradients of both forms; errors are relative to the largest number."""
    batch, queries = call.offsets.shape[:2]
    grad_output = torch.randn(
        batch, queries, call.value.shape[2] * call.value.shape[3], generator=torch.Generator().manual_seed(7)
    ).to(dtype)
    for function, form in ((ms_deform_attn, "plain"), (ms_deform_attn_projected, "projected")):
        inputs = getattr(call, form)(dtype)
        there = [leaf.detach().to(device).requires_grad_() for leaf in inputs]
        with backends.use_backend(device):
            actual = [result.cpu() for result in results(function, call.shapes, there, grad_output.to(device))]
        with backends.use_backend("reference"):
            exact = [leaf.detach().double().requires_grad_() for leaf in inputs]
            expected = results(function, call.shapes, exact, grad_output.double())
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert one.dtype == (inputs[max(index - 1, 0)].dtype) and one.is_contiguous()
            limit = tolerance * max(1.0, other.abs().max().item() if other.numel() else 0.0)
            assert one.shape == other.shape
            assert not other.numel() or (one.double() - other).abs().max().item() <= limit, f"{form}, result {index}"


@pytest.mark.parametrize("reference_dim", [2, 4])
@pytest.mark.parametrize("width", [1, 3, 8, 16, 30, 32, 64, 128, 1025])
def test_any_width_of_a_head(make_call: Make, device: str, width: int, reference_dim: int) -> None:
    compare(make_call(width=width, reference_dim=reference_dim), device, torch.float64, 1e-12)
    compare(make_call(width=width, reference_dim=reference_dim), device, torch.float32, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_rounded_once(make_call: Make, device: str, dtype: torch.dtype) -> None:
    compare(make_call(width=32, queries=40), device, dtype, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_projections_are_read_as_they_are(make_call: Make, device: str, dtype: torch.dtype) -> None:
    call = make_call(width=32)
    value, references, offsets, logits = call.projected(dtype, device)
    narrow = [leaf.detach().to(dtype).requires_grad_() for leaf in (offsets, logits)]
    output = ms_deform_attn_projected(value, call.shapes, references, *narrow)
    grads = torch.autograd.grad(output.float().square().sum(), narrow)
    assert [grad.dtype for grad in grads] == [dtype, dtype]
    wide = [leaf.detach().float().requires_grad_() for leaf in narrow]
    expected = ms_deform_attn_projected(value, call.shapes, references, *wide)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    for grad, wanted in zip(grads, torch.autograd.grad(expected.float().square().sum(), wide), strict=True):
        torch.testing.assert_close(grad, wanted.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("queries", [1, 63, 64, 65, 131])
@pytest.mark.parametrize("heads", [1, 8])
def test_number_of_queries(make_call: Make, device: str, queries: int, heads: int) -> None:
    """Around the blocks that threads take, and on both sides of the choice to lay heads side by side."""
    compare(make_call(queries=queries, heads=heads, width=4), device, torch.float64, 1e-12)


def test_nothing_to_do(make_call: Make, device: str) -> None:
    compare(make_call(queries=0), device, torch.float32, 0.0)
    compare(make_call(batch=0), device, torch.float32, 0.0)
    leaves = make_call(queries=0).projected(device=device)
    output = ms_deform_attn_projected(leaves[0], make_call().shapes, *leaves[1:])
    (grad,) = torch.autograd.grad(output.sum(), leaves[0])
    assert grad.shape == leaves[0].shape and not grad.any()


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    batch=st.integers(1, 3),
    queries=st.integers(1, 70),
    heads=st.integers(1, 4),
    width=st.integers(1, 40),
    points=st.integers(1, 9),
    reference_dim=st.sampled_from([2, 4]),
    seed=st.integers(0, 2**20),
)
@PROPERTY
def test_any_sizes(make_call: Make, device: str, **sizes: Any) -> None:
    compare(make_call(**sizes), device, torch.float64, 1e-10)


PLACES = st.one_of(
    st.floats(-0.5, 1.5),
    st.sampled_from([-1e30, -1e9, -1.0, 0.0, 0.5, 1.0, 2.0, 1e9, 1e30]),
    st.integers(-2, 20).map(lambda i: (i + 0.5) / 8),  # pixel centres, in the map and beside it
    st.integers(-2, 20).map(lambda i: i / 8),  # borders of pixels
)


@given(
    points=st.lists(st.tuples(PLACES, PLACES), min_size=1, max_size=12), shape=st.sampled_from([(8, 8), (1, 8), (5, 7)])
)
@PROPERTY
def test_any_place(device: str, points: list[tuple[float, float]], shape: tuple[int, int]) -> None:
    """Borders, centres and far away: output, value and weight gradients as the reference, everything finite."""
    locations = torch.tensor(points, dtype=torch.float64).view(1, 1, 1, 1, -1, 2)
    value = torch.randn(1, shape[0] * shape[1], 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.linspace(-1, 1, len(points), dtype=torch.float64).view(1, 1, 1, 1, -1)
    both = []
    for name in (device, "reference"):
        leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in (value, locations, weights)]
        with backends.use_backend(name):
            both.append(results(ms_deform_attn, (shape,), leaves, torch.ones(1, 1, 5, device=device)))
    for index in (0, 1, 3):  # at whole pixels the gradient of a place has two sides
        torch.testing.assert_close(both[0][index], both[1][index], rtol=0, atol=1e-11)
    assert all(tensor.isfinite().all() for tensor in both[0])
    single = [tensor.to(device, torch.float32).requires_grad_() for tensor in (value, locations, weights)]
    assert all(
        x.isfinite().all() for x in results(ms_deform_attn, (shape,), single, torch.ones(1, 1, 5, device=device))
    )


def test_what_is_not_sampled_is_not_read(device: str) -> None:
    """Padded tokens may hold anything; a sample beside the map reads nothing, and half outside only the inner half."""
    nan, inf = float("nan"), float("inf")
    value = torch.full((1, 16, 1, 32), nan)
    value.view(4, 4, 32)[1:3, 1:3] = 1.0
    places = torch.tensor([[0.5, 0.5], [0.4, 0.6], [-3.0, 0.5], [0.5, 1e20], [nan, 0.5], [inf, 0.5]], device=device)
    leaves = [tensor.to(device).requires_grad_() for tensor in (value, places.view(1, 1, 1, 1, 6, 2))]
    output = ms_deform_attn(leaves[0], ((4, 4),), leaves[1], torch.ones(1, 1, 1, 1, 6, device=device))
    torch.testing.assert_close(output.cpu(), torch.full((1, 1, 32), 2.0))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), leaves))
    value = torch.full((1, 16, 1, 32), nan, device=device)
    value[0, 0] = 1.0  # a tenth of a cell around the corner of the map, in both directions
    place = torch.full((1, 1, 1, 1, 1, 2), -0.1, device=device)
    output = ms_deform_attn(value, ((4, 4),), place, torch.ones(1, 1, 1, 1, 1, device=device))
    torch.testing.assert_close(output.cpu(), torch.full((1, 1, 32), 0.01))


def test_views_are_as_good_as_copies(make_call: Make, device: str) -> None:
    call = make_call()
    whole = call.projected(device=device)
    value, references, offsets, logits = (leaf.detach() for leaf in whole)
    views = [
        value.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([references, references], -1)[..., 0],
        offsets.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([logits, logits], -1)[..., : logits.shape[-1]],
    ]
    assert not any(view.is_contiguous() for view in views)
    grad_output = torch.randn(2, 24, 5, dtype=torch.float64).to(device)
    actual = results(
        ms_deform_attn_projected, call.shapes, [view.requires_grad_() for view in views], grad_output.transpose(1, 2)
    )
    expected = results(ms_deform_attn_projected, call.shapes, whole, grad_output.transpose(1, 2).contiguous())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
