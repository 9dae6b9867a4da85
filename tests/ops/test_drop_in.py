"""The logic of the official op test, and what official repositories do with the op, through the drop-in."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from detfamily.ops import backends, drop_in
from detfamily.ops.drop_in import MSDeformAttnFunction, ms_deform_attn_backward, ms_deform_attn_forward

SHAPES = ((6, 4), (3, 2))
SOURCE = Path(__file__).parents[2] / "src"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test runs on each backend that a CPU can have."""
    if request.param == "cpu" and (reason := backends.library("cpu").reason):
        pytest.skip(f"no compiled code for the CPU: {reason}")
    with backends.use_backend(request.param):
        yield request.param


def inputs_of(
    channels: int = 2, batch: int = 1, dtype: torch.dtype = torch.float64, shapes: tuple[tuple[int, int], ...] = SHAPES
) -> Inputs:
    """Small random inputs as the official test draws them: weights that sum to one, places inside the maps."""
    torch.manual_seed(3)
    heads, queries, points, levels = 2, 2, 2, len(shapes)
    value = torch.rand(batch, sum(h * w for h, w in shapes), heads, channels).to(dtype) * 0.01
    locations = torch.rand(batch, queries, heads, levels, points, 2).to(dtype)
    weights = torch.rand(batch, queries, heads, levels, points).to(dtype) + 1e-5
    sizes = torch.tensor(shapes)
    starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    return value, sizes, starts, locations, weights / weights.sum((-1, -2), keepdim=True)


def by_grid_sample(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """What the op means, head by head and level by level."""
    heads = []
    for head in range(value.shape[2]):
        total = value.new_zeros(1)
        for level, ((h, w), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
            image = value[:, start : start + h * w, head].transpose(1, 2).unflatten(2, (h, w))
            grid = 2 * locations[:, :, head, level] - 1
            found = F.grid_sample(image, grid, align_corners=False)  # (B, D, Q, P)
            total = total + (found * weights[:, None, :, head, level]).sum(-1)
        heads.append(total.transpose(1, 2))
    return torch.cat(heads, -1)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-12, 1e-15), (torch.float32, 1e-5, 1e-8)])
@pytest.mark.parametrize("step", [1, 2, 64])
def test_forward_as_grid_sample(dtype: torch.dtype, rtol: float, atol: float, step: int) -> None:
    """The batch of 3 is no multiple of a step of 2, which the official extension refuses."""
    inputs = inputs_of(batch=3, dtype=dtype)
    with torch.no_grad():
        output = MSDeformAttnFunction.apply(*inputs, step)
    assert output.dtype == dtype and output.shape == (3, 2, 4)
    torch.testing.assert_close(output, by_grid_sample(*inputs), rtol=rtol, atol=atol)


@pytest.mark.parametrize("channels", [30, 32, 64, 71, 1025, 2048, 3096])
def test_gradients_against_finite_differences(channels: int) -> None:
    value, shapes, starts, locations, weights = inputs_of(channels)
    for one in (value, locations, weights):
        one.requires_grad_()
    everything = (value, shapes, starts, locations, weights, 2)
    assert torch.autograd.gradcheck(MSDeformAttnFunction.apply, everything, fast_mode=channels > 128)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_of_some_inputs_only(wanted: tuple[bool, bool, bool]) -> None:
    value, shapes, starts, locations, weights = inputs_of(4)
    for one, wants in zip((value, locations, weights), wanted, strict=True):
        one.requires_grad_(wants)
    assert torch.autograd.gradcheck(MSDeformAttnFunction.apply, (value, shapes, starts, locations, weights, 64))


def test_official_core_in_float64(goldens: Path) -> None:
    """As an official repository calls it: the pair of functions, and both together through autograd."""
    io = load_file(goldens / "ms_deform_attn" / "core_float64" / "io.safetensors")
    sizes = sorted({match[1] for key in io if (match := re.match(r"(\w+)\.value$", key))})
    assert len(sizes) > 5
    for size in sizes:
        case = {key.removeprefix(f"{size}."): tensor for key, tensor in io.items() if key.startswith(f"{size}.")}
        names = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")
        inputs = [case[name] for name in names]
        output = ms_deform_attn_forward(*inputs, 64)
        torch.testing.assert_close(output, case["output"], rtol=0, atol=1e-9)
        pair = ms_deform_attn_backward(*inputs, case["grad_output"], 64)
        for place in (0, 3, 4):
            inputs[place].requires_grad_()
        output = MSDeformAttnFunction.apply(*inputs, 64)
        torch.testing.assert_close(output, case["output"], rtol=0, atol=1e-9)
        both = torch.autograd.grad(output, (inputs[0], *inputs[3:]), case["grad_output"])
        for name, one, other in zip(("value", "sampling_locations", "attention_weights"), pair, both, strict=True):
            expected = case[f"grad_{name}"]
            for gradient in (one, other):
                wrong = (gradient - expected).abs() > 1e-8 * expected.abs().max() + 1e-12
                if name == "sampling_locations" and "disagree" in case:
                    rule = case["cuda_rule.grad_sampling_locations"]
                    wrong &= ~(case["disagree"] & ((gradient - rule).abs() <= 1e-8 * rule.abs().max()))
                assert not wrong.any(), f"{size}: {int(wrong.sum())} of grad_{name}"


