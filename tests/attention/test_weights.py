"""The weights that pictures show: compared with PyTorch's, with naive loops, and with what the attention gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from detfamily.attention import (
    AxialAttention,
    ConditionalAttention,
    DeformableAttention,
    DeformableAttention2022,
    DenseAttention,
    LevelConditionalAttention,
    MapAttention,
    MSDeformAttention,
    NeighborhoodAttention,
    OwnLevelDeformAttention,
    PooledAttention,
    PyramidAttention,
    RescaledSine,
    SplitDenseAttention,
    WindowAttention,
)
from detfamily.attention.deformable import FewKeysAttention
from detfamily.structures import Grid, Queries, Tokens

WIDTH, HEADS = 12, 3
SHAPES = ((4, 5), (2, 3))
COUNT = 26


def memory(padded: bool = True) -> Tokens:
    torch.manual_seed(1)
    mask = torch.zeros(1, COUNT, dtype=torch.bool)
    mask[:, 15:20] = mask[:, 23:] = padded
    ratios = torch.tensor([[[1.0, 0.75], [1.0, 0.5]]] if padded else [[[1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    content, pos = torch.randn(2, 1, COUNT, WIDTH, dtype=torch.float64)
    points = torch.rand(1, COUNT, 2, dtype=torch.float64)
    return Tokens(content, pos, points, Grid(SHAPES, mask if padded else None, ratios))


def queries(reference_dim: int = 2) -> Queries:
    torch.manual_seed(2)
    content, pos, sine = torch.randn(3, 1, 7, WIDTH, dtype=torch.float64)
    return Queries(content, pos, torch.rand(1, 7, reference_dim, dtype=torch.float64), sine=sine)


def alive(module: nn.Module) -> nn.Module:
    """In double precision, with biases and all else away from their start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return module.double().eval()


@pytest.mark.parametrize("masked", [False, True])
def test_dense_weights_are_pytorchs(masked: bool) -> None:
    ours = alive(DenseAttention(WIDTH, HEADS))
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    theirs.load_state_dict({
        "in_proj_weight": ours.in_proj.weight, "in_proj_bias": ours.in_proj.bias,
        "out_proj.weight": ours.out_proj.weight, "out_proj.bias": ours.out_proj.bias,
    })  # fmt: skip
    query, source = queries(), memory()
    mask = torch.rand(7, COUNT) < 0.3 if masked else None
    assert source.grid is not None
    _, expected = theirs(
        query.with_pos(), source.with_pos(), source.content, source.grid.padding_mask, True, mask, False
    )
    for index in (0, 6):
        found = ours.weights(query, source, index, mask)
        torch.testing.assert_close(found, expected[:, :, index], rtol=0, atol=1e-12)
    among = theirs(query.with_pos(), query.with_pos(), query.content, average_attn_weights=False)[1]
    torch.testing.assert_close(ours.weights(query, query, 3), among[:, :, 3], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "attention",
    [
        DenseAttention(WIDTH, HEADS),
        ConditionalAttention(WIDTH, HEADS, add_query_pos=True),
        LevelConditionalAttention(WIDTH, HEADS, num_levels=2),
        RescaledSine(lambda: ConditionalAttention(WIDTH, HEADS), WIDTH),
    ],
    ids=lambda one: type(one).__name__,
)
def test_weights_make_the_output_of_the_values(attention: nn.Module) -> None:
    inner = attention.attention if isinstance(attention, RescaledSine) else attention
    alive(attention)
    query, source = queries(), memory()
    given = attention(query, source)
    weights = attention.weights(query, source, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, HEADS).double())
    assert weights.min() >= 0 and not weights[..., source.grid.padding_mask[0]].any()
    if isinstance(inner, DenseAttention):
        values = source.content @ inner.in_proj.weight[2 * WIDTH :].T + inner.in_proj.bias[2 * WIDTH :]
    else:
        values = inner.value_proj(source.content)
    mixed = torch.einsum("bms,bsmc->bmc", weights, values.unflatten(-1, (HEADS, -1)))
    torch.testing.assert_close(inner.out_proj(mixed.flatten(1)), given[:, 4])


def test_weights_among_queries_keep_to_the_mask() -> None:
    attention, query = alive(SplitDenseAttention(WIDTH, HEADS)), queries()
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[2, 4:] = True
    weights = attention.weights(query, query, 2, mask)
    assert not weights[..., 4:].any() and weights[..., :4].all()


