"""Window attention against loops over single tokens, which know windows by where they lie and not by how maps roll."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detfamily.attention.window import APART, WindowAttention, relative_positions, windows_of

SETTINGS = [
    # (h, w), window, shift
    ((6, 9), 3, 0),
    ((6, 9), 3, 1),
    ((5, 7), 3, 1),
    ((7, 8), 4, 2),
    ((2, 3), 4, 2),
    ((1, 1), 4, 2),
    ((8, 3), 5, 2),
    ((3, 4), 1, 0),
]


def attention(window_size: int, shift: int = 0, embed_dim: int = 6, num_heads: int = 2, **settings: bool):
    """In float64, with parameters far from their start."""
    torch.manual_seed(0)
    module = WindowAttention(embed_dim, num_heads, window_size, shift, **settings).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def by_loops(module: WindowAttention, x: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Each token with every place of its window, one by one.

    A window's number is floor((y - shift) / window); those before the first window share the place of the last one.
    """
    batch, h, w, width = x.shape
    size, shift, heads = module.window_size, module.shift, module.num_heads
    rows, columns = -(-h // size), -(-w // size)
    ys, xs = range(rows * size), range(columns * size)
    depth = width // heads
    out = torch.zeros_like(x)

    def at(image: int, y: int, x_: int) -> Tensor:
        token = x[image, y, x_] if y < h and x_ < w else torch.zeros(width, dtype=x.dtype)
        projected: Tensor = module.qkv(token)
        return projected

    for image in range(batch):
        projected = {(y, x_): at(image, y, x_) for y in ys for x_ in xs}
        for y in range(h):
            for x_ in range(w):
                own = (y - shift) // size, (x_ - shift) // size
                mixed = []
                for head in range(heads):
                    part = slice(head * depth, (head + 1) * depth)
                    q = projected[y, x_][:width][part]
                    logits, values = [], []
                    for (ky, kx), k in projected.items():
                        window = (ky - shift) // size, (kx - shift) // size
                        if (window[0] - own[0]) % rows or (window[1] - own[1]) % columns:
                            continue
                        logit = q @ k[width : 2 * width][part] / math.sqrt(depth)
                        # places within the window
                        dy = (y - shift) % size - (ky - shift) % size
                        dx = (x_ - shift) % size - (kx - shift) % size
                        if module.position_bias is not None:
                            row = (dy + size - 1) * (2 * size - 1) + dx + size - 1
                            logit = logit + module.position_bias[row, head]
                        if window != own:
                            logit = logit + APART
                        beyond = ky >= h or kx >= w
                        if hidden is not None and (beyond or hidden[image, ky, kx]):
                            continue
                        logits.append(logit)
                        values.append(k[2 * width :][part])
                    if logits:
                        mixed.append(torch.stack(logits).softmax(0) @ torch.stack(values))
                    else:
                        mixed.append(torch.zeros(depth, dtype=x.dtype))
                out[image, y, x_] = module.proj(torch.cat(mixed))
    return out


@pytest.mark.parametrize(("size", "window_size", "shift"), SETTINGS)
@pytest.mark.parametrize("learning", [False, True])
def test_each_token_and_its_window(size: tuple[int, int], window_size: int, shift: int, learning: bool) -> None:
    module = attention(window_size, shift).requires_grad_(learning)  # the two ways to compute it on a CPU
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = by_loops(module, x)
    torch.testing.assert_close(module.on_map(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{"qkv_bias": False}, {"position_bias": False}])
@pytest.mark.parametrize("shift", [0, 1])
def test_without_biases(settings: dict[str, bool], shift: int) -> None:
    module = attention(3, shift, **settings)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module.on_map(x), by_loops(module, x), rtol=0, atol=1e-12)


def test_gradients() -> None:
    module = attention(3, 1, embed_dim=2)
    x = torch.randn(1, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    weights = torch.randn(1, 4, 5, 2, dtype=torch.float64)
    ours = torch.autograd.grad((module.on_map(x) * weights).sum(), leaves)
    expected = torch.autograd.grad((by_loops(module, x) * weights).sum(), leaves)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_what_the_shift_wraps_is_apart_by_a_hundred_and_not_by_infinity() -> None:
    module = attention(4, 2, num_heads=1)
    x = torch.randn(1, 8, 8, 6, dtype=torch.float64)
    with torch.no_grad():
        module.qkv.weight[:12] = 0
        module.qkv.bias[:12] = 0
        module.position_bias.zero_()
        # in the rolled map the first rows come behind the last: 3 places further, which nobody else is in this window
        last = relative_positions(4)[15, 0]
        before = module.on_map(x)[0, 1, 1]
        module.position_bias[last] = 300.0
        after = module.on_map(x)[0, 1, 1]
        value = module.proj(module.qkv(x[0, 6, 6])[12:])
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, value, rtol=0, atol=1e-9)


