"""What every attention on maps has to keep, whatever it computes inside; each file of its own tests what that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from detfamily.attention import (
    AxialAttention,
    DeformableAttention,
    DeformableAttention2022,
    DenseAttention,
    LearnedQueryAttention,
    MapAttention,
    MSDeformAttention,
    NeighborhoodAttention,
    PooledAttention,
    PyramidAttention,
    SlideAttention,
    WindowAttention,
)
from detfamily.attention.maps import on_map, project_qkv
from detfamily.structures import Grid, Tokens

WIDTH, HEADS = 16, 4
SHAPES = ((6, 7), (3, 4), (1, 2))
ATTENTIONS: dict[str, Callable[[], MapAttention]] = {
    "window": partial(WindowAttention, WIDTH, HEADS, 3),
    "shifted window": partial(WindowAttention, WIDTH, HEADS, 3, None),
    "neighborhood": partial(NeighborhoodAttention, WIDTH, HEADS, 3),
    "neighborhood, dilated": partial(NeighborhoodAttention, WIDTH, HEADS, 3, 2, pad_small_maps=False),
    "axial": partial(AxialAttention, WIDTH, HEADS),
    "deformable": partial(DeformableAttention, WIDTH, HEADS, num_groups=2, stride=2, kernel_size=3),
    "deformable, as in 2022": partial(DeformableAttention2022, WIDTH, HEADS, num_groups=2, stride=1, kernel_size=3),
    "pooled": partial(PooledAttention, WIDTH, HEADS, stride=2),
    "pyramid": partial(PyramidAttention, WIDTH, HEADS, reduction=2),
    "slide": partial(SlideAttention, WIDTH, HEADS),
    "QnA": partial(LearnedQueryAttention, WIDTH, HEADS),
}


def built(name: str) -> MapAttention:
    torch.manual_seed(1)
    attention = ATTENTIONS[name]()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return attention.double().eval()


def tokens(padded: bool = True) -> Tokens:
    """Two images; of the second, the right and the lower part of each level are padding."""
    torch.manual_seed(2)
    masks = []
    for h, w in SHAPES:
        mask = torch.zeros(2, h, w, dtype=torch.bool)
        mask[1, (h + 1) // 2 :] = mask[1, :, (w + 1) // 2 :] = True
        masks.append(mask.flatten(1))
    total = sum(h * w for h, w in SHAPES)
    content, pos = torch.randn(2, 2, total, WIDTH, dtype=torch.float64)
    mask = torch.cat(masks, 1) if padded else None
    ratios = torch.ones(2, len(SHAPES), 2, dtype=torch.float64)
    return Tokens(content, pos, torch.rand(2, total, 2, dtype=torch.float64), Grid(SHAPES, mask, ratios))


def levels(x: Tensor) -> list[Tensor]:
    parts = x.split([h * w for h, w in SHAPES], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, SHAPES, strict=True)]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_each_level_is_a_map_of_its_own(name: str) -> None:
    attention, given = built(name), tokens()
    assert given.grid is not None and given.grid.padding_mask is not None and given.pos is not None
    alone = [
        attention.on_map(x, pos, mask).flatten(1, 2)
        for x, pos, mask in zip(*map(levels, (given.content, given.pos, given.grid.padding_mask)), strict=True)
    ]
    torch.testing.assert_close(attention(given, given), torch.cat(alone, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_what_padding_holds_changes_nothing(name: str) -> None:
    attention, given = built(name), tokens()
    assert given.grid is not None and given.grid.padding_mask is not None and given.pos is not None
    hidden = given.grid.padding_mask[..., None]
    content = given.content.masked_fill(hidden, 1e4).requires_grad_()
    pos = given.pos.masked_fill(hidden, -1e3)
    other = replace(given, content=content, pos=pos)
    found = attention(other, other)
    visible = ~given.grid.padding_mask
    torch.testing.assert_close(found[visible], attention(given, given)[visible], rtol=0, atol=1e-10)
    assert found.isfinite().all()
    (gradient,) = torch.autograd.grad(found[visible].square().sum(), content)
    assert not gradient[given.grid.padding_mask].any()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_images_of_a_batch_do_not_meet(name: str) -> None:
    attention, given = built(name), tokens()
    content = given.content.clone().requires_grad_()
    now = replace(given, content=content)
    (gradient,) = torch.autograd.grad(attention(now, now)[0].square().sum(), content)
    assert gradient[0].any() and not gradient[1].any()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_positions_are_compared_and_not_given_out(name: str) -> None:
    attention, given = built(name), tokens(padded=False)
    assert given.pos is not None
    plain, nowhere = replace(given, pos=None), replace(given, pos=torch.zeros_like(given.pos))
    found, without = attention(given, given), attention(plain, plain)
    torch.testing.assert_close(attention(nowhere, nowhere), without, rtol=0, atol=1e-12)
    assert not torch.allclose(found, without)
    if name == "slide":  # its convolutions have a bias for each neighbour, so values differ without any content
        return
    # Values without content are biases alone: what is given out is then the same wherever a token looks.
    empty = replace(given, content=torch.zeros_like(given.content))
    blank = replace(empty, pos=None)
    torch.testing.assert_close(attention(empty, empty), attention(blank, blank), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_parameter_learns_and_16_bits_work(name: str) -> None:
    attention, given = built(name).float(), tokens()
    given = replace(given, content=given.content.float(), pos=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(given, given).float().square().sum().backward()
    for parameter_name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", ATTENTIONS)
def test_object_queries_are_refused(name: str) -> None:
    attention, given = built(name), tokens()
    queries = Tokens(torch.zeros(2, 5, WIDTH, dtype=torch.float64))
    for query, source in ((queries, given), (queries, queries)):
        with pytest.raises(ValueError, match="is for encoders, whose tokens lie on a map; object queries do not"):
            attention(query, source)
    with pytest.raises(ValueError, match="is for encoders"):
        attention(given, given, torch.zeros(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("bias", [True, False])
def test_positions_reach_queries_and_keys_only(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 15, bias=bias)
    x, pos = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    torch.testing.assert_close(project_qkv(linear, x, None), linear(x))
    found = project_qkv(linear, x, pos)
    torch.testing.assert_close(found[..., :10], linear(x + pos)[..., :10])
    torch.testing.assert_close(found[..., 10:], linear(x)[..., 10:])


def test_any_attention_of_an_encoder_reads_a_map() -> None:
    """As the stages of backbones call it: with the tokens in the order of the map, looking from their centres."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, WIDTH)
    dense = DenseAttention(WIDTH, HEADS)
    flat = Tokens(x.flatten(1, 2))
    torch.testing.assert_close(on_map(dense, x), dense(flat, flat).view(x.shape))
    deformable = MSDeformAttention(WIDTH, HEADS, num_levels=1, num_points=1)
    with torch.no_grad():  # each point falls on its own token, and all weights are one
        deformable.sampling_offsets.bias.zero_()
    expected = deformable.output_proj(deformable.value_proj(x))
    torch.testing.assert_close(on_map(deformable, x), expected, rtol=0, atol=1e-5)
    window = WindowAttention(WIDTH, HEADS, 2)
    assert torch.equal(on_map(window, x), window.on_map(x))
