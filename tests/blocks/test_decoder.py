from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from detfamily.attention import ConditionalAttention, DenseAttention, MSDeformAttention, RescaledSine
from detfamily.blocks.boxes import apply_delta
from detfamily.blocks.decoder import Decoder, DecoderLayer
from detfamily.blocks.heads import BoxHead, Heads, SigmoidClassHead
from detfamily.blocks.layers import FeedForward, PostNorm, PreNorm
from detfamily.blocks.query_position import FixedPosition, QueryPosition
from detfamily.structures import Grid, Queries, Tokens

WIDTH, HEADS, HIDDEN, LAYERS = 12, 3, 20, 3
DENSE = partial(DenseAttention, embed_dim=WIDTH, num_heads=HEADS)
DEFORMABLE = partial(MSDeformAttention, embed_dim=WIDTH, num_heads=HEADS, num_levels=1, num_points=2)
FFN = partial(FeedForward, embed_dim=WIDTH, hidden_dim=HIDDEN, activation=nn.ReLU)


def layer(pre_norm: bool = False, deformable: bool = False, ffn: bool = True) -> DecoderLayer:
    residual = partial(PreNorm if pre_norm else PostNorm, WIDTH)
    return DecoderLayer(DENSE, DEFORMABLE if deformable else DENSE, FFN if ffn else None, residual)


def memory_tokens() -> Tokens:
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 8:] = True
    content, pos = torch.randn(2, 2, 12, WIDTH)
    return Tokens(content, pos, grid=Grid(((3, 4),), padding, torch.tensor([[[1.0, 1.0]], [[1.0, 2 / 3]]])))


def object_queries(reference_dim: int | None = None) -> Queries:
    content, pos = torch.randn(2, 2, 5, WIDTH)
    points = None if reference_dim is None else torch.rand(2, 5, reference_dim).clamp(0.2, 0.8)
    return Queries(content, pos, points, groups={"match": slice(0, 5)})


def deformable_decoder(
    refine: bool, norm: nn.Module | None = None, look_forward: bool = False
) -> tuple[Decoder, Heads]:
    torch.manual_seed(0)
    make = partial(layer, deformable=True)
    decoder = Decoder(make, LAYERS, FixedPosition, norm or nn.Identity(), refine, look_forward)
    box_head = partial(BoxHead, WIDTH, zero_init=False)
    heads = Heads(partial(SigmoidClassHead, WIDTH, 4), box_head, LAYERS, shared=not refine)
    with torch.no_grad():  # at the start offsets do not depend on queries
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder, heads


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_layer_without_positions_is_pytorchs(pre_norm: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=pre_norm)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    names = {
        "self_attn.in_proj_": "self_attention.in_proj.",
        "self_attn.out_proj.": "self_attention.out_proj.",
        "multihead_attn.in_proj_": "cross_attention.in_proj.",
        "multihead_attn.out_proj.": "cross_attention.out_proj.",
        "linear": "ffn.linear",
        "norm1.": "self_attention_residual.norm.",
        "norm2.": "cross_attention_residual.norm.",
        "norm3.": "ffn_residual.norm.",
    }
    state = {}
    for name, value in theirs.state_dict().items():
        (old, new) = next(pair for pair in names.items() if name.startswith(pair[0]))
        state[name.replace(old, new)] = value
    ours = layer(pre_norm)
    ours.load_state_dict(state)
    queries, memory = replace(object_queries(), pos=None), replace(memory_tokens(), pos=None)
    hidden = torch.rand(5, 5) < 0.3
    hidden.fill_diagonal_(False)
    assert memory.grid is not None
    expected = theirs(
        queries.content, memory.content, tgt_mask=hidden, memory_key_padding_mask=memory.grid.padding_mask
    )
    torch.testing.assert_close(ours(replace(queries, attention_mask=hidden), memory), expected)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_positions_and_norms_against_hand_computation(pre_norm: bool) -> None:
    torch.manual_seed(0)
    ours, queries, memory = layer(pre_norm), object_queries(), memory_tokens()
    assert ours.ffn is not None and ours.ffn_residual is not None

    def residual(x: Tensor, norm: nn.Module, f: nn.Module, *source: Tokens) -> Tensor:
        inner = norm(x) if pre_norm else x
        if isinstance(f, DenseAttention):
            now = Tokens(inner, queries.pos)
            said = f(now, *(source or (now,)))
        else:
            said = f(inner)
        return x + said if pre_norm else norm(x + said)

    x = residual(queries.content, ours.self_attention_residual.norm, ours.self_attention)
    x = residual(x, ours.cross_attention_residual.norm, ours.cross_attention, memory)
    x = residual(x, ours.ffn_residual.norm, ours.ffn)
    torch.testing.assert_close(ours(queries, memory), x)


def test_without_ffn_its_residual_is_gone_too() -> None:
    assert not [name for name, _ in layer(ffn=False).named_parameters() if "ffn" in name]
    assert layer(ffn=False)(object_queries(), memory_tokens()).shape == (2, 5, WIDTH)


