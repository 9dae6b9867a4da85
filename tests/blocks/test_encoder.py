from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from detfamily.attention import DenseAttention, SplitDenseAttention
from detfamily.blocks.encoder import Encoder, EncoderLayer
from detfamily.blocks.layers import MLP, FeedForward, PostNorm, PreNorm
from detfamily.blocks.position import SinePosition
from detfamily.blocks.tokens import resize_mask
from detfamily.structures import Grid, Tokens

WIDTH, HEADS, HIDDEN = 12, 3, 20
ATTENTION = partial(DenseAttention, embed_dim=WIDTH, num_heads=HEADS)
FFN = partial(FeedForward, embed_dim=WIDTH, hidden_dim=HIDDEN, activation=nn.ReLU)


OFFICIAL = {  # and PyTorch's
    "attention.in_proj.weight": "self_attn.in_proj_weight",
    "attention.in_proj.bias": "self_attn.in_proj_bias",
    "attention.out_proj.": "self_attn.out_proj.",
    "ffn.linear1.": "linear1.",
    "ffn.linear2.": "linear2.",
    "attention_residual.norm.": "norm1.",
    "ffn_residual.norm.": "norm2.",
}


def layer(pre_norm: bool = False, ffn: bool = True, attention: Callable[[], nn.Module] = ATTENTION) -> EncoderLayer:
    residual = partial(PreNorm if pre_norm else PostNorm, WIDTH)
    return EncoderLayer(attention, FFN if ffn else None, residual)


def tokens(pos: bool = True) -> Tokens:
    torch.manual_seed(0)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    grid = Grid(((1, 7),), padding, torch.ones(2, 1, 2))
    content, code = torch.randn(2, 2, 7, WIDTH)
    return Tokens(content, code if pos else None, torch.rand(2, 7, 2), grid)


def copy_from(ours: EncoderLayer, theirs: nn.TransformerEncoderLayer) -> None:
    state = {}
    for name, value in theirs.state_dict().items():
        (new, old) = next(pair for pair in OFFICIAL.items() if name.startswith(pair[1]))
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
    output = Encoder(layer, ATTENTION, 0, nn.Identity())(given)
    assert torch.equal(output.content, given.content)
    assert not list(Encoder(layer, ATTENTION, 0, nn.Identity()).parameters())


def test_layers_one_after_another_keep_position_and_geometry() -> None:
    encoder = Encoder(layer, ATTENTION, 3, nn.LayerNorm(WIDTH))
    given = tokens()
    x: Tensor = given.content
    for one in encoder.layers:
        x = one(Tokens(x, given.pos, given.reference_points, given.grid))
    output = encoder(given)
    torch.testing.assert_close(output.content, encoder.norm(x))
    assert output.pos is given.pos and output.grid is given.grid and output.reference_points is given.reference_points
    assert len({id(parameter) for parameter in encoder.parameters()}) == 3 * 12 + 2  # layers share nothing


def test_positions_are_scaled_by_what_each_layers_input_says() -> None:
    """The official DAB-DETR: before every layer, the first one, too; the positions themselves stay."""
    torch.manual_seed(0)
    encoder, given = Encoder(layer, ATTENTION, 3, nn.LayerNorm(WIDTH), pos_scale=nn.Linear(WIDTH, WIDTH)), tokens()
    assert encoder.pos_scale is not None and given.pos is not None
    x: Tensor = given.content
    for one in encoder.layers:
        x = one(Tokens(x, given.pos * encoder.pos_scale(x), given.reference_points, given.grid))
    output = encoder(given)
    torch.testing.assert_close(output.content, encoder.norm(x))
    assert output.pos is given.pos
    output.content.square().sum().backward()
    assert encoder.pos_scale.weight.grad is not None and encoder.pos_scale.weight.grad.any()


def test_without_positions_there_is_nothing_to_scale() -> None:
    encoder, given = Encoder(layer, ATTENTION, 1, nn.Identity(), pos_scale=nn.Linear(WIDTH, WIDTH)), tokens(pos=False)
    torch.testing.assert_close(encoder(given).content, encoder.layers[0](given))


def test_attentions_take_turns() -> None:
    """One for each layer of a list, from the start again where there are more layers."""
    split = partial(SplitDenseAttention, embed_dim=WIDTH, num_heads=HEADS)
    encoder = Encoder(layer, [ATTENTION, split], 4, nn.Identity())
    kinds = [type(cast("EncoderLayer", one).attention) for one in encoder.layers]
    assert kinds == [DenseAttention, SplitDenseAttention] * 2
    assert encoder(tokens()).content.shape == (2, 7, WIDTH)
    for attentions, count in (([ATTENTION, split], 3), ([], 2)):
        with pytest.raises(ValueError, match=f"lists {len(attentions)} attentions for encoder.num_layers={count}"):
            Encoder(layer, attentions, count, nn.Identity())


@pytest.mark.parametrize("family", ["dab_detr", "dn_dab_detr"])
@torch.no_grad()
def test_official_encoder_with_scaled_positions(goldens: Path, family: str) -> None:
    """From the projected map to the memory, and what the positions are multiplied by."""
    folder = goldens / family / "base"
    io, weights = load_file(folder / "io.safetensors"), load_file(folder / "weights.safetensors")
    hidden = weights["transformer.encoder.layers.0.linear1.bias"].shape[0]
    encoder = Encoder(
        partial(
            EncoderLayer,
            ffn=partial(FeedForward, 64, hidden, nn.PReLU),
            residual=partial(PostNorm, 64),
        ),
        partial(DenseAttention, 64, 8),
        2,
        nn.Identity(),
        pos_scale=MLP(64, 64, 64, 2),
    )
    names = {**OFFICIAL, "ffn.activation.": "activation."}
    state = {}
    for name in encoder.state_dict():
        if name.startswith("pos_scale."):
            state[name] = weights[name.replace("pos_scale.", "transformer.encoder.query_scale.")]
        else:
            _, index, rest = name.split(".", 2)
            (ours, theirs) = next(pair for pair in names.items() if rest.startswith(pair[0]))
            state[name] = weights[f"transformer.encoder.layers.{index}.{rest.replace(ours, theirs)}"]
    encoder.load_state_dict(state)
    mask = resize_mask(io["mask"], io["features.0"].shape[-2:])
    pos = SinePosition(64, temperature=20.0)([mask])[0].flatten(2).transpose(1, 2)
    grid = Grid((tuple(mask.shape[-2:]),), mask.flatten(1), torch.ones(2, 1, 2))
    content = nn.functional.conv2d(io["features.0"], weights["input_proj.weight"], weights["input_proj.bias"])
    scales: list[Tensor] = []
    assert encoder.pos_scale is not None
    encoder.pos_scale.register_forward_hook(lambda module, inputs, output: scales.append(output))
    memory = encoder(Tokens(content.flatten(2).transpose(1, 2), pos, grid=grid))
    torch.testing.assert_close(memory.content, io["mid.encoder_memory"], rtol=0, atol=3e-5)
    assert len(scales) == 2
    if family == "dab_detr":
        for index, scale in enumerate(scales):
            torch.testing.assert_close(scale, io[f"mid.encoder_pos_scale.{index}"], rtol=0, atol=3e-5)