def test_inputs_that_are_not_contiguous() -> None:
    value, shapes, starts, locations, weights = inputs_of(5, batch=2)
    expected = by_grid_sample(value, shapes, starts, locations, weights)
    grad_output = torch.randn(2, 2, 10, dtype=torch.float64)
    wanted = ms_deform_attn_backward(value, shapes, starts, locations, weights, grad_output, 64)
    spread = torch.stack([shapes, -shapes], -1)[..., 0]
    turned = [one.movedim(1, -1).contiguous().movedim(-1, 1) for one in (value, locations, weights)]
    doubled = starts.repeat_interleave(2)[::2]
    assert not any(one.is_contiguous() for one in (spread, doubled, *turned))
    output = ms_deform_attn_forward(turned[0], spread, doubled, *turned[1:], 64)
    torch.testing.assert_close(output, expected)
    grad_output = grad_output.transpose(0, 1).contiguous().transpose(0, 1)
    ours = ms_deform_attn_backward(turned[0], spread, doubled, *turned[1:], grad_output, 64)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("places", ["float32", "as the values"])
def test_sixteen_bits(dtype: torch.dtype, places: str) -> None:
    """Under autocast places stay float32; a model in 16 bits has everything in them."""
    value, shapes, starts, locations, weights = inputs_of(8, dtype=torch.float32)
    value = 100 * value.to(dtype)
    other = torch.float32 if places == "float32" else dtype
    inputs = [one.detach().requires_grad_() for one in (value, locations.to(other), weights.to(other))]
    output = MSDeformAttnFunction.apply(inputs[0], shapes, starts, *inputs[1:], 64)
    assert output.dtype == dtype
    exact = [one.detach().double().requires_grad_() for one in inputs]
    expected = by_grid_sample(exact[0], shapes, starts, *exact[1:])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=eps, atol=eps)
    grad_output = torch.randn_like(output)
    theirs = torch.autograd.grad(expected, exact, grad_output.double())
    for one, gradient, wanted in zip(inputs, torch.autograd.grad(output, inputs, grad_output), theirs, strict=True):
        assert gradient.dtype == one.dtype
        torch.testing.assert_close(gradient.double(), wanted, rtol=8 * eps, atol=8 * eps * float(wanted.abs().max()))


def test_autocast_does_not_lower_what_is_given_in_float32() -> None:
    """DINO hands float32 over on purpose."""
    value, shapes, starts, locations, weights = inputs_of(8, dtype=torch.float32)
    inputs = [one.requires_grad_() for one in (value, locations, weights)]

    def run() -> tuple[Tensor, ...]:
        output = MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)
        return (output, *torch.autograd.grad(output.sum(), inputs))

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        under = run()
        called = ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)
    for one, other in zip((*plain, plain[0]), (*under, called), strict=True):
        assert torch.equal(one, other) and other.dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], torch.no_grad]) -> None:
    outside = inputs_of()
    expected = by_grid_sample(*outside)
    with mode():
        inside = inputs_of()
        for inputs in (outside, inside):
            torch.testing.assert_close(ms_deform_attn_forward(*inputs, 64), expected)
            torch.testing.assert_close(MSDeformAttnFunction.apply(*inputs, 64), expected)
        # changed without a trace: such tensors count no versions
        inside[1].copy_(torch.tensor([[4, 6], [2, 3]]))
        turned = ms_deform_attn_forward(*inside, 64)
    torch.testing.assert_close(turned, by_grid_sample(*inside))


def test_the_forward_function_is_differentiable_by_itself() -> None:
    value, shapes, starts, locations, weights = inputs_of(3)
    inputs = [one.requires_grad_() for one in (value, locations, weights)]
    output = ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)
    grad_output = torch.randn_like(output)
    ours = torch.autograd.grad(output, inputs, grad_output)
    theirs = ms_deform_attn_backward(value, shapes, starts, locations, weights, grad_output, 64)
    assert isinstance(theirs, list)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_are_refused_where_they_are_needed() -> None:
    value, shapes, starts, locations, weights = inputs_of()
    inputs = [one.requires_grad_() for one in (value, locations, weights)]
    output = MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((scale**2 * output).sum() + scale**3, inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: leave out create_graph=True"):
        first.sum().backward()
    grads = ms_deform_attn_backward(value, shapes, starts, locations, weights, torch.ones_like(output), 64)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        sum(grad.sum() for grad in grads).backward()  # type: ignore[union-attr]
    (first,) = torch.autograd.grad(scale**2 * output.sum() + scale**3, scale, create_graph=True)
    (second,) = torch.autograd.grad(first, scale)
    torch.testing.assert_close(second, (2 * output.sum() + 6).detach())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Whatever shapes were read from a tensor."""
    seen: list[Tensor] = []
    read = drop_in._read_shapes

    def recorded(shapes: Tensor, starts: Tensor) -> tuple[tuple[int, int], ...]:
        seen.append(shapes.clone())
        return read(shapes, starts)

    monkeypatch.setattr(drop_in, "_read_shapes", recorded)
    return seen


def test_shapes_are_read_once_for_all_layers_forward_and_backward(reads: list[Tensor]) -> None:
    def model() -> tuple[Tensor, list[Tensor]]:
        """The tensors of shapes end here, as in a transformer's forward; only the graph keeps them."""
        value, shapes, starts, locations, weights = inputs_of()
        inputs = [one.requires_grad_() for one in (value, locations, weights)]
        layers = [MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64) for _ in range(4)]
        return torch.stack(layers).sum(), inputs

    for step in range(3):
        total, inputs = model()
        gc.collect()
        torch.autograd.grad(total, inputs)
        assert len(reads) == step + 1
    del total
    gc.collect()
    assert not len(drop_in._known)


