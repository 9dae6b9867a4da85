"""Axial attention against loops over single tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detfamily.attention import AxialAttention
from detfamily.structures import Grid, Tokens


def attention(embed_dim: int = 6, num_heads: int = 2, **settings: bool) -> AxialAttention:
    """In float64, with parameters far from their start."""
    torch.manual_seed(0)
    module = AxialAttention(embed_dim, num_heads, **settings).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def by_loops(module: AxialAttention, x: Tensor, pos: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
    batch, h, w, width = x.shape
    depth = width // module.num_heads
    compared = module.qkv(x if pos is None else x + pos)
    q, k, v = compared[..., :width], compared[..., width : 2 * width], module.qkv(x)[..., 2 * width :]
    out = torch.zeros_like(x)
    for image in range(batch):
        for y in range(h):
            for x_ in range(w):
                total = torch.zeros(width, dtype=x.dtype)
                for line in ([(y, other) for other in range(w)], [(other, x_) for other in range(h)]):
                    seen = [place for place in line if hidden is None or not hidden[image, *place]]
                    for head in range(module.num_heads if seen else 0):
                        part = slice(head * depth, (head + 1) * depth)
                        logits = [q[image, y, x_, part] @ k[image, *place, part] / math.sqrt(depth) for place in seen]
                        values = torch.stack([v[image, *place, part] for place in seen])
                        total[part] = total[part] + torch.stack(logits).softmax(0) @ values
                out[image, y, x_] = module.proj(total)
    return out


@pytest.mark.parametrize("size", [(4, 7), (5, 3), (1, 4), (1, 1)])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_each_token_with_its_row_and_column(size: tuple[int, int], qkv_bias: bool) -> None:
    module = attention(qkv_bias=qkv_bias)
    x, pos = torch.randn(2, 2, *size, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module.on_map(x), by_loops(module, x), rtol=0, atol=1e-12)
        torch.testing.assert_close(module.on_map(x, pos), by_loops(module, x, pos), rtol=0, atol=1e-12)


def test_gradients() -> None:
    module = attention(embed_dim=4)
    mask = hidden_at(3, 4, (3, 3))
    x, pos = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    leaves = [x.requires_grad_(), pos.requires_grad_(), *module.parameters()]
    weights = torch.randn(1, 3, 4, 4, dtype=torch.float64).masked_fill(mask[..., None], 0)
    ours = torch.autograd.grad((module.on_map(x, pos, mask) * weights).sum(), leaves)
    expected = torch.autograd.grad((by_loops(module, x, pos, mask) * weights).sum(), leaves)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, pos: module.on_map(x, pos, mask)[~mask], (x, pos))


def hidden_at(h: int, w: int, *valid: tuple[int, int]) -> Tensor:
    mask = torch.ones(len(valid), h, w, dtype=torch.bool)
    for image, (y, x) in enumerate(valid):
        mask[image, :y, :x] = False
    return mask


def test_hidden_tokens_are_as_if_they_were_not_there() -> None:
    module = attention()
    mask = hidden_at(5, 6, (5, 4), (2, 6), (1, 1))
    x = torch.randn(3, 5, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        found, expected = module.on_map(x, padding_mask=mask), by_loops(module, x, hidden=mask)
    torch.testing.assert_close(found[~mask], expected[~mask], rtol=0, atol=1e-12)


def test_garbage_in_the_padding_changes_nothing() -> None:
    module = attention().float()
    mask = hidden_at(9, 8, (9, 8), (6, 5), (1, 1))
    x = torch.randn(3, 9, 8, 6)
    other = torch.where(mask[..., None], 1e6 * torch.randn_like(x), x).requires_grad_()
    found, expected = module.on_map(other, padding_mask=mask)[~mask], module.on_map(x, padding_mask=mask)[~mask]
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.square().sum(), other)
    assert bool((gradient[mask] == 0).all()) and bool(gradient[~mask].any())


def test_more_padding_changes_nothing() -> None:
    module = attention()
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    larger = torch.randn(1, 7, 9, 6, dtype=torch.float64)
    larger[:, :4, :5] = x
    large = module.on_map(larger, padding_mask=hidden_at(7, 9, (4, 5)))
    torch.testing.assert_close(large[:, :4, :5], module.on_map(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_but_padding_gives_numbers(dtype: torch.dtype) -> None:
    module = attention().to(dtype)
    x = torch.randn(1, 3, 4, 6, dtype=dtype, requires_grad=True)
    out = module.on_map(x, padding_mask=torch.ones(1, 3, 4, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert bool(out.isfinite().all()) and bool(gradient.isfinite().all())


def test_sixteen_bits() -> None:
    module = attention(embed_dim=16).float()
    x = torch.randn(2, 5, 7, 16)
    mask = hidden_at(5, 7, (5, 7), (3, 4))
    expected = module.on_map(x, padding_mask=mask)[~mask].detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = module.on_map(x, padding_mask=mask)[~mask]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_compiled_in_one_graph() -> None:
    module = attention()
    compiled = torch.compile(module.on_map, fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(1, 4, 5, 6, dtype=torch.float64), hidden_at(4, 5, (3, 5))
    torch.testing.assert_close(compiled(x, None, mask), module.on_map(x, None, mask), rtol=0, atol=1e-12)


def test_levels_of_an_encoder_are_maps_of_their_own() -> None:
    module = attention()
    maps = [torch.randn(2, h, w, 6, dtype=torch.float64) for h, w in ((4, 5), (2, 3))]
    grid = Grid(((4, 5), (2, 3)), None, torch.ones(2, 2, 2))
    tokens = Tokens(torch.cat([one.flatten(1, 2) for one in maps], 1), grid=grid)
    expected = torch.cat([module.on_map(one).flatten(1, 2) for one in maps], 1)
    torch.testing.assert_close(module(tokens, tokens), expected, rtol=0, atol=1e-12)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="num_heads=4 does not divide embed_dim=6"):
        AxialAttention(6, 4)
