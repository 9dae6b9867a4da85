from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from detfamily.blocks.heads import BoxHead, SigmoidClassHead
from detfamily.blocks.queries import LearnedQueries, ProposalQueries, proposal_boxes
from detfamily.blocks.references import CenterReference, LearnedReference, LinearReference, MLPReference
from detfamily.blocks.tokens import flatten_maps, resize_mask
from detfamily.structures import Tokens

WIDTH = 8
SHAPES = [(6, 8), (3, 4)]


def memory_tokens(padded: bool = True) -> Tokens:
    torch.manual_seed(0)
    mask = torch.zeros(2, 24, 32, dtype=torch.bool)
    if padded:
        mask[1, 18:] = mask[1, :, 20:] = True
    maps = [torch.randn(2, WIDTH, *shape) for shape in SHAPES]
    return flatten_maps(maps, [resize_mask(mask, shape) for shape in SHAPES], padded)


def source(num_queries: int = 5, mixed: bool = False) -> ProposalQueries:
    torch.manual_seed(1)
    box_head = partial(BoxHead, WIDTH, zero_init=False)
    return ProposalQueries(num_queries, WIDTH, partial(SigmoidClassHead, WIDTH, 3), box_head, mixed)


def naive_proposals(memory: Tokens) -> tuple[Tensor, Tensor]:
    assert memory.grid is not None
    boxes, usable = torch.full((2, 60, 4), math.inf), torch.zeros(2, 60, dtype=torch.bool)
    for b in range(2):
        place = 0
        for level, (h, w) in enumerate(SHAPES):
            columns, rows = (memory.grid.valid_ratios[b, level] * torch.tensor([w, h])).tolist()
            for i, j in itertools.product(range(h), range(w)):
                size = 0.05 * 2**level
                box = [(j + 0.5) / columns, (i + 0.5) / rows, size, size]
                padded = memory.grid.padding_mask is not None and bool(memory.grid.padding_mask[b, place])
                if not padded and all(0.01 < x < 0.99 for x in box):
                    usable[b, place] = True
                    boxes[b, place] = torch.tensor([math.log(x / (1 - x)) for x in box])
                place += 1
    return boxes, usable


@pytest.mark.parametrize("padded", [False, True])
def test_proposals_as_a_naive_loop(padded: bool) -> None:
    memory = memory_tokens(padded)
    boxes, usable = proposal_boxes(memory)
    expected, expected_usable = naive_proposals(memory)
    assert torch.equal(usable, expected_usable)
    assert bool(usable.all()) != padded
    torch.testing.assert_close(boxes, expected, rtol=1e-5, atol=1e-5)


def test_coarse_levels_have_no_usable_proposals_beyond_the_image() -> None:
    """0.05 * 2^5 is more than the image."""
    maps = [torch.randn(1, WIDTH, 2, 2) for _ in range(6)]
    memory = flatten_maps(maps, [torch.zeros(1, 2, 2, dtype=torch.bool)] * 6, padded=False)
    _, usable = proposal_boxes(memory)
    assert usable.view(6, 4).all(1).tolist() == [True] * 5 + [False]


def test_the_best_tokens_by_the_first_column_become_queries() -> None:
    memory, ours = memory_tokens(), source()
    queries, said = ours(memory)
    logits, boxes = said.logits[0], said.boxes[0]
    assert logits.shape == (2, 60, 3) and boxes.shape == (2, 60, 4)
    box_logits, usable = naive_proposals(memory)
    tokens = ours.memory_norm(ours.memory_proj(memory.content * usable[..., None]))
    torch.testing.assert_close(logits, ours.class_head(tokens))
    torch.testing.assert_close(boxes, (ours.box_head(tokens) + box_logits).sigmoid())
    assert (boxes[~usable] == 1).all()  # officially infinite logits
    assert queries.reference_points is not None and not queries.reference_points.requires_grad
    for b in range(2):
        order = sorted(range(60), key=lambda place, b=b: -float(logits[b, place, 0].detach()))
        torch.testing.assert_close(queries.reference_points[b], boxes[b, order[:5]].detach())
    assert queries.groups == {"match": slice(0, 5)} and ours.reference_dim == 4