def test_the_norm_is_for_the_heads_and_the_next_layer_gets_it_without() -> None:
    torch.manual_seed(0)
    decoder = Decoder(layer, LAYERS, FixedPosition, nn.LayerNorm(WIDTH))
    _, heads = deformable_decoder(refine=False)
    queries, memory = object_queries(), memory_tokens()
    hidden, references = decoder(queries, memory, heads)
    x = queries.content
    for index, one in enumerate(decoder.layers):
        x = one(replace(queries, content=x), memory)
        torch.testing.assert_close(hidden[index], decoder.norm(x))
    assert references == [None] * LAYERS


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_refinement_hands_on_the_boxes_of_the_layer_before(reference_dim: int) -> None:
    decoder, heads = deformable_decoder(refine=True, norm=nn.LayerNorm(WIDTH))
    queries, memory = object_queries(reference_dim), memory_tokens()
    hidden, references = decoder(queries, memory, heads)
    assert references[0] is queries.reference_points
    x, now = queries.content, queries.reference_points
    for index, one in enumerate(decoder.layers):
        x = one(replace(queries, content=x, reference_points=now), memory)
        torch.testing.assert_close(hidden[index], decoder.norm(x))
        if index + 1 < LAYERS:
            now = apply_delta(heads.box_heads[index](x), now, heads.eps)  # of the content before the norm
            following = references[index + 1]
            assert following is not None and not following.requires_grad
            torch.testing.assert_close(following, now.detach())
            now = now.detach()


@pytest.mark.parametrize("look_forward", [False, True])
def test_a_layers_boxes_reach_the_box_heads_that_they_are_told_to(look_forward: bool) -> None:
    """Its own alone, or, looking forward, that of the layer before it, too; and never an earlier one."""
    decoder, heads = deformable_decoder(refine=True, look_forward=look_forward)
    said = heads(*decoder(object_queries(2), memory_tokens(), heads))
    for layer_index in range(LAYERS):
        heads.zero_grad()
        said.boxes[layer_index].sum().backward(retain_graph=True)
        for index, head in enumerate(heads.box_heads):
            answers = {layer_index - 1, layer_index} if look_forward else {layer_index}
            for parameter in head.parameters():
                reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
                assert reached == (index in answers)


@pytest.mark.parametrize("look_forward", [False, True])
@pytest.mark.parametrize("reference_dim", [2, 4])
def test_gradients_as_a_loop_with_its_cuts_spelled_out(reference_dim: int, look_forward: bool) -> None:
    decoder, heads = deformable_decoder(refine=True, norm=nn.LayerNorm(WIDTH), look_forward=look_forward)
    queries, memory = object_queries(reference_dim), memory_tokens()
    assert queries.reference_points is not None
    points = queries.reference_points.requires_grad_()
    boxes = heads(*decoder(queries, memory, heads)).boxes
    x, now, expected = queries.content, points, []
    relative_to = points
    for one, head in zip(decoder.layers, heads.box_heads, strict=True):
        x = one(replace(queries, content=x, reference_points=now), memory)
        expected.append(apply_delta(head(decoder.norm(x)), relative_to, heads.eps))
        refined = apply_delta(head(x), now, heads.eps)
        relative_to = refined if look_forward else refined.detach()
        now = refined.detach()
    torch.testing.assert_close(boxes, torch.stack(expected))
    inputs = [points, *decoder.parameters(), *heads.box_heads.parameters()]
    ours = torch.autograd.grad(boxes.square().sum(), inputs)
    theirs = torch.autograd.grad(torch.stack(expected).square().sum(), inputs)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_looking_forward_asks_for_no_gradient_where_none_is_wanted() -> None:
    decoder, heads = deformable_decoder(refine=True, look_forward=True)
    with torch.no_grad():
        _, references = decoder(object_queries(2), memory_tokens(), heads)
    assert not any(reference is None or reference.requires_grad for reference in references)


def test_references_learn_from_every_layer_without_refinement_and_from_the_first_with_it() -> None:
    for refine in (False, True):
        decoder, heads = deformable_decoder(refine)
        queries = object_queries(2)
        assert queries.reference_points is not None
        points = queries.reference_points.requires_grad_()
        _, references = decoder(queries, memory_tokens(), heads)
        for index, reference in enumerate(references):
            assert reference is not None
            boxes = apply_delta(torch.zeros(2, 5, 4), reference, heads.eps)
            if refine and index > 0:
                assert not boxes.requires_grad
            else:
                (gradient,) = torch.autograd.grad(boxes[..., :2].sum(), points)
                torch.testing.assert_close(gradient, torch.ones_like(points), rtol=0, atol=1e-4)


