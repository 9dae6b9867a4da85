from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from detfamily.attention import DenseAttention
from detfamily.structures import Grid, Tokens

WIDTH, HEADS = 24, 3


def pair() -> tuple[DenseAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    ours = DenseAttention(WIDTH, HEADS).double()
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        theirs.out_proj.bias.normal_()
        ours.in_proj.weight.copy_(theirs.in_proj_weight)
        ours.in_proj.bias.copy_(theirs.in_proj_bias)
        ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
    return ours, theirs


def tokens(count: int, padding: Tensor | None = None, with_pos: bool = True) -> Tokens:
    pos = torch.randn(2, count, WIDTH, dtype=torch.float64) if with_pos else None
    grid = Grid(((1, count),), padding, torch.ones(2, 1, 2))
    return Tokens(torch.randn(2, count, WIDTH, dtype=torch.float64), pos, grid=grid)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_pos", [False, True])
def test_cross_attention_is_pytorchs(masked: bool, padded: bool, with_pos: bool) -> None:
    ours, theirs = pair()
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3]) if padded else None
    mask = torch.rand(5, 7) < 0.3 if masked else None
    if mask is not None:
        mask[:, 0] = False  # everybody sees something
    query, source = tokens(5, with_pos=with_pos), tokens(7, padding, with_pos)
    expected, _ = theirs(query.with_pos(), source.with_pos(), source.content, key_padding_mask=padding, attn_mask=mask)
    torch.testing.assert_close(ours(query, source, mask), expected, rtol=0, atol=1e-12)


def test_self_attention_is_pytorchs_and_so_are_its_gradients() -> None:
    ours, theirs = pair()
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    query = tokens(6, padding)
    query.content.requires_grad_()
    expected, _ = theirs(query.with_pos(), query.with_pos(), query.content, key_padding_mask=padding)
    output = ours(query, query)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(output)
    inputs = (query.content, ours.in_proj.weight)
    for mine, other in zip(
        torch.autograd.grad(output, inputs, cotangent),
        torch.autograd.grad(expected, (query.content, theirs.in_proj_weight), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def test_what_lies_in_the_padding_is_never_read() -> None:
    ours, _ = pair()
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    query, source = tokens(5), tokens(7, padding)
    before = ours(query, source)
    source.content[padding] = 1e6
    assert source.pos is not None
    source.pos[padding] = -1e6
    torch.testing.assert_close(ours(query, source), before, rtol=0, atol=0)


def test_dropout_works_in_training_only() -> None:
    torch.manual_seed(0)
    attention = DenseAttention(WIDTH, HEADS, dropout=0.5)
    x = Tokens(torch.randn(1, 9, WIDTH))
    assert not torch.equal(attention(x, x), attention(x, x))
    attention.eval()
    torch.testing.assert_close(attention(x, x), attention(x, x), rtol=0, atol=0)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_heads=5 does not divide embed_dim=24"):
        DenseAttention(WIDTH, 5)
