"""Deformable attention against loops over single tokens and keys, with the formulas of the official code."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detfamily.attention.deformable import DeformableAttention, DeformableAttention2022, PooledAttention, sample
from detfamily.attention.deformable_position import ConvPosition, FixedBias, Layout, LogBias, PositionBias, TableBias
from detfamily.structures import Grid, Tokens

from .map_checks import (
    check_gradients,
    check_padding,
    check_positions,
    check_sixteen_bits,
    check_sizes,
    drawn,
    hidden_at,
)

TABLE = partial(TableBias, size=(3, 5))
KINDS: list[Any] = [None, TABLE, partial(TableBias, size=(2, 4)), LogBias, ConvPosition]
SETTINGS = [
    # (h, w), stride, kernel, factor
    ((3, 5), 2, 3, -1.0),
    ((3, 5), 2, 5, 2.0),
    ((2, 5), 2, 2, -1.0),
    ((5, 4), 2, 2, 1.5),
    ((3, 5), 2, 4, -1.0),
    ((2, 3), 1, 3, 0.0),
]


def attention(cls=DeformableAttention, stride=2, kernel_size=3, factor=-1.0, bias=None, width=16, groups=2):
    return drawn(cls(width, 4, groups, stride, kernel_size, factor, bias))


def read(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The (h, w, ...) image at one place in tokens, bilinear, zero beyond it."""
    h, w = image.shape[:2]
    top, left = math.floor(y.item()), math.floor(x.item())
    total = torch.zeros_like(image[0, 0])
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < h and 0 <= column < w:
                total = total + image[row, column] * (1 - (y - row).abs()) * (1 - (x - column).abs())
    return total