@torch.no_grad()
@pytest.mark.parametrize("reference_dim", [2, 4])
def test_sampling_is_computed_as_the_paper_says(reference_dim: int) -> None:
    attention, points = alive(MSDeformAttention(WIDTH, HEADS, 2, 4)), 4
    query, source = queries(reference_dim), memory()
    found = attention.sampling(query, source, 5)
    assert found.levels == (0, 1)
    one = query.with_pos()[0, 5]
    offsets = (attention.sampling_offsets.weight @ one + attention.sampling_offsets.bias).tolist()
    logits = (attention.attention_weights.weight @ one + attention.attention_weights.bias).tolist()
    for head in range(HEADS):
        exponentials = [math.exp(logit) for logit in logits[head * 2 * points : (head + 1) * 2 * points]]
        for level, (h, w) in enumerate(SHAPES):
            ratio = source.grid.valid_ratios[0, level].tolist()
            reference = query.reference_points[0, 5].tolist()
            for point in range(points):
                at = (head * 2 + level) * points + point
                for axis, side in enumerate((w, h)):
                    step = 1 / side if reference_dim == 2 else 0.5 * reference[2 + axis] * ratio[axis] / points
                    wanted = reference[axis] * ratio[axis] + offsets[2 * at + axis] * step
                    assert float(found.locations[0, head, level, point, axis]) == pytest.approx(wanted, abs=1e-12)
                share = exponentials[level * points + point] / sum(exponentials)
                assert float(found.weights[0, head, level, point]) == pytest.approx(share, abs=1e-12)


def test_a_token_samples_its_own_level() -> None:
    attention, source = alive(OwnLevelDeformAttention(WIDTH, HEADS, 4)), memory(padded=False)
    for index, level in ((0, 0), (19, 0), (20, 1), (25, 1)):
        found = attention.sampling(source, source, index)
        assert found.levels == (level,) and found.locations.shape == (1, HEADS, 1, 4, 2)
        h, w = SHAPES[level]
        offsets = attention.attention.sampling_offsets(source.with_pos()[0, index]).view(HEADS, 4, 2)
        wanted = source.reference_points[0, index] + offsets / torch.tensor([w, h])
        torch.testing.assert_close(found.locations[0, :, 0], wanted)


