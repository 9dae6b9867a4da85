"""Attention with learned queries against loops over windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detfamily.attention.qna import LearnedQueryAttention, LinearQueryAttention, SigmoidQueryAttention

from .map_checks import (
    check_gradients,
    check_padding,
    check_positions,
    check_sixteen_bits,
    check_sizes,
    drawn,
    hidden_at,
)

KINDS = {LearnedQueryAttention: torch.exp, SigmoidQueryAttention: torch.sigmoid, LinearQueryAttention: lambda x: x}


def by_loops(module: LearnedQueryAttention, x: Tensor, pos: Tensor, hidden: Tensor) -> Tensor:
    batch, h, w, width = x.shape
    heads, side = module.num_heads, module.kernel_size
    depth = width // heads
    weigh = KINDS[type(module)]
    output = []
    for image in range(batch):
        for y in range(h):
            for x_ in range(w):
                parts = []
                for head in range(heads):
                    part = slice(head * depth, (head + 1) * depth)
                    total = torch.zeros(depth).double()
                    for index, query in enumerate(module.queries):
                        row = index * heads + head
                        above, below = torch.zeros(depth).double(), torch.zeros(()).double()
                        for n in range(side**2):
                            ky, kx = y + n // side - side // 2, x_ + n % side - side // 2
                            if not (0 <= ky < h and 0 <= kx < w) or hidden[image, ky, kx]:
                                continue
                            key = module.k(x[image, ky, kx] + pos[image, ky, kx])[part]
                            cost = weigh(query[part] @ key / depth**0.5) * weigh(module.position_bias[row, n])
                            above = above + cost * module.scale[row, n] * module.v(x[image, ky, kx])[part]
                            below = below + cost
                        total = total + (above / below if below != 0 else 0)
                    parts.append(total)
                output.append(module.proj(torch.cat(parts)))
    return torch.stack(output).view(x.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_queries", "kernel_size"), [(1, 3), (2, 3), (2, 5)])
def test_windows_answer_queries(kind: type[LearnedQueryAttention], num_queries: int, kernel_size: int) -> None:
    module = drawn(kind(16, 4, num_queries, kernel_size))
    hidden = hidden_at(3, 4, (3, 4), (2, 2))
    x, pos = (torch.randn(2, 3, 4, 16).double().requires_grad_() for _ in range(2))
    ours, expected = (one[~hidden] for one in (module.on_map(x, pos, hidden), by_loops(module, x, pos, hidden)))
    check_gradients(ours, expected, [x, pos, *module.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_like_what_lies_beyond_the_map(kind: type[LearnedQueryAttention]) -> None:
    module = drawn(kind(16, 4))
    x = torch.randn(1, 4, 5, 16).double()
    larger = 5 * torch.randn(1, 9, 11, 16).double()
    larger[:, :4, :5] = x
    found = module.on_map(larger, padding_mask=hidden_at(9, 11, (4, 5)))
    assert bool(found.isfinite().all())
    expected = module.on_map(x)
    limit = 1e-11 * max(1.0, expected.abs().max().item())  # linear weights sum up to almost nothing at some places
    torch.testing.assert_close(found[:, :4, :5], expected, rtol=0, atol=limit)


def test_large_logits_do_not_overflow() -> None:
    module = drawn(LearnedQueryAttention(16, 4)).float()
    x = torch.randn(1, 3, 3, 16)
    x[0, 1, 1] *= 1000
    assert not bool(module.k(x).abs().max() < 300) and bool(module.on_map(x).isfinite().all())


@pytest.mark.parametrize("kind", [LearnedQueryAttention, SigmoidQueryAttention])
def test_what_all_attentions_have_to_do(kind: type[LearnedQueryAttention]) -> None:
    for check in (check_padding, check_positions, check_sizes, check_sixteen_bits):
        check(drawn(kind(16, 4), 0.3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((16, 3), "num_heads=3 does not divide embed_dim=16"),
        ((16, 4, 0), "num_queries=0: expected at least one"),
        ((16, 4, 2, 2), "kernel_size=2: expected an odd number"),
    ],
)
def test_settings_that_make_no_sense(settings: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedQueryAttention(*settings)
