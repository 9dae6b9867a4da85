"""What is the CUDA backend's own: graphs, order of additions, streams, several sizes at once. Needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from detfamily.ops import backends, ms_deform_attn, ms_deform_attn_projected

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if backends.backend_for("cuda") != "cuda":
        pytest.skip(f"no compiled code here: {backends.describe('cuda')}")


def gradients(call: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    leaves = call.projected(dtype, "cuda")
    output = ms_deform_attn_projected(leaves[0], call.shapes, *leaves[1:])
    return [output, *torch.autograd.grad(output.float().square().sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_deterministic_gradients_are_the_same_in_every_bit(make_call: Make, dtype: torch.dtype) -> None:
    """All queries add to few cells, which is where the order of additions shows."""
    call = make_call(shapes=((3, 3), (2, 2)), queries=2000, heads=8, width=32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(call, dtype) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)
    for one, other in zip(runs[0], gradients(call, dtype), strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def test_a_deterministic_gradient_that_is_not_finite_shows(make_call: Make) -> None:
    call = make_call()
    leaves = call.projected(torch.float32, "cuda")
    output = ms_deform_attn_projected(leaves[0], call.shapes, *leaves[1:])
    torch.use_deterministic_algorithms(True)
    try:
        (grad,) = torch.autograd.grad(output, leaves[0], torch.full_like(output, float("inf")))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not grad.isfinite().all()


def test_forward_and_backward_in_a_cuda_graph(make_call: Make) -> None:
    call, other = make_call(width=32), make_call(width=32, seed=1)
    leaves = call.projected(torch.float32, "cuda")

    def step() -> list[torch.Tensor]:
        output = ms_deform_attn_projected(leaves[0], call.shapes, *leaves[1:])
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf, new in zip(leaves, other.projected(torch.float32, "cuda"), strict=True):
            leaf.copy_(new)
    graph.replay()
    for one, wanted in zip(captured, step(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)


def test_no_host_synchronisation(make_call: Make) -> None:
    call = make_call(width=32)
    leaves = call.projected(torch.float32, "cuda")
    grad_output = torch.ones(2, 5, 96, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = ms_deform_attn_projected(leaves[0], call.shapes, *leaves[1:])
        torch.autograd.grad(output, leaves, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream(make_call: Make) -> None:
    call = make_call(width=32, queries=500)
    expected = gradients(call, torch.float32)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what follows must wait for it, on this stream
        actual = gradients(call, torch.float32)
    stream.synchronize()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reference_dim", [2, 4])
@pytest.mark.parametrize("shapes", [((38, 53), (19, 27), (10, 14), (5, 7)), ((31, 1), (1, 29)), ((64, 64),)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_encoders(make_call: Make, shapes: tuple[tuple[int, int], ...], reference_dim: int, dtype: torch.dtype) -> None:
    """As many queries as tokens: blocks take tiles of a map."""
    tokens = sum(h * w for h, w in shapes)
    call = make_call(shapes=shapes, queries=tokens, heads=8, width=32, reference_dim=reference_dim).off_edges()
    actual = gradients(call, dtype)
    leaves = [leaf.detach().double().requires_grad_() for leaf in call.projected(dtype)]
    with backends.use_backend("reference"):
        output = ms_deform_attn_projected(leaves[0], call.shapes, *leaves[1:])
    rounded = output.to(dtype).float().square()  # the same gradient reaches the op
    expected = [output, *torch.autograd.grad(rounded.sum(), leaves)]
    tolerance = {torch.float32: 2e-4}.get(dtype, 3e-2)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=tolerance * other.abs().max().item())


def test_values_beyond_two_to_the_31_elements() -> None:
    """Offsets of later images need 64 bits."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    batch, side, heads, width = 9, 1000, 8, 32
    value = torch.zeros(batch, side * side, heads, width, dtype=torch.bfloat16, device="cuda").requires_grad_()
    assert value.numel() > 2**31
    with torch.no_grad():
        value[-1, -1] = 1.0
    places = torch.full((batch, 1, heads, 1, 1, 2), 1 - 0.5 / side, device="cuda")
    weights = torch.ones(batch, 1, heads, 1, 1, device="cuda")
    output = ms_deform_attn(value, ((side, side),), places, weights)
    torch.testing.assert_close(output[-1].float(), torch.ones(1, heads * width, device="cuda"), rtol=0, atol=1e-2)
    assert not output[:-1].any()
    (grad,) = torch.autograd.grad(output.sum(), value)
    assert grad[-1, -1].float().sub(1).abs().max() < 1e-2 and not grad[-1, :-2000].any()


def test_other_gpus(make_call: Make) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call = make_call(width=32)
    first, second = (
        [leaf.to(f"cuda:{index}").detach() for leaf in call.projected(torch.float32)] for index in range(2)
    )
    one = ms_deform_attn_projected(first[0], call.shapes, *first[1:])
    other = ms_deform_attn_projected(second[0], call.shapes, *second[1:])
    assert other.device.index == 1
    torch.testing.assert_close(one.cpu(), other.cpu())
    with pytest.raises(ValueError, match="nothing is copied between devices"):
        ms_deform_attn_projected(first[0], call.shapes, *second[1:])
