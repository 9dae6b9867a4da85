from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from detfamily.attention import DenseAttention
from detfamily.blocks.encoder import Encoder, EncoderLayer
from detfamily.blocks.layers import FeedForward, PostNorm, PreNorm
from detfamily.structures import Grid, Tokens

WIDTH, HEADS, HIDDEN = 12, 3, 20
ATTENTION = partial(DenseAttention, embed_dim=WIDTH, num_heads=HEADS)
FFN = partial(FeedForward, embed_dim=WIDTH, hidden_dim=HIDDEN, activation=nn.ReLU)


def layer(pre_norm: bool = False, ffn: bool = True) -> EncoderLayer:
    residual = partial(PreNorm if pre_norm else PostNorm, WIDTH)
    return EncoderLayer(ATTENTION, FFN if ffn else None, residual)


def tokens(pos: bool = True) -> Tokens:
    torch.manual_seed(0)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    grid = Grid(((1, 7),), padding, torch.ones(2, 1, 2))
    content, code = torch.randn(2, 2, 7, WIDTH)
    return Tokens(content, code if pos else None, torch.rand(2, 7, 2), grid)


def copy_from(ours: EncoderLayer, theirs: nn.TransformerEncoderLayer) -> None:
    names = {
        "self_attn.in_proj_weight": "attention.in_proj.weight",
        "self_attn.in_proj_bias": "attention.in_proj.bias",
        "self_attn.out_proj.": "attention.out_proj.",
        "linear1.": "ffn.linear1.",
        "linear2.": "ffn.linear2.",
        "norm1.": "attention_residual.norm.",
        "norm2.": "ffn_residual.norm.",
    }
    state = {}
    for name, value in theirs.state_dict().items():
        (old, new) = next(pair for pair in names.items() if name.startswith(pair[0]))
        state[name.replace(old, new)] = value
    ours.load_state_dict(state)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_layer_without_positions_is_pytorchs(pre_norm: bool) -> None:
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=pre_norm)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = layer(pre_norm)
    copy_from(ours, theirs)
    given = tokens(pos=False)
    assert given.grid is not None and given.grid.padding_mask is not None
    expected = theirs(given.content, src_key_padding_mask=given.grid.padding_mask)
    torch.testing.assert_close(ours(given), expected)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_positions_are_added_after_the_norm_and_not_to_values(pre_norm: bool) -> None:
    ours, given = layer(pre_norm, ffn=False), tokens()
    assert given.pos is not None and given.grid is not None
    attention, norm = ours.attention, ours.attention_residual.norm
    x = given.content
    inner = norm(x) if pre_norm else x
    attended = attention(Tokens(inner, given.pos, grid=given.grid), Tokens(inner, given.pos, grid=given.grid))
    expected = x + attended if pre_norm else norm(x + attended)
    torch.testing.assert_close(ours(given), expected)


def test_without_ffn_its_residual_is_gone_too() -> None:
    names = [name for name, _ in layer(ffn=False).named_parameters()]
    assert names and not [name for name in names if "ffn" in name]


def test_no_layers_change_nothing() -> None:
    given = tokens()
    output = Encoder(layer, 0, nn.Identity())(given)
    assert torch.equal(output.content, given.content)
    assert not list(Encoder(layer, 0, nn.Identity()).parameters())


def test_layers_one_after_another_keep_position_and_geometry() -> None:
    encoder = Encoder(layer, 3, nn.LayerNorm(WIDTH))
    given = tokens()
    x: Tensor = given.content
    for one in encoder.layers:
        x = one(Tokens(x, given.pos, given.reference_points, given.grid))
    output = encoder(given)
    torch.testing.assert_close(output.content, encoder.norm(x))
    assert output.pos is given.pos and output.grid is given.grid and output.reference_points is given.reference_points
    assert len({id(parameter) for parameter in encoder.parameters()}) == 3 * 12 + 2  # layers share nothing