def offsets_by_loops(module: DeformableAttention, q: Tensor, group: int) -> list[list[Tensor]]:
    """What the network says for each key of a group, from the queries of one image (h, w, C)."""
    h, w, width = q.shape
    conv = module.offsets.conv
    channels, kernel, (padding, _), (stride, _) = width // module.num_groups, conv.weight, conv.padding, conv.stride
    side = kernel.shape[-1]
    own = q[..., group * channels : (group + 1) * channels]
    result = []
    for i in range((h + 2 * padding - side) // stride + 1):
        result.append([])
        for j in range((w + 2 * padding - side) // stride + 1):
            total = conv.bias
            for a in range(side):
                for b in range(side):
                    y, x = i * stride - padding + a, j * stride - padding + b
                    if 0 <= y < h and 0 <= x < w:
                        total = total + kernel[:, 0, a, b] * own[y, x]
            result[-1].append(module.offsets.out(F.gelu(module.offsets.norm(total))))
    return result


def by_loops(module: DeformableAttention, x: Tensor, pos: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
    of_2022 = isinstance(module, DeformableAttention2022)
    batch, h, w, width = x.shape
    heads, groups, factor = module.num_heads, module.num_groups, module.offset_range_factor
    depth, channels = width // heads, width // groups
    pos = torch.zeros_like(x) if pos is None else pos
    output = []
    for image in range(batch):
        shown = torch.ones(h, w, 1) if hidden is None else (~hidden[image])[..., None].double()
        value_map, key_map = x[image] * shown, (x[image] + pos[image]) * shown
        q = module.q(key_map)
        rows, columns = [], []
        places: list[list[tuple[Tensor, Tensor]]] = []
        for group in range(groups):
            said = offsets_by_loops(module, q * shown, group)
            rows, columns = range(len(said)), range(len(said[0]))
            places.append([])
            for i in rows:
                for j in columns:
                    place = []
                    for index, count, offset in zip((i, j), (len(rows), len(columns)), said[i][j], strict=True):
                        steps = count if of_2022 else count - 1
                        start = (index + 0.5) / steps * 2 - 1 if steps else math.inf
                        if factor < 0:
                            place.append(torch.tanh(start + offset) if of_2022 else (start + offset).clamp(-1, 1))
                        elif of_2022 and factor == 0:
                            place.append(start + offset)
                        else:
                            distance = torch.tensor(1 / steps).double()  # officially of the default type, float32
                            place.append(start + offset.tanh() * distance * factor)
                    places[-1].append((place[0], place[1]))
        count = len(places[0])
        keys, values = ([torch.zeros(width).double()] * count for _ in range(2))
        for n in range(count):
            at = [((py + 1) / 2 * (h - 1), (px + 1) / 2 * (w - 1)) for py, px in (places[g][n] for g in range(groups))]
            parts = [slice(g * channels, (g + 1) * channels) for g in range(groups)]
            keys[n] = module.k(torch.cat([read(key_map[..., p], *a) for p, a in zip(parts, at, strict=True)]))
            values[n] = module.v(torch.cat([read(value_map[..., p], *a) for p, a in zip(parts, at, strict=True)]))
        left = [
            n
            for n in range(count)
            if hidden is None
            or shown[min(n // len(columns) * module.stride, h - 1), min(n % len(columns) * module.stride, w - 1), 0]
        ]
        split = [torch.stack([one[n] for n in left]).unflatten(-1, (heads, depth)) for one in (keys, values)]
        for r in range(h):
            for c in range(w):
                logits = torch.einsum("md,nmd->nm", q[r, c].unflatten(-1, (heads, depth)), split[0]) / math.sqrt(depth)
                bias = [[bias_by_loops(module, g, (r, c), (h, w), places[g][n]) for g in range(groups)] for n in left]
                if isinstance(module.position_bias, TableBias | LogBias):
                    logits = logits + torch.stack([torch.cat(row) for row in bias])
                mixed = torch.einsum("nm,nmd->md", logits.softmax(0), split[1]).flatten()
                if isinstance(module.position_bias, ConvPosition):
                    mixed = mixed + conv_by_loops(module.position_bias.conv, q * shown, r, c)
                output.append(module.proj(mixed))
    return torch.stack(output).view(x.shape)


def bias_by_loops(module, group: int, query, size, key) -> Tensor | None:
    """For all heads of a group, one query and one key."""
    bias = module.position_bias
    of_2022 = isinstance(module, DeformableAttention2022)
    own = []
    for index, side in zip(query, size, strict=True):
        own.append((index + 0.5) / side * 2 - 1 if of_2022 else (index / (side - 1) * 2 - 1 if side > 1 else -1.0))
    dy, dx = own[0] - key[0], own[1] - key[1]
    if isinstance(bias, TableBias):
        tables = bias.table.chunk(module.num_groups)[group].permute(1, 2, 0)
        height, width = tables.shape[:2]
        return read(tables, (dy / 2 + 1) / 2 * (height - 1), (dx / 2 + 1) / 2 * (width - 1))
    if isinstance(bias, LogBias):
        logs = [torch.sign(d) * torch.log2(4 * d.abs() + 1) / 3 for d in (dy, dx)]
        return bias.out(F.relu(bias.hidden(torch.stack(logs))))
    return None


def conv_by_loops(conv, q: Tensor, r: int, c: int) -> Tensor:
    total = conv.bias
    for a in range(3):
        for b in range(3):
            if 0 <= r + a - 1 < q.shape[0] and 0 <= c + b - 1 < q.shape[1]:
                total = total + conv.weight[:, 0, a, b] * q[r + a - 1, c + b - 1]
    return total


@pytest.mark.parametrize(("size", "stride", "kernel_size", "factor"), SETTINGS)
@pytest.mark.parametrize("cls", [DeformableAttention, DeformableAttention2022])
def test_keys_move_and_are_read_between_tokens(cls, size, stride, kernel_size, factor) -> None:
    module = attention(cls, stride, kernel_size, factor, TABLE)
    x = torch.randn(1, *size, 16).double().requires_grad_()
    check_gradients(module.on_map(x), by_loops(module, x), [x, *module.parameters()])


@pytest.mark.parametrize("bias", KINDS)
@pytest.mark.parametrize("cls", [DeformableAttention, DeformableAttention2022])
def test_what_positions_add(cls, bias) -> None:
    module = attention(cls, bias=bias)
    x = torch.randn(1, 4, 3, 16).double().requires_grad_()
    check_gradients(module.on_map(x), by_loops(module, x), [x, *module.parameters()])


@pytest.mark.parametrize("bias", [None, TABLE, ConvPosition])
def test_positions_and_padding(bias) -> None:
    module = attention(bias=bias)
    mask = hidden_at(4, 5, (4, 3), (1, 4))
    x, pos = (torch.randn(2, 4, 5, 16).double().requires_grad_() for _ in range(2))
    ours, expected = (f[~mask] for f in (module.on_map(x, pos, mask), by_loops(module, x, pos, mask)))
    check_gradients(ours, expected, [x, pos, *module.parameters()])


@pytest.mark.parametrize("size", [(5, 7), (4, 9)])
def test_a_fixed_table_is_interpolated_over_queries_and_keys(size: tuple[int, int]) -> None:
    bias = drawn(FixedBias(Layout(16, 4, 2, stride=2), size=(5, 7)))
    assert bias.table.shape == (4, 35, 6)
    h, w = size
    queries, keys = torch.zeros(h * w, 2).double(), torch.zeros(2, 2, (h // 2) * (w // 2), 2).double()
    found = bias.to_logits(queries, keys)
    for n in range(h * w):
        for k in range(keys.shape[2]):
            y, x = torch.tensor([n * 34 / (h * w - 1), k * 5 / (keys.shape[2] - 1)], dtype=torch.float64)
            torch.testing.assert_close(found[0, :, n, k], read(bias.table.permute(1, 2, 0), y, x), rtol=0, atol=1e-12)


def test_a_fixed_table_is_added() -> None:
    module = attention(bias=partial(FixedBias, size=(5, 7)), kernel_size=2)
    x = torch.randn(1, 5, 7, 16).double()
    q, places = module.q(x), module.places(module.q(x))
    heads = (one.unflatten(-1, (4, 4)).transpose(1, 2) for one in (q.flatten(1, 2), module.k(sample(x, places))))
    logits = torch.einsum("bmqd,bmkd->bmqk", *heads) / 2
    values = module.v(sample(x, places)).unflatten(-1, (4, 4)).transpose(1, 2)
    expected = module.proj(((logits + module.position_bias.table).softmax(-1) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module.on_map(x), expected.view(x.shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 3)])
def test_without_offsets_keys_are_means_of_cells(size: tuple[int, int]) -> None:
    module = drawn(PooledAttention(16, 4, stride=2))
    mask = hidden_at(*size, size, (min(3, size[0]), 2))
    x, pos = (torch.randn(2, *size, 16).double().requires_grad_() for _ in range(2))

    def means(one: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        rows, columns = (range(0, max(side - side % 2, 1), 2) for side in size)
        cells = [one[i : i + 2, j : j + 2].flatten(0, 1).mean(0) for i in rows for j in columns]
        return torch.stack(cells), [(i, j) for i in rows for j in columns]

    output = []
    for image in range(2):
        shown = (~mask[image])[..., None].double()
        values, corners = means(x[image] * shown)
        keys, _ = means((x[image] + pos[image]) * shown)
        left = [n for n, (i, j) in enumerate(corners) if shown[i, j, 0]]
        q, k, v = (
            one.unflatten(-1, (4, 4)).transpose(0, 1)
            for one in (
                module.q((x[image] + pos[image]) * shown).flatten(0, 1),
                module.k(keys[left]),
                module.v(values[left]),
            )
        )
        mixed = (q @ k.transpose(1, 2) / 2).softmax(-1) @ v
        output.append(module.proj(mixed.transpose(0, 1).flatten(1)).view(*size, 16))
    ours = module.on_map(x, pos, mask)[~mask]
    check_gradients(ours, torch.stack(output)[~mask], [x, pos, *module.parameters()])


ALL = [
    *(partial(attention, bias=bias) for bias in (*KINDS, partial(FixedBias, size=(4, 4)))),
    partial(attention, DeformableAttention2022, factor=2.0, bias=TABLE),
    partial(attention, stride=3, kernel_size=3, bias=TABLE),
    lambda: drawn(PooledAttention(16, 4, 2)),
]


@pytest.mark.parametrize("make", ALL)
def test_padding(make) -> None:
    check_padding(make())


@pytest.mark.parametrize("make", ALL)
def test_any_size(make) -> None:
    check_sizes(make())


@pytest.mark.parametrize("make", ALL)
def test_positions(make) -> None:
    check_positions(make())


@pytest.mark.parametrize("make", ALL)
def test_sixteen_bits(make) -> None:
    check_sixteen_bits(make())


def test_a_single_key_is_at_the_last_token() -> None:
    """As officially: it starts infinitely far, and is brought back."""
    module = attention(stride=7, kernel_size=7)
    places = module.places(torch.randn(2, 9, 8, 16).double())
    assert places.shape == (2, 2, 1, 1, 2) and bool((places == 1).all())


@pytest.mark.parametrize("cls", [DeformableAttention, DeformableAttention2022])
def test_keys_that_do_not_move_form_a_grid(cls: type[DeformableAttention]) -> None:
    module = attention(cls, factor=1e-300)
    places = module.places(torch.randn(1, 7, 9, 16).double())[0, 0]
    rows, columns = (4, 5) if cls is DeformableAttention2022 else (3, 4)
    torch.testing.assert_close(places[:, 0, 0], (torch.arange(4).double() * 2 + 1) / rows - 1)
    torch.testing.assert_close(places[0, :, 1], (torch.arange(5).double() * 2 + 1) / columns - 1)


def test_samples_of_16_bits_are_where_those_of_32_are() -> None:
    x = torch.arange(300.0).view(1, 1, 300, 1).expand(1, 2, 300, 2)
    places = torch.tensor([0.0, 0.1234567]).view(1, 1, 1, 1, 2)
    (found,) = sample(x.double(), places.double()).unique()
    assert float(found) == pytest.approx(1.1234567 / 2 * 299, abs=1e-6)
    narrow = sample(x.bfloat16(), places)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float().unique(), found.bfloat16().float()[None], rtol=2**-7, atol=0)


def test_in_an_encoder() -> None:
    """Each level is a map of its own."""
    module = attention(bias=TABLE)
    shapes = ((6, 5), (3, 2))
    content, pos = torch.randn(2, 36, 16).double(), torch.randn(2, 36, 16).double()
    mask = torch.cat([hidden_at(*shape, shape, (2, 2)).flatten(1) for shape in shapes], 1)
    tokens = Tokens(content, pos, grid=Grid(shapes, mask, torch.ones(2, 2, 2)))
    found = module(tokens, tokens)
    start = 0
    for h, w in shapes:
        own = slice(start, start + h * w)
        expected = module.on_map(*(one[:, own].view(2, h, w, -1) for one in (content, pos)), mask[:, own].view(2, h, w))
        torch.testing.assert_close(found[:, own], expected.flatten(1, 2), rtol=0, atol=1e-12)
        start += h * w


def test_tables_start_small_and_the_rest_as_pytorch_has_it() -> None:
    torch.manual_seed(0)
    module = DeformableAttention(64, 4, 2, 2, 5, -1.0, TABLE)
    assert 0.009 < module.position_bias.table.std().item() < 0.011
    assert module.q.weight.abs().max().item() <= 1 / 8 and module.q.weight.std().item() == pytest.approx(
        1 / 8 / 3**0.5, rel=0.03
    )


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_a_single_key_cannot_be_bounded(factor: float) -> None:
    with pytest.raises(ValueError, match=r"1 x 4 keys 2 tokens apart.*use -1, or a smaller stride"):
        attention(factor=factor).on_map(torch.randn(1, 2, 8, 16).double())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((16, 3, 1, 2, 3), "num_heads=3 does not divide embed_dim=16"),
        ((16, 4, 3, 2, 3), "num_groups=3 does not divide num_heads=4"),
        ((16, 4, 0, 2, 3), "num_groups=0 does not divide num_heads=4"),
        ((16, 4, 2, 0, 3), "stride=0: expected at least 1 token"),
        ((16, 4, 2, 2, 0), "kernel_size=0: expected at least 1 token"),
    ],
)
def test_settings_that_make_no_sense(settings: tuple[int, int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeformableAttention(*settings)


@pytest.mark.parametrize("kind", [TableBias, FixedBias])
def test_sizes_of_tables(kind: type[PositionBias]) -> None:
    for size in ([4], [4, 0]):
        with pytest.raises(ValueError, match="expected the height and the width of a map"):
            kind(Layout(16, 4, 2, 2), size=size)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"size=\[3, 8\]: there is no key on such a map, as they are 4 tokens apart"):
        FixedBias(Layout(16, 4, 2, 4), size=[3, 8])