def test_shapes_that_change_are_read_anew(reads: list[Tensor]) -> None:
    value, shapes, starts, locations, weights = inputs_of()
    before = ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)
    shapes.copy_(torch.tensor([[4, 6], [2, 3]]))
    after = ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)
    torch.testing.assert_close(after, by_grid_sample(value, shapes, starts, locations, weights))
    assert not torch.equal(before, after) and len(reads) == 2
    ms_deform_attn_forward(value, shapes, starts.clone(), locations, weights, 64)
    assert len(reads) == 3
    starts.add_(1)
    with pytest.raises(ValueError, match="level_start_index"):
        ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        (2, lambda one: one + 1, r"level_start_index is \[1, 25\]; expected \[0, 24\].*\(\(6, 4\), \(3, 2\)\)"),
        (2, lambda one: one.flip(0), r"level_start_index is \[24, 0\]; expected \[0, 24\]"),
        (2, lambda one: one[:1], r"level_start_index has shape \(1,\); expected \(2,\)"),
        (2, lambda one: one.float(), r"level_start_index has dtype torch.float32; expected integers"),
        (1, lambda one: one.double(), r"spatial_shapes has dtype torch.float64; expected integers"),
        (1, lambda one: one.tolist(), r"spatial_shapes is a list; expected a tensor of integers"),
        (1, lambda one: one[0], r"spatial_shapes has shape \(2,\); expected \(L, 2\)"),
        (1, lambda one: one.T.contiguous()[:, :1], r"spatial_shapes has shape \(2, 1\); expected \(L, 2\)"),
        (0, lambda one: one[:, 1:], r"value has shape \(1, 29, 2, 2\)"),
        (3, lambda one: one[..., :1], r"sampling_locations has shape"),
        (4, lambda one: one[:, :1], r"attention_weights has shape"),
    ],
)
def test_what_does_not_fit_is_named(place: int, change: Callable[[Tensor], Any], said: str) -> None:
    inputs = list(inputs_of())
    inputs[place] = change(inputs[place])
    for function in (ms_deform_attn_forward, MSDeformAttnFunction.apply):
        with pytest.raises(ValueError, match=said):
            function(*inputs, 64)


def test_a_gradient_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"grad_output has shape \(1, 2, 3\); expected .* \(1, 2, 4\)"):
        ms_deform_attn_backward(*inputs_of(), torch.zeros(1, 2, 3, dtype=torch.float64), 64)


OFFICIAL = """
import sys
from detfamily.ops import drop_in
drop_in.install()
drop_in.install()  # twice does no harm

import torch
import MultiScaleDeformableAttention as MSDA

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights, step):
        ctx.step = step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return MSDA.ms_deform_attn_forward(value, shapes, starts, locations, weights, ctx.step)

    @staticmethod
    def backward(ctx, grad):
        grads = MSDA.ms_deform_attn_backward(*ctx.saved_tensors, grad, ctx.step)
        return grads[0], None, None, grads[1], grads[2], None

shapes, starts = torch.tensor([(6, 4), (3, 2)]), torch.tensor([0, 24])
value, locations, weights = (torch.rand(*size, dtype=torch.float64, requires_grad=True)
                             for size in ((1, 30, 2, 4), (1, 2, 2, 2, 2, 2), (1, 2, 2, 2, 2)))
assert torch.autograd.gradcheck(Function.apply, (value, shapes, starts, locations, weights, 64))
print("like the official one:", MSDA.__name__)
"""


def test_official_code_imports_it_in_a_fresh_process(backend: str) -> None:
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, backends.VARIABLE: backend}
    command = [sys.executable, "-c", OFFICIAL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "like the official one: detfamily.ops.drop_in\n"


def test_too_late_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = ModuleType(drop_in.OFFICIAL_NAME)
    compiled.__file__ = "compiled.so"
    monkeypatch.setitem(sys.modules, drop_in.OFFICIAL_NAME, compiled)
    with pytest.raises(RuntimeError, match=r"is imported already, from compiled\.so; call install\(\) before"):
        drop_in.install()
    assert sys.modules[drop_in.OFFICIAL_NAME] is compiled