class Watched(QueryPosition):
    """Says of each layer what it sees, and gives it a position of its own."""

    reads_pos = False

    def __init__(self, cross_sine: bool, keep: int | None = None) -> None:
        super().__init__()
        self.cross_sine, self.reference_dim = cross_sine, keep
        self.seen: list[tuple[int, Tensor, Tensor | None]] = []

    def forward(self, layer_index: int, queries: Queries, memory: Tokens) -> Queries:
        self.seen.append((layer_index, queries.content, queries.reference_points))
        return replace(queries, pos=torch.full_like(queries.content, float(layer_index)))


def test_positions_are_made_anew_for_each_layer_of_what_it_starts_from() -> None:
    torch.manual_seed(0)
    decoder, heads = deformable_decoder(refine=True)
    decoder.query_position = watched = Watched(cross_sine=False)
    queries, memory = object_queries(4), memory_tokens()
    hidden, references = decoder(queries, memory, heads)
    content = queries.content
    for index, (layer_index, seen, looked) in enumerate(watched.seen):
        reference = references[index]
        assert layer_index == index and torch.equal(seen, content)
        assert looked is not None and reference is not None and torch.equal(looked, reference)
        pos = torch.full_like(content, float(index))
        content = decoder.layers[index](replace(queries, content=content, pos=pos, reference_points=looked), memory)
        torch.testing.assert_close(hidden[index], content)


def test_queries_of_points_stay_points() -> None:
    """Of a refined box, positions that are made of points keep its centre."""
    decoder, heads = deformable_decoder(refine=True)
    boxes = decoder(object_queries(2), memory_tokens(), heads)[1]
    decoder.query_position = watched = Watched(cross_sine=False, keep=2)
    torch.manual_seed(1)
    queries, memory = object_queries(2), memory_tokens()
    references = decoder(queries, memory, heads)[1]
    assert [one.shape[-1] for one in boxes if one is not None] == [2, 4, 4]
    assert [one.shape[-1] for one in references if one is not None] == [2, 2, 2]
    looked = [seen[2] for seen in watched.seen]
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(looked, references, strict=True))


def test_positions_are_told_whether_the_cross_attention_reads_a_code() -> None:
    conditional = partial(ConditionalAttention, embed_dim=WIDTH, num_heads=HEADS)
    rescaled = partial(RescaledSine, conditional, WIDTH)
    for cross_attention, reads in ((DENSE, False), (DEFORMABLE, False), (conditional, True), (rescaled, True)):
        make = partial(DecoderLayer, DENSE, cross_attention, FFN, partial(PostNorm, WIDTH))
        decoder = Decoder(make, 2, Watched, nn.Identity())
        assert isinstance(decoder.query_position, Watched)
        assert decoder.query_position.cross_sine == decoder.reads_sine == reads
    with pytest.raises(ValueError, match="query_position=fixed gives no code of a place"):
        Decoder(
            partial(DecoderLayer, DENSE, conditional, FFN, partial(PostNorm, WIDTH)), 2, FixedPosition, nn.Identity()
        )


def test_the_first_cross_attention_may_be_another_one() -> None:
    conditional = partial(ConditionalAttention, embed_dim=WIDTH, num_heads=HEADS)
    make = partial(DecoderLayer, DENSE, ffn=FFN, residual=partial(PostNorm, WIDTH))
    first = partial(conditional, add_query_pos=True)
    decoder = Decoder(
        partial(make, cross_attention=conditional), 3, Watched, nn.Identity(), first_cross_attention=first
    )
    added = [layer.cross_attention.query_pos_proj is not None for layer in decoder.layers]
    assert added == [True, False, False]
    alone = Decoder(partial(make, cross_attention=conditional), 2, Watched, nn.Identity())
    assert not any(layer.cross_attention.query_pos_proj is not None for layer in alone.layers)


def test_a_mask_among_queries_is_for_all_layers() -> None:
    """Two halves that do not see each other are decoded as if each were alone."""
    torch.manual_seed(0)
    decoder, heads = deformable_decoder(refine=True)
    queries, memory = object_queries(2), memory_tokens()
    half = torch.tensor([0, 0, 1, 1, 1])
    masked = replace(queries, attention_mask=half[:, None] != half)
    together, _ = decoder(masked, memory, heads)
    for side in (0, 1):
        one = half == side
        assert queries.pos is not None and queries.reference_points is not None
        part = Queries(queries.content[:, one], queries.pos[:, one], queries.reference_points[:, one])
        for a, b in zip(decoder(part, memory, heads)[0], together, strict=True):
            torch.testing.assert_close(a, b[:, one], rtol=0, atol=1e-5)


def test_looking_forward_is_about_refinement() -> None:
    with pytest.raises(ValueError, match=r"decoder\.look_forward=true is about references that are refined"):
        Decoder(layer, 2, FixedPosition, nn.Identity(), look_forward=True)


def test_a_decoder_has_layers() -> None:
    with pytest.raises(ValueError, match=r"decoder\.num_layers=0: a decoder needs at least one layer"):
        Decoder(layer, 0, FixedPosition, nn.Identity())