def maps(padded: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(4)
    x, pos = torch.randn(2, 1, 7, 9, WIDTH, dtype=torch.float64)
    mask = torch.zeros(1, 7, 9, dtype=torch.bool)
    mask[:, 5:] = mask[:, :, 8:] = True
    return x, pos, mask if padded else None


ON_MAPS = {
    "window": lambda: WindowAttention(WIDTH, HEADS, 4),
    "shifted": lambda: WindowAttention(WIDTH, HEADS, 4, shift=2),
    "without biases": lambda: WindowAttention(WIDTH, HEADS, 3, qkv_bias=False, position_bias=False),
    "neighborhood": lambda: NeighborhoodAttention(WIDTH, HEADS, 3),
    "dilated": lambda: NeighborhoodAttention(WIDTH, HEADS, 3, dilation=2, position_bias=True),
    "filled up": lambda: NeighborhoodAttention(WIDTH, HEADS, 9, pad_small_maps=True),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ON_MAPS)
def test_weights_on_a_map_make_the_output(name: str, padded: bool) -> None:
    attention = alive(ON_MAPS[name]())
    assert isinstance(attention, MapAttention)
    x, pos, mask = maps(padded)
    bias = torch.zeros(3 * WIDTH) if attention.qkv.bias is None else attention.qkv.bias
    for place in ((0, 0), (4, 3), (3, 7)):
        before = [one.clone() for one in attention.parameters()]
        weights = attention.weights_on_map(x, place, pos, mask)
        assert all(torch.equal(a, b) for a, b in zip(before, attention.parameters(), strict=True))
        values = (x @ attention.qkv.weight[2 * WIDTH :].T).unflatten(-1, (HEADS, -1))
        mixed = torch.einsum("bmhw,bhwmc->bmc", weights, values).flatten(1) + bias[2 * WIDTH :]
        torch.testing.assert_close(attention.proj(mixed), attention.on_map(x, pos, mask)[:, place[0], place[1]])
        assert weights.min() >= 0 and (not padded or not weights[:, :, mask[0]].any())


def test_weights_in_a_window_are_those_of_the_formula() -> None:
    attention = alive(WindowAttention(WIDTH, HEADS, 3, position_bias=False))
    x, pos, _ = maps(False)
    weights = attention.weights_on_map(x[:, :6], (4, 1), pos[:, :6])
    q, k, _ = attention.qkv(x + pos).chunk(3, -1)
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        wanted = torch.zeros(6, 9, dtype=torch.float64)
        for row in range(3, 6):
            for column in range(3):
                wanted[row, column] = (q[0, 4, 1, part] @ k[0, row, column, part] / (WIDTH // HEADS) ** 0.5).exp()
        torch.testing.assert_close(weights[0, head], wanted / wanted.sum())


def test_axial_weights_are_those_of_a_row_and_a_column() -> None:
    attention = alive(AxialAttention(WIDTH, HEADS))
    x, pos, _ = maps(False)
    weights = attention.weights_on_map(x, (2, 5), pos)[0]
    cross = torch.zeros(7, 9, dtype=torch.bool)
    cross[2], cross[:, 5] = True, True
    assert (weights[:, cross] > 0).all() and not weights[:, ~cross].any()
    torch.testing.assert_close(weights.sum((1, 2)), torch.full((HEADS,), 2.0).double())  # a softmax for each
    values = attention.qkv(x)[..., 2 * WIDTH :].unflatten(-1, (HEADS, -1))[0]
    mixed = torch.einsum("mhw,hwmc->mc", weights, values).flatten()
    torch.testing.assert_close(attention.proj(mixed), attention.on_map(x, pos)[0, 2, 5])


FEW_KEYS = {
    "deformable": lambda: DeformableAttention(WIDTH, HEADS, 3, stride=2, kernel_size=3),
    "deformable, far": lambda: DeformableAttention(WIDTH, HEADS, 1, stride=2, kernel_size=3, offset_range_factor=2.0),
    "deformable 2022": lambda: DeformableAttention2022(WIDTH, HEADS, 3, stride=2, kernel_size=3),
    "pooled": lambda: PooledAttention(WIDTH, HEADS, stride=2),
    "pyramid": lambda: PyramidAttention(WIDTH, HEADS, reduction=3),
}


def bilinear(x: Tensor, place: Tensor) -> Tensor:
    """(C,) what lies at x, y in (0, 1) of a map (h, w, C), from the centres of its tokens; zeros beyond."""
    h, w, _ = x.shape
    column, row = (float(place[0]) * w - 0.5, float(place[1]) * h - 0.5)
    found = torch.zeros(x.shape[-1], dtype=x.dtype)
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < h and 0 <= c < w:
                found += (1 - abs(row - r)) * (1 - abs(column - c)) * x[r, c]
    return found


@pytest.mark.parametrize("name", FEW_KEYS)
def test_keys_and_their_weights_make_the_output(name: str) -> None:
    attention = alive(FEW_KEYS[name]())
    assert isinstance(attention, FewKeysAttention)
    x, pos, _ = maps(False)
    start, places = attention.key_places(x, pos)
    weights = attention.key_weights(x, (4, 3), pos)
    groups = places.shape[1]
    assert weights.shape == (1, HEADS, len(start)) and places.shape == (1, groups, len(start), 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, HEADS).double())
    if isinstance(attention, DeformableAttention):
        read = torch.stack([
            torch.cat([bilinear(x[0], place[key])[group * WIDTH // groups : (group + 1) * WIDTH // groups]
                       for group, place in enumerate(places[0])])
            for key in range(len(start))
        ])  # fmt: skip
    else:
        read = (attention._means(x) if isinstance(attention, PooledAttention) else attention._reduced(x)).flatten(1, 2)[
            0
        ]
    values = attention.v(read).unflatten(-1, (HEADS, -1))
    mixed = torch.einsum("mn,nmc->mc", weights[0], values).flatten()
    torch.testing.assert_close(attention.proj(mixed), attention.on_map(x, pos)[0, 4, 3])


def test_keys_that_do_not_move_are_the_middles_of_their_cells() -> None:
    start, places = PooledAttention(WIDTH, HEADS, stride=2).key_places(torch.zeros(1, 4, 6, WIDTH))
    rows, columns = (0.25, 0.75), (1 / 6, 0.5, 5 / 6)
    torch.testing.assert_close(start, torch.tensor([(x, y) for y in rows for x in columns]))
    assert torch.equal(places[0, 0], start)
