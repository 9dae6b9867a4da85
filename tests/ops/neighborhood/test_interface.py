"""The backends of neighborhood attention against each other, which of them is chosen, and what tiles cost."""

from __future__ import annotations

import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from detfamily.errors import ConfigError
from detfamily.ops.neighborhood import interface, natten, neighborhood_attn, tiles
from detfamily.ops.neighborhood.flex import BLOCK, windows_of

MAPS = [
    # (h, w), kernel_size, dilation
    ((9, 17), 3, 1),
    ((7, 8), 5, 1),
    ((19, 23), 7, 1),
    ((15, 14), 7, 2),
    ((11, 13), 3, 3),
    ((4, 9), 5, 1),
    ((5, 8), 3, 2),
    ((1, 1), 3, 1),
]


def call(size: tuple[int, int], kernel_size: int, bias: bool = True, heads: int = 2, depth: int = 16):
    """qkv, biases, padding; every map has visible and hidden tokens."""
    torch.manual_seed(0)
    qkv = torch.randn(2, *size, 3, heads, depth, dtype=torch.float64)
    table = torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1, dtype=torch.float64) if bias else None
    mask = torch.zeros(2, *size, dtype=torch.bool)
    mask[0, -3:] = True
    mask[1, :, -2:] = True
    return qkv, table, mask


@pytest.mark.parametrize(("size", "kernel_size", "dilation"), MAPS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_flex_is_pytorch(size: tuple[int, int], kernel_size: int, dilation: int, bias: bool, padded: bool) -> None:
    qkv, table, mask = call(size, kernel_size, bias)
    given = qkv, kernel_size, dilation, table, mask if padded else None
    one, other = (neighborhood_attn(*given, backend=backend) for backend in ("pytorch", "flex"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "dilation"), [((20, 31), 1), ((18, 17), 2)])
def test_blocks_that_flex_skips_hold_nothing(size: tuple[int, int], dilation: int) -> None:
    """The block mask against all pairs at once."""
    windows = windows_of(size, 5, dilation, torch.device("cpu"))
    tokens = size[0] * size[1]
    places = torch.arange(tokens)
    y, x = places // size[1], places % size[1]

    def near(one: Tensor, length: int) -> Tensor:
        """[query, key] whether a key is among the 5 nearest of its class."""
        apart = (one[:, None] - one).abs()
        low = torch.where(one // dilation < 2, one % dilation, one - 2 * dilation)
        highest = (length - 1 - one % dilation) // dilation * dilation + one % dilation
        low = torch.minimum(low, highest - 4 * dilation)[:, None]
        return (apart % dilation == 0) & (one >= low) & (one <= low + 4 * dilation)

    dense = near(y, size[0]) & near(x, size[1])
    blocks = -(-tokens // BLOCK)
    whole = torch.zeros(blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    whole[:tokens, :tokens] = dense
    expected = whole.view(blocks, BLOCK, blocks, BLOCK).any(3).any(1)
    assert torch.equal(windows.mask.to_dense()[0, 0].bool(), expected)


@pytest.mark.skipif(importlib.util.find_spec("natten") is None, reason="the package natten is not installed")
@pytest.mark.parametrize(("size", "kernel_size", "dilation"), MAPS[:5])
def test_natten_is_pytorch(size: tuple[int, int], kernel_size: int, dilation: int) -> None:
    qkv = call(size, kernel_size)[0].float()
    one, other = (neighborhood_attn(qkv, kernel_size, dilation, backend=which) for which in ("pytorch", "natten"))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["pytorch", "flex", "natten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "kernel_size", "dilation"), MAPS)
@pytest.mark.parametrize("plain", [True, False])
def test_every_backend_of_a_gpu(
    backend: interface.Backend,
    dtype: torch.dtype,
    size: tuple[int, int],
    kernel_size: int,
    dilation: int,
    plain: bool,
) -> None:
    """Forward and backward against float64 on the CPU."""
    qkv, table, mask = call(size, kernel_size, depth=32)
    table, mask = (None, None) if plain else (table, mask)
    grad = torch.randn(2, *size, 64, dtype=torch.float64)
    results = []
    for device, kind, which in (("cpu", torch.float64, "pytorch"), ("cuda", dtype, backend)):
        leaves = [one.to(device, kind).requires_grad_() for one in (qkv, table) if one is not None]
        given = (leaves[0], kernel_size, dilation, None if plain else leaves[1])
        try:
            out = neighborhood_attn(*given, None if mask is None else mask.to(device), backend=which)
        except ConfigError as error:
            pytest.skip(str(error))
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(device, kind))])
    for expected, found in zip(*results, strict=True):
        limit = (5e-3 if dtype == torch.float32 else 5e-2) * float(expected.detach().abs().max())  # TF32 is allowed
        torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=0, atol=limit)


# -- the choice -------------------------------------------------------------------------------------------------------


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_said", set())
    qkv, table, mask = call((5, 6), 3)
    with caplog.at_level(logging.INFO, logger=interface.__name__):
        for _ in range(2):
            neighborhood_attn(qkv, 3, 1, table, mask)
    assert [record.message for record in caplog.records] == ["neighborhood attention on cpu is computed by pytorch"]


def on_a_gpu(depth: int = 32, requires_grad: bool = True) -> Tensor:
    """All that the choice asks a tensor."""
    found = SimpleNamespace(
        is_cuda=True, dtype=torch.bfloat16, shape=(2, 9, 9, 3, 2, depth), requires_grad=requires_grad
    )
    found.device = torch.device("cuda")
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("depth", "learned", "kernels", "expected"),
    [
        (32, False, True, "natten"),
        (32, False, False, "flex"),
        (32, True, True, "pytorch"),
        (24, False, False, "pytorch"),
    ],
)
def test_what_a_gpu_gets(
    monkeypatch: pytest.MonkeyPatch, depth: int, learned: bool, kernels: bool, expected: str
) -> None:
    monkeypatch.setattr(natten, "installed", lambda: kernels)
    monkeypatch.setattr(natten, "has_kernels", lambda: kernels)
    table = torch.zeros(2, 5, 5, requires_grad=True) if learned else None
    assert interface.choose(on_a_gpu(depth), 3, 1, table, None, "auto") == expected


