"""The ops as PyTorch sees them, with the reference's kernels and with compiled ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detfamily.ops import backends, ms_deform_attn, ms_deform_attn_projected, registration

Make = Callable[..., Any]


def flat(shapes: tuple[tuple[int, int], ...]) -> list[int]:
    return [size for shape in shapes for size in shape]


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    with backends.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(make_call: Make, compiled: str, dtype: torch.dtype) -> None:
    """Schema, fake kernels, autograd registration and tracing, by PyTorch's own checks."""
    call = make_call(queries=3, heads=2)
    shapes, ops = flat(call.shapes), torch.ops.detfamily
    plain, projected = call.plain(dtype), call.projected(dtype)
    grad_output = torch.randn(2, 3, 16).to(dtype)
    torch.library.opcheck(ops.ms_deform_attn.default, (plain[0], shapes, *plain[1:]))
    torch.library.opcheck(ops.ms_deform_attn_projected.default, (projected[0], shapes, *projected[1:]))
    detached, raw = [x.detach() for x in plain], [x.detach() for x in projected]
    arguments = (grad_output, detached[0], shapes, *detached[1:], False)
    torch.library.opcheck(ops.ms_deform_attn_backward.default, arguments)
    for reference_grad in (True, False):
        arguments = (grad_output, raw[0], shapes, *raw[1:], False, reference_grad)
        torch.library.opcheck(ops.ms_deform_attn_projected_backward.default, arguments)


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_gradcheck_of_the_projected_form(make_call: Make, backend: str, reference_dim: int) -> None:
    call = make_call(queries=2, heads=2, width=3, points=2, reference_dim=reference_dim, seed=4)
    assert torch.autograd.gradcheck(
        lambda value, *others: ms_deform_attn_projected(value, call.shapes, *others), call.projected()
    )


def test_gradcheck_of_the_plain_form(make_call: Make, backend: str) -> None:
    call = make_call(queries=2, heads=2, width=3, points=2, seed=4)
    assert torch.autograd.gradcheck(lambda value, *others: ms_deform_attn(value, call.shapes, *others), call.plain())


def test_the_op_itself_falls_back_to_the_reference_on_any_device(make_call: Make) -> None:
    """A graph that holds the op runs where there is no library: the kernels of last resort are complete."""
    call = make_call(reference_dim=4)
    shapes, inputs = flat(call.shapes), [x.detach() for x in call.projected()]
    grad_output = torch.randn(2, 5, 24, dtype=torch.float64)
    leaves = call.projected()
    expected = ms_deform_attn_projected(leaves[0], call.shapes, *leaves[1:])
    torch.testing.assert_close(registration._projected(inputs[0], shapes, *inputs[1:]), expected)
    grads = registration._projected_backward(grad_output, inputs[0], shapes, *inputs[1:], False, True)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, leaves, grad_output), strict=True):
        torch.testing.assert_close(actual, wanted)
    grads = registration._projected_backward(grad_output, inputs[0], shapes, *inputs[1:], False, False)
    assert grads[1].shape == (0,)
    with torch._C._AutoDispatchBelowAutograd():  # as the dispatcher calls kernels
        below = registration._projected_backward(grad_output, inputs[0], shapes, *inputs[1:], False, False)
    for actual, wanted in zip(below, grads, strict=True):
        torch.testing.assert_close(actual, wanted)


class Sampler(nn.Module):
    def __init__(self, shapes: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return ms_deform_attn_projected(2 * value, self.shapes, references, offsets, logits).relu()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(make_call: Make, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Sampler(((5, 7), (3, 2), (1, 1))), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seed, queries in enumerate((5, 7)):
        call = make_call(queries=queries, seed=seed)
        results = []
        for module in (compiled, compiled._orig_mod):
            leaves = call.projected()
            output = module(*leaves)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_a_compiled_function_notices_another_backend(make_call: Make, compiled: str) -> None:
    torch._dynamo.reset()
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    call = make_call()
    function = torch.compile(Sampler(call.shapes), fullgraph=True, backend=keep)
    for name in ("cpu", "reference"):
        with backends.use_backend(name), torch.no_grad():
            function(*call.projected())
    assert ["ms_deform_attn_projected" in code for code in graphs] == [True, False]
    assert "grid_sample" in graphs[1]


def test_export_and_read_back(make_call: Make, backend: str, tmp_path: Path) -> None:
    if backend == "reference" and torch.__version__.startswith("2.11."):
        pytest.skip("exporting grid_sample, torch 2.11 does not see that the smaller of 8 n and 24 n is 8 n")
    call = make_call()
    inputs = tuple(tensor.detach().float() for tensor in call.projected())
    queries = torch.export.Dim("queries", min=2, max=100)
    dynamic = (None, {1: queries}, {1: queries}, {1: queries})
    torch.export.save(
        torch.export.export(Sampler(call.shapes), inputs, dynamic_shapes=dynamic), tmp_path / "sampler.pt2"
    )
    program = torch.export.load(tmp_path / "sampler.pt2").module()
    other = tuple(tensor.detach().float() for tensor in make_call(queries=9, seed=1).projected())
    torch.testing.assert_close(program(*other), Sampler(call.shapes)(*other))


def test_autocast_gives_16_bits_and_keeps_places_precise(make_call: Make, backend: str) -> None:
    call = make_call(shapes=((1, 400),), width=16)
    expected = ms_deform_attn(call.plain()[0], call.shapes, *call.plain()[1:])
    projected = ms_deform_attn_projected(call.projected()[0], call.shapes, *call.projected()[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = call.plain(torch.float32)
        output = torch.ops.detfamily.ms_deform_attn(plain[0], flat(call.shapes), *plain[1:])
        raw = call.projected(torch.float32)
        fused = torch.ops.detfamily.ms_deform_attn_projected(raw[0], flat(call.shapes), *raw[1:])
    for actual, wanted in ((output, expected), (fused, projected)):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.double(), wanted, rtol=2**-7, atol=0.03)
    output.sum().backward()
    assert [leaf.grad.dtype for leaf in plain] == [torch.float32] * 3  # type: ignore[union-attr]


def test_second_derivatives_are_refused(make_call: Make, compiled: str) -> None:
    call = make_call()
    for function, leaves in ((ms_deform_attn, call.plain()), (ms_deform_attn_projected, call.projected())):
        output = function(leaves[0], call.shapes, *leaves[1:])
        (grad,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            grad.sum().backward()


def test_gradients_only_where_asked_for(make_call: Make, compiled: str) -> None:
    call = make_call(reference_dim=4)
    whole = torch.autograd.grad(
        ms_deform_attn_projected((leaves := call.projected())[0], call.shapes, *leaves[1:]).sum(), leaves
    )
    for wanted in range(4):
        leaves = [leaf.detach().requires_grad_(i == wanted) for i, leaf in enumerate(call.projected())]
        output = ms_deform_attn_projected(leaves[0], call.shapes, *leaves[1:])
        (grad,) = torch.autograd.grad(output.sum(), leaves[wanted])
        torch.testing.assert_close(grad, whole[wanted], rtol=0, atol=0)
