from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from detfamily.blocks.position import (
    AtAttention,
    AtInput,
    LearnedPosition,
    LevelEmbed,
    Nowhere,
    SinePosition,
    sine_code,
)
from detfamily.structures import Tokens


def naive_code(x: float, features: int, temperature: float) -> list[float]:
    angles = [x / temperature ** (2 * (i // 2) / features) for i in range(features)]
    return [math.sin(angle) if i % 2 == 0 else math.cos(angle) for i, angle in enumerate(angles)]


def test_sine_code_of_single_numbers() -> None:
    numbers = [0.0, 0.3, 1.7, 2 * math.pi]
    expected = torch.tensor([naive_code(x, 12, 20.0) for x in numbers])
    torch.testing.assert_close(sine_code(torch.tensor(numbers), 12, 20.0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("offset", "temperature"), [(0.0, 10000.0), (-0.5, 10000.0), (0.0, 20.0)])
def test_sine_position_as_a_naive_loop(offset: float, temperature: float) -> None:
    masks = [torch.zeros(2, 5, 7, dtype=torch.bool), torch.zeros(2, 3, 4, dtype=torch.bool)]
    masks[0][1, 3:] = masks[0][1, :, 5:] = True
    masks[1][1, 2:] = masks[1][1, :, 3:] = True
    codes = SinePosition(16, temperature, offset)(masks)
    for mask, code in zip(masks, codes, strict=True):
        assert code.shape == (2, 16, *mask.shape[1:])
        for b, i, j in itertools.product(*(range(n) for n in mask.shape)):
            if mask[b, i, j]:
                continue
            rows = sum(not mask[b, k, j] for k in range(mask.shape[1]))
            columns = sum(not mask[b, i, k] for k in range(mask.shape[2]))
            y = (i + 1 + offset) / (rows + 1e-6) * 2 * math.pi
            x = (j + 1 + offset) / (columns + 1e-6) * 2 * math.pi
            expected = torch.tensor(naive_code(y, 8, temperature) + naive_code(x, 8, temperature))
            torch.testing.assert_close(code[b, :, i, j], expected, rtol=0, atol=1e-5)


def test_sine_position_needs_four_kinds_of_channels() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got embed_dim=18"):
        SinePosition(18)


def test_learned_position_is_column_then_row_and_ignores_padding() -> None:
    torch.manual_seed(0)
    position = LearnedPosition(8, size=6)
    mask = torch.rand(2, 3, 5) < 0.5
    (code,) = position([mask])
    assert code.shape == (2, 8, 3, 5)
    for b, i, j in itertools.product(range(2), range(3), range(5)):
        expected = torch.cat([position.col_embed.weight[j], position.row_embed.weight[i]])
        assert torch.equal(code[b, :, i, j], expected)
    for table in (position.row_embed, position.col_embed):
        assert ((table.weight >= 0) & (table.weight <= 1)).all()  # uniform, as officially


def test_learned_position_says_when_a_map_is_too_large() -> None:
    position = LearnedPosition(8, size=6)
    with pytest.raises(ValueError, match=r"feature map of 3x7 .* than the 6 learned positions.*position\.size=7"):
        position([torch.zeros(1, 3, 7, dtype=torch.bool)])
    with pytest.raises(ValueError, match="even width, got embed_dim=9"):
        LearnedPosition(9)


def test_level_embed_tells_levels_apart() -> None:
    embed = LevelEmbed(4, 2)
    codes = [torch.randn(2, 4, 3, 5), torch.randn(2, 4, 2, 2)]
    outputs = embed(codes)
    for level, (code, output) in enumerate(zip(codes, outputs, strict=True)):
        for channel in range(4):
            torch.testing.assert_close(output[:, channel], code[:, channel] + embed.weight[level, channel])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        embed(codes[:1])


def test_where_positions_enter() -> None:
    content, pos = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    tokens = Tokens(content)
    entries: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = [
        (AtAttention(), content, content + pos),
        (AtInput(), content + pos, content + pos),
        (Nowhere(), content, content),
    ]
    for entry, values, compared in entries:
        entered = entry(tokens, pos)
        assert torch.equal(entered.content, values)
        assert torch.equal(entered.with_pos(), compared)
    # what an encoder got at its attention must not stay where a decoder is to have none
    assert Nowhere()(AtAttention()(tokens, pos), pos).pos is None