def naive_code(box: list[float]) -> Tensor:
    """The sine code of x, y, w, h, in this order, a half of the width each."""
    features = WIDTH // 2
    code = []
    for x in box:
        for i in range(features):
            angle = x * 2 * math.pi / 10000 ** (2 * (i // 2) / features)
            code.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
    return torch.tensor(code)


@pytest.mark.parametrize("mixed", [False, True])
def test_position_and_content_come_from_the_box(mixed: bool) -> None:
    ours = source(mixed=mixed)
    queries, _ = ours(memory_tokens())
    assert queries.pos is not None and queries.reference_points is not None
    for b, n in itertools.product(range(2), range(5)):
        code = ours.pos_norm(ours.pos_proj(naive_code(queries.reference_points[b, n].tolist())))
        torch.testing.assert_close(queries.pos[b, n], code[:WIDTH], rtol=1e-4, atol=1e-4)
        if mixed:
            assert ours.content is not None
            assert torch.equal(queries.content[b, n], ours.content[n])
        else:
            torch.testing.assert_close(queries.content[b, n], code[WIDTH:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixed", [False, True])
def test_positions_that_nobody_reads_are_dropped_where_nothing_else_needs_them(mixed: bool) -> None:
    kept, dropped = source(mixed=mixed), source(mixed=mixed)
    dropped.drop_unread_positions()
    (before, _), (after, _) = kept(memory_tokens()), dropped(memory_tokens())
    assert torch.equal(after.content, before.content) and (after.pos is None) == (not dropped.has_pos) == mixed
    gone = {name for name, _ in kept.named_parameters()} - {name for name, _ in dropped.named_parameters()}
    assert gone == (
        {f"pos_{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")} if mixed else set()
    )


def test_more_queries_than_tokens() -> None:
    with pytest.raises(ValueError, match="num_queries=61 proposals are wanted from 60 tokens"):
        source(61)(memory_tokens())


def test_learned_queries_of_detr() -> None:
    torch.manual_seed(0)
    ours = LearnedQueries(200, WIDTH, learn_pos=True, learn_content=False)
    queries, proposals = ours(memory_tokens())
    assert proposals is None and queries.reference_points is None and ours.reference_dim is None
    assert ours.pos is not None and queries.pos is not None and ours.has_pos and not ours.has_content
    assert torch.equal(queries.content, torch.zeros(2, 200, WIDTH))
    assert torch.equal(queries.pos[0], ours.pos) and torch.equal(queries.pos[1], ours.pos)
    assert abs(float(ours.pos.detach().std()) - 1) < 0.1


def test_learned_queries_of_deformable_detr() -> None:
    torch.manual_seed(0)
    reference = partial(LinearReference, embed_dim=WIDTH)
    ours = LearnedQueries(7, WIDTH, learn_pos=True, learn_content=True, reference=reference)
    queries, _ = ours(memory_tokens())
    assert isinstance(ours.reference, LinearReference) and ours.pos is not None and ours.content is not None
    assert ours.reference_dim == 2 and queries.reference_points is not None and ours.has_pos and ours.has_content
    assert torch.equal(queries.content[1], ours.content)
    expected = torch.special.expit(ours.pos @ ours.reference.weight.T)
    torch.testing.assert_close(queries.reference_points, expected.expand(2, -1, -1))
    assert not ours.reference.bias.any()


@pytest.mark.parametrize("dim", [2, 4])
def test_learned_queries_of_dab_detr(dim: int) -> None:
    """Anchors are all that is learned, and the same for every image."""
    ours = LearnedQueries(7, WIDTH, False, False, partial(LearnedReference, dim=dim))
    queries, _ = ours(memory_tokens())
    assert ours.reference_dim == dim and not ours.has_pos and not ours.has_content
    assert queries.pos is None and queries.sine is None and not queries.content.any()
    assert queries.reference_points is not None and queries.reference_points.shape == (2, 7, dim)
    assert torch.equal(queries.reference_points[0], queries.reference_points[1])
    names = {"reference.center_logit"} | ({"reference.size_logit"} if dim == 4 else set())
    assert {name for name, _ in ours.named_parameters()} == names
    queries.reference_points.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.all() for parameter in ours.parameters())


def test_learned_at_input_has_content_only() -> None:
    ours = LearnedQueries(7, WIDTH, learn_pos=False, learn_content=True)
    queries, _ = ours(memory_tokens())
    assert queries.pos is None and [name for name, _ in ours.named_parameters()] == ["content"]


def test_the_last_channel_is_left_to_an_indicator() -> None:
    ours = LearnedQueries(7, WIDTH, learn_pos=True, learn_content=True, indicator=True)
    queries, _ = ours(memory_tokens())
    assert ours.content is not None and ours.content.shape == (7, WIDTH - 1)
    assert torch.equal(queries.content[1, :, :-1], ours.content) and not queries.content[..., -1].any()
    assert queries.pos is not None and queries.pos.shape == (2, 7, WIDTH)


def test_queries_that_nothing_tells_apart_are_refused() -> None:
    for reference in (None, CenterReference):
        with pytest.raises(ValueError, match="would make all queries equal"):
            LearnedQueries(7, WIDTH, learn_pos=False, learn_content=False, reference=reference)
    for reader in (LinearReference, MLPReference):
        with pytest.raises(ValueError, match=r"query_source\.reference is read from the position: learn_pos=true"):
            LearnedQueries(7, WIDTH, False, True, reference=partial(reader, embed_dim=WIDTH))