@pytest.mark.parametrize(
    ("backend", "kernel_size", "bias", "message"),
    [
        ("flex", 3, True, "FlexAttention has no gradients on cpu"),
        ("natten", 3, True, "neither position biases nor padding"),
        ("natten", 7, False, "kernel_size=7 with dilation=1 does not fit into 5 x 6"),
        ("natten", 3, False, "natten has no gradients on cpu"),
    ],
)
def test_a_backend_that_cannot(
    monkeypatch: pytest.MonkeyPatch, backend: interface.Backend, kernel_size: int, bias: bool, message: str
) -> None:
    monkeypatch.setattr(natten, "installed", lambda: True)
    qkv, table, _ = call((5, 6), kernel_size, bias)
    with pytest.raises(ConfigError, match=message):
        neighborhood_attn(qkv.requires_grad_(), kernel_size, 1, table, backend=backend)


def test_natten_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natten, "installed", lambda: False)
    with pytest.raises(ConfigError, match="backend='natten' cannot .* not installed .*; use 'auto'"):
        neighborhood_attn(call((5, 6), 3)[0], 3, backend="natten")


# -- the op -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_op_keeps_the_rules_of_ops(bias: bool, padded: bool) -> None:
    qkv, table, mask = call((5, 6), 3, bias, depth=2)
    leaves = (qkv.requires_grad_(), None if table is None else table.requires_grad_(), mask if padded else None)
    torch.library.opcheck(torch.ops.detfamily.neighborhood_attention, (*leaves, 3, 1))


def test_second_derivatives_are_refused() -> None:
    qkv = call((5, 6), 3)[0].requires_grad_()
    (grad,) = torch.autograd.grad(neighborhood_attn(qkv, 3).square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("at_once", [1, 2**10, 2**30])
def test_any_number_of_tiles_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    results = []
    for limit in (2**18, at_once):
        monkeypatch.setitem(tiles.LOGITS_AT_ONCE, "cpu", limit)
        leaves = [one.requires_grad_() for one in call((19, 23), 5)[:2]]
        out = neighborhood_attn(leaves[0], 5, 1, leaves[1])
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(out):
            if isinstance(one, Tensor):
                self.found = max(self.found, one.untyped_storage().nbytes() // one.element_size())
        return out


@pytest.mark.parametrize("dilation", [1, 2])
def test_memory_is_linear_in_the_tokens(dilation: int) -> None:
    """No tensor is larger than what the tokens themselves are, or what is computed at once."""
    for side in (14, 56, 112):
        qkv = torch.randn(1, side, side, 3, 1, 8)
        grad = torch.randn(1, side, side, 8)
        with Largest() as mode:
            tiles.forward(qkv, None, None, 7, dilation)
            tiles.backward(grad, qkv, None, None, 7, dilation)
        assert mode.found <= max(qkv.numel(), tiles.LOGITS_AT_ONCE["cpu"])


def test_operations_are_counted_by_the_definition() -> None:
    qkv = torch.randn(2, 9, 10, 3, 2, 4, requires_grad=True)
    with FlopCounterMode(display=False) as mode:
        out = neighborhood_attn(qkv, 5, 1)
    pairs = 2 * 9 * 10 * 25
    assert mode.get_total_flops() == 2 * 2 * pairs * 2 * 4
    with FlopCounterMode(display=False) as mode:
        out.sum().backward()
    assert mode.get_total_flops() == 2 * 5 * pairs * 2 * 4
    with FlopCounterMode(display=False) as mode, torch.device("meta"):
        neighborhood_attn(torch.empty(1, 2, 9, 3, 2, 4), 5, 1)
    assert mode.get_total_flops() == 2 * 2 * (2 * 2 * 9 * 5) * 2 * 4