def hidden_at(h: int, w: int, *valid: tuple[int, int]) -> Tensor:
    mask = torch.ones(len(valid), h, w, dtype=torch.bool)
    for image, (y, x) in enumerate(valid):
        mask[image, :y, :x] = False
    return mask


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("position_bias", [True, False])
def test_hidden_tokens_are_as_if_they_were_not_there(shift: int, position_bias: bool) -> None:
    module = attention(3, shift, position_bias=position_bias)
    mask = hidden_at(7, 8, (7, 5), (4, 8))
    x = torch.randn(2, 7, 8, 6, dtype=torch.float64)
    with torch.no_grad():
        found, expected = module.on_map(x, padding_mask=mask), by_loops(module, x, mask)
    torch.testing.assert_close(found[~mask], expected[~mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [0, 2])
def test_garbage_in_the_padding_changes_nothing(shift: int) -> None:
    module = attention(4, shift).float()
    mask = hidden_at(9, 13, (9, 13), (6, 5), (1, 1))
    x = torch.randn(3, 9, 13, 6)
    other = torch.where(mask[..., None], 1e6 * torch.randn_like(x), x)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert torch.equal(
                module.on_map(x, padding_mask=mask)[~mask], module.on_map(other, padding_mask=mask)[~mask]
            )
    other.requires_grad_()
    (gradient,) = torch.autograd.grad(module.on_map(other, padding_mask=mask)[~mask].square().sum(), other)
    assert bool((gradient[mask] == 0).all()) and bool(gradient[~mask].any())


def test_more_padding_changes_nothing() -> None:
    module = attention(4, 2)
    x = torch.randn(1, 5, 6, 6, dtype=torch.float64)
    larger = torch.randn(1, 11, 9, 6, dtype=torch.float64)
    larger[:, :5, :6] = x
    small = module.on_map(x, padding_mask=torch.zeros(1, 5, 6, dtype=torch.bool))
    large = module.on_map(larger, padding_mask=hidden_at(11, 9, (5, 6)))
    torch.testing.assert_close(large[:, :5, :6], small, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_windows_of_nothing_but_padding_give_numbers(dtype: torch.dtype) -> None:
    module = attention(3, 1).to(dtype)
    x = torch.randn(1, 9, 9, 6, dtype=dtype, requires_grad=True)
    out = module.on_map(x, padding_mask=torch.ones(1, 9, 9, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert bool(out.isfinite().all()) and bool(gradient.isfinite().all())


def test_sixteen_bits() -> None:
    module = attention(3, 1, embed_dim=16).float()
    x = torch.randn(2, 5, 7, 16)
    mask = hidden_at(5, 7, (5, 7), (3, 4))
    expected = module.on_map(x, padding_mask=mask)[~mask].detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = module.on_map(x, padding_mask=mask)[~mask]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_an_evaluation_does_not_spoil_the_training_after_it() -> None:
    """Windows are kept from one call to the next."""
    module = attention(3, 1)
    x = torch.randn(1, 10, 11, 6, dtype=torch.float64)
    with torch.inference_mode():
        expected = module.on_map(x)
    module.on_map(x).sum().backward()
    assert module.qkv.weight.grad is not None
    torch.testing.assert_close(module.on_map(x), expected, rtol=0, atol=1e-12)
    assert windows_of((10, 11), 3, 1, x.device) is windows_of((10, 11), 3, 1, x.device)


def test_only_parameters_are_stored() -> None:
    module = attention(5)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "qkv.weight": (18, 6),
        "qkv.bias": (18,),
        "proj.weight": (6, 6),
        "proj.bias": (6,),
        "position_bias": (81, 2),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((6, 4, 3, 0), "num_heads=4 does not divide embed_dim=6"),
        ((6, 2, 3, 3), "window_size=3, shift=3: expected"),
        ((6, 2, 3, -1), "shift=-1: expected"),
        ((6, 2, 0, 0), "window_size=0, shift=0: expected at least one token"),
    ],
)
def test_settings_that_make_no_sense(settings: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowAttention(*settings)


@pytest.mark.parametrize(("window_size", "shift"), [(7, 3), (4, 2), (1, 0)])
def test_half_a_window(window_size: int, shift: int) -> None:
    assert WindowAttention(6, 2, window_size, shift=None).shift == shift
