from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from detfamily.attention import ConditionalAttention, LevelConditionalAttention, RescaledSine, SplitDenseAttention
from detfamily.blocks.decoder import DecoderLayer
from detfamily.blocks.layers import FeedForward, PostNorm
from detfamily.structures import Grid, Queries, Tokens

WIDTH, HEADS = 12, 3
HEAD = WIDTH // HEADS
SHAPES = ((2, 3), (1, 2))
Module = TypeVar("Module", bound=nn.Module)
CROSS = {
    "conditional": ConditionalAttention,
    "first layer": partial(ConditionalAttention, add_query_pos=True),
    "levels": partial(LevelConditionalAttention, num_levels=2),
    "rescaled": lambda width, heads: RescaledSine(partial(ConditionalAttention, width, heads), width),
}


def randomized(module: Module) -> Module:
    """Biases start at zero or nearly; here they must count."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def memory(padded: bool = True) -> Tokens:
    torch.manual_seed(2)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[1, [2, 3, 4, 5, 7]] = True
    content, pos = torch.randn(2, 2, 8, WIDTH, dtype=torch.float64)
    return Tokens(content, pos, grid=Grid(SHAPES, mask if padded else None, torch.ones(2, 2, 2)))


def object_queries() -> Queries:
    torch.manual_seed(3)
    content, pos, sine = torch.randn(3, 2, 5, WIDTH, dtype=torch.float64)
    return Queries(content, pos, sine=sine)


def softmax(scores: list[float]) -> list[float]:
    exponents = [math.exp(score - max(scores)) for score in scores]
    return [one / sum(exponents) for one in exponents]


def head(x: Tensor, index: int) -> Tensor:
    return x[index * HEAD : (index + 1) * HEAD]


def naive(q: list[Tensor], k: list[Tensor], v: Tensor, hidden: Tensor | None) -> Tensor:
    """One image, before the output projection: the scores of several comparisons are added within each head.

    ``q`` holds a (N, C) and ``k`` a (S, C) for each comparison; ``hidden`` (N, S) is True where nothing is read.
    """
    output = torch.zeros_like(q[0])
    for n, h in itertools.product(range(len(q[0])), range(HEADS)):
        seen = [s for s in range(len(v)) if hidden is None or not hidden[n, s]]
        scores = [sum(float(head(a[n], h) @ head(b[s], h)) for a, b in zip(q, k, strict=True)) for s in seen]
        weights = softmax([score / math.sqrt(len(q) * HEAD) for score in scores])
        for weight, s in zip(weights, seen, strict=True):
            head(output[n], h).add_(weight * head(v[s], h))
    return output


def hidden_of(source: Tokens, image: int, count: int) -> Tensor | None:
    assert source.grid is not None
    mask = source.grid.padding_mask
    return None if mask is None else mask[image].expand(count, -1)


def comparisons(ours: ConditionalAttention, query: Queries, source: Tokens, image: int) -> tuple[list[Tensor], ...]:
    """Equation 2: content with content, and place with position."""
    assert query.pos is not None and query.sine is not None and source.pos is not None
    q, k = ours.query_content_proj(query.content[image]), ours.key_content_proj(source.content[image])
    key_pos = ours.key_pos_proj(source.pos[image])
    if ours.query_pos_proj is not None:
        q, k = q + ours.query_pos_proj(query.pos[image]), k + key_pos
    return [q, ours.query_sine_proj(query.sine[image])], [k, key_pos]


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_self_attention_as_a_naive_loop(masked: bool) -> None:
    ours, query = randomized(SplitDenseAttention(WIDTH, HEADS)), object_queries()
    mask = torch.rand(5, 5) < 0.4 if masked else None
    if mask is not None:
        mask.fill_diagonal_(False)
    output = ours(query, query, mask)
    assert query.pos is not None
    for image in range(2):
        content, pos = query.content[image], query.pos[image]
        q = ours.query_content_proj(content) + ours.query_pos_proj(pos)
        k = ours.key_content_proj(content) + ours.key_pos_proj(pos)
        expected = ours.out_proj(naive([q], [k], ours.value_proj(content), mask))
        torch.testing.assert_close(output[image], expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_self_attention_without_positions_compares_content_alone() -> None:
    ours, query = randomized(SplitDenseAttention(WIDTH, HEADS)), replace(object_queries(), pos=None)
    output = ours(query, query)
    for image in range(2):
        content = query.content[image]
        q, k = ours.query_content_proj(content), ours.key_content_proj(content)
        expected = ours.out_proj(naive([q], [k], ours.value_proj(content), None))
        torch.testing.assert_close(output[image], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("add_query_pos", [False, True])
@torch.no_grad()
def test_cross_attention_as_a_naive_loop(add_query_pos: bool, padded: bool) -> None:
    ours = randomized(ConditionalAttention(WIDTH, HEADS, add_query_pos=add_query_pos))
    query, source = object_queries(), memory(padded)
    output = ours(query, source)
    for image in range(2):
        q, k = comparisons(ours, query, source, image)
        mixed = naive(q, k, ours.value_proj(source.content[image]), hidden_of(source, image, 5))
        torch.testing.assert_close(output[image], ours.out_proj(mixed), rtol=0, atol=1e-12)


def beside(content: Tensor, place: Tensor) -> Tensor:
    """(B, N, C) twice to (B, N, 2C), side by side within each head."""
    parts = [
        part
        for h in range(HEADS)
        for part in (content[..., h * HEAD :][..., :HEAD], place[..., h * HEAD :][..., :HEAD])
    ]
    return torch.cat(parts, -1)


@pytest.mark.parametrize("add_query_pos", [False, True])
@torch.no_grad()
def test_cross_attention_is_pytorchs_of_twice_the_width(add_query_pos: bool) -> None:
    """With the projections outside, as the official code has it; values get as many zeros as they have channels."""
    ours = randomized(ConditionalAttention(WIDTH, HEADS, add_query_pos=add_query_pos))
    query, source = object_queries(), memory()
    assert source.grid is not None
    theirs = nn.MultiheadAttention(2 * WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.copy_(torch.eye(2 * WIDTH).repeat(3, 1))
    theirs.out_proj.weight.copy_(torch.eye(2 * WIDTH))
    q, k = (torch.stack([beside(*comparisons(ours, query, source, i)[side]) for i in range(2)]) for side in range(2))
    values = ours.value_proj(source.content)
    wide, _ = theirs(q, k, beside(values, torch.zeros_like(values)), key_padding_mask=source.grid.padding_mask)
    mixed = wide.unflatten(-1, (HEADS, 2, HEAD))[..., 0, :].flatten(-2)
    torch.testing.assert_close(ours(query, source), ours.out_proj(mixed), rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_levels_are_read_apart_and_mixed_by_what_the_query_says(padded: bool) -> None:
    ours = randomized(LevelConditionalAttention(WIDTH, HEADS, num_levels=2))
    query, source = object_queries(), memory(padded)
    output = ours(query, source)
    assert query.pos is not None
    for image in range(2):
        q, k = comparisons(ours, query, source, image)
        values, hidden = ours.value_proj(source.content[image]), hidden_of(source, image, 5)
        mixed = torch.zeros(5, WIDTH, dtype=torch.float64)
        for level, part in enumerate((slice(0, 6), slice(6, 8))):
            here = naive(q, [one[part] for one in k], values[part], None if hidden is None else hidden[:, part])
            for n in range(5):
                said = ours.level_weights(query.content[image, n] + query.pos[image, n])
                mixed[n] += softmax(said.tolist())[level] * here[n]
        torch.testing.assert_close(output[image], ours.out_proj(mixed), rtol=0, atol=1e-12)


@torch.no_grad()
def test_one_level_is_the_attention_without_levels() -> None:
    one = randomized(LevelConditionalAttention(WIDTH, HEADS, num_levels=1))
    plain = ConditionalAttention(WIDTH, HEADS).double()
    plain.load_state_dict({name: value for name, value in one.state_dict().items() if "level" not in name})
    source = memory()
    assert source.grid is not None
    flat = replace(source, grid=replace(source.grid, shapes=((1, 8),)))
    torch.testing.assert_close(one(object_queries(), flat), plain(object_queries(), source), rtol=0, atol=1e-12)


@torch.no_grad()
def test_rescaled_code_is_multiplied_by_what_the_content_says() -> None:
    ours, query = randomized(RescaledSine(partial(ConditionalAttention, WIDTH, HEADS), WIDTH)), object_queries()
    first, second = (layer for layer in ours.scale.layers)
    assert query.sine is not None
    scale = (query.content @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
    expected = ours.attention(replace(query, sine=query.sine * scale), memory())
    torch.testing.assert_close(ours(query, memory()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", CROSS)
@torch.no_grad()
def test_what_lies_in_the_padding_is_never_read(kind: str) -> None:
    ours, source = randomized(CROSS[kind](WIDTH, HEADS)), memory()
    before = ours(object_queries(), source)
    assert source.grid is not None and source.grid.padding_mask is not None and source.pos is not None
    source.content[source.grid.padding_mask] = 1e3
    source.pos[source.grid.padding_mask] = -1e3
    torch.testing.assert_close(ours(object_queries(), source), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", CROSS)
@torch.no_grad()
def test_each_query_reads_for_itself(kind: str) -> None:
    ours, query, order = randomized(CROSS[kind](WIDTH, HEADS)), object_queries(), torch.tensor([3, 0, 4, 1, 2])
    assert query.pos is not None and query.sine is not None
    permuted = Queries(query.content[:, order], query.pos[:, order], sine=query.sine[:, order])
    torch.testing.assert_close(ours(permuted, memory()), ours(query, memory())[:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["self", *CROSS])
def test_every_parameter_learns_but_what_adds_the_same_to_all_keys(kind: str) -> None:
    """A softmax does not see a number that is added to all scores of a query."""
    query = object_queries()
    if kind == "self":
        ours: nn.Module = randomized(SplitDenseAttention(WIDTH, HEADS))
        ours(query, query).square().sum().backward()
    else:
        ours = randomized(CROSS[kind](WIDTH, HEADS))
        ours(query, memory()).square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        largest = float(parameter.grad.abs().max())
        constant = "key" in name and name.endswith("bias")
        assert (largest < 1e-12) if constant else (largest > 1e-6), name


@pytest.mark.parametrize("kind", ["self", *CROSS])
def test_a_start_as_officially(kind: str) -> None:
    """Xavier for all matrices; PyTorch's biases, but for the output's, which are zero."""
    torch.manual_seed(0)
    ours = SplitDenseAttention(60, HEADS) if kind == "self" else CROSS[kind](60, HEADS)
    for name, parameter in ours.named_parameters():
        largest, inputs = float(parameter.detach().abs().max()), 60
        if name.endswith("out_proj.bias"):
            assert largest == 0
        else:
            bound = (6 / (inputs + len(parameter))) ** 0.5 if parameter.dim() == 2 else inputs**-0.5
            assert 0.4 * bound < largest <= bound, name


@pytest.mark.parametrize("kind", ["self", "conditional", "levels"])
@torch.no_grad()
def test_dropout_is_for_training(kind: str) -> None:
    make = {"self": SplitDenseAttention, "conditional": ConditionalAttention}.get(kind, CROSS["levels"])
    ours, query, source = randomized(make(WIDTH, HEADS, dropout=0.5)), object_queries(), memory()

    def run() -> Tensor:
        output: Tensor = ours(query, query if kind == "self" else source)
        return output

    assert not torch.allclose(run(), run())
    ours.eval()
    assert torch.equal(run(), run())
    ours.train()
    torch.manual_seed(0)
    mean = sum(run() for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, ours.eval()(query, query if kind == "self" else source), rtol=0, atol=0.15)


def test_errors_say_what_is_missing() -> None:
    query, source = object_queries(), memory()
    for attention in (SplitDenseAttention, ConditionalAttention):
        with pytest.raises(ValueError, match="num_heads=5 does not divide embed_dim=12"):
            attention(WIDTH, 5)
    ours = ConditionalAttention(WIDTH, HEADS, add_query_pos=True).double()
    with pytest.raises(ValueError, match="compares a sine code, and these queries have none"):
        ours(replace(query, sine=None), source)
    with pytest.raises(ValueError, match="the memory has none: memory_position=at_attention"):
        ours(query, replace(source, pos=None))
    with pytest.raises(ValueError, match="add_query_pos=true adds the queries' positions"):
        ours(replace(query, pos=None), source)
    levels = LevelConditionalAttention(WIDTH, HEADS, num_levels=3).double()
    with pytest.raises(ValueError, match="got 2 feature levels, built for num_levels=3"):
        levels(query, source)
    with pytest.raises(ValueError, match="got 0 feature levels, built for num_levels=3"):
        levels(query, query)


OFFICIAL = {
    "self_attention.query_content_proj": "sa_qcontent_proj",
    "self_attention.query_pos_proj": "sa_qpos_proj",
    "self_attention.key_content_proj": "sa_kcontent_proj",
    "self_attention.key_pos_proj": "sa_kpos_proj",
    "self_attention.value_proj": "sa_v_proj",
    "self_attention.out_proj": "self_attn.out_proj",
    "cross_attention.query_content_proj": "ca_qcontent_proj",
    "cross_attention.query_pos_proj": "ca_qpos_proj",
    "cross_attention.query_sine_proj": "ca_qpos_sine_proj",
    "cross_attention.key_content_proj": "ca_kcontent_proj",
    "cross_attention.key_pos_proj": "ca_kpos_proj",
    "cross_attention.value_proj": "ca_v_proj",
    "cross_attention.out_proj": "cross_attn.out_proj",
    "self_attention_residual.norm": "norm1",
    "cross_attention_residual.norm": "norm2",
    "ffn_residual.norm": "norm3",
    "ffn.linear1": "linear1",
    "ffn.linear2": "linear2",
    "ffn.activation": "activation",
}


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("family", ["conditional_detr", "dab_detr"])
@torch.no_grad()
def test_official_decoder_layers(goldens: Path, family: str, index: int) -> None:
    """Each layer on its own, from the official inputs to the official output."""
    folder = goldens / family / "base"
    io, weights = load_file(folder / "io.safetensors"), load_file(folder / "weights.safetensors")
    layer = DecoderLayer(
        partial(SplitDenseAttention, 64, 8),
        partial(ConditionalAttention, 64, 8, add_query_pos=index == 0),
        partial(FeedForward, 64, 64, nn.ReLU if family == "conditional_detr" else nn.PReLU),
        partial(PostNorm, 64),
    )
    place = f"transformer.decoder.layers.{index}."
    layer.load_state_dict(
        {
            name: weights[place + name.replace(ours, OFFICIAL[ours])]
            for name in layer.state_dict()
            for ours in [name.rpartition(".")[0]]
        }
    )
    content = torch.zeros(2, 20, 64) if index == 0 else io[f"mid.decoder_raw.{index - 1}"]
    pos = io[f"mid.query_pos.{index}"] if family == "dab_detr" else weights["query_embed.weight"].expand(2, -1, -1)
    queries = Queries(content, pos, sine=io[f"mid.query_sine_embed.{index}"])
    grid = Grid(((8, 11),), io["mid.feature_mask"].flatten(1), torch.ones(2, 1, 2))
    source = Tokens(io["mid.encoder_memory"], io["mid.pos"].flatten(2).transpose(1, 2), grid=grid)
    torch.testing.assert_close(layer(queries, source), io[f"mid.decoder_raw.{index}"], rtol=0, atol=3e-5)
