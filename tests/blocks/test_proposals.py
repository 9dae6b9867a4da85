from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from detfamily.blocks.heads import BoxHead, SigmoidClassHead
from detfamily.blocks.proposals import BASE_SIZE, ProposalQueries, proposal_boxes
from detfamily.blocks.tokens import flatten_maps
from detfamily.structures import Predictions, Tokens

from .conftest import CLASSES, SHAPES, WIDTH, decoder_heads, memory_tokens

TOKENS = sum(h * w for h, w in SHAPES)
CONTENTS = ["code", "learned", "memory"]


def source(num_queries: int = 5, **changes: Any) -> ProposalQueries:
    torch.manual_seed(1)
    arguments: dict[str, Any] = {
        "class_head": partial(SigmoidClassHead, WIDTH, CLASSES),
        "box_head": partial(BoxHead, WIDTH, zero_init=False),
        **changes,
    }
    return ProposalQueries(num_queries, WIDTH, **arguments)


def selected(num_queries: int = 5, **changes: Any) -> ProposalQueries:
    """DINO's way."""
    return source(num_queries, **{"content": "learned", "class_agnostic": False, "answer_all": False, **changes})


def naive_proposals(memory: Tokens, width: float = 0.05, height: float = 0.05) -> tuple[Tensor, Tensor]:
    assert memory.grid is not None
    boxes, usable = torch.full((2, TOKENS, 4), math.inf), torch.zeros(2, TOKENS, dtype=torch.bool)
    for b in range(2):
        place = 0
        for level, (h, w) in enumerate(SHAPES):
            columns, rows = (memory.grid.valid_ratios[b, level] * torch.tensor([w, h])).tolist()
            for i, j in itertools.product(range(h), range(w)):
                box = [(j + 0.5) / columns, (i + 0.5) / rows, width * 2**level, height * 2**level]
                padded = memory.grid.padding_mask is not None and bool(memory.grid.padding_mask[b, place])
                if not padded and all(0.01 < x < 0.99 for x in box):
                    usable[b, place] = True
                    boxes[b, place] = torch.tensor([math.log(x / (1 - x)) for x in box])
                place += 1
    return boxes, usable


@pytest.mark.parametrize("padded", [False, True])
def test_boxes_around_tokens_as_a_naive_loop(padded: bool) -> None:
    memory = memory_tokens(padded)
    boxes, usable = proposal_boxes(memory)
    expected, expected_usable = naive_proposals(memory)
    assert torch.equal(usable, expected_usable)
    assert bool(usable.all()) != padded
    torch.testing.assert_close(boxes, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(0.3, 0.02), (0.6, 0.1), (0.005, 0.2)])
def test_boxes_of_other_sizes(width: float, height: float) -> None:
    """One size for all; a level's boxes are unusable where they are too large or too small."""
    memory = memory_tokens()
    boxes, usable = proposal_boxes(memory, torch.tensor([[width, height]]))
    expected, expected_usable = naive_proposals(memory, width, height)
    assert torch.equal(usable, expected_usable)
    torch.testing.assert_close(boxes, expected, rtol=1e-5, atol=1e-5)


def test_coarse_levels_have_no_usable_proposals_beyond_the_image() -> None:
    """0.05 * 2^5 is more than the image."""
    maps = [torch.randn(1, WIDTH, 2, 2) for _ in range(6)]
    memory = flatten_maps(maps, [torch.zeros(1, 2, 2, dtype=torch.bool)] * 6, padded=False)
    _, usable = proposal_boxes(memory)
    assert usable.view(6, 4).all(1).tolist() == [True] * 5 + [False]


def naive_answers(ours: ProposalQueries, memory: Tokens) -> tuple[Tensor, Tensor, list[list[int]]]:
    """What all tokens say, one at a time, and the places of the best, best first."""
    box_logits, usable = naive_proposals(memory)
    assert ours.class_head is not None and ours.box_head is not None
    logits, boxes, best = torch.zeros(2, TOKENS, CLASSES), torch.zeros(2, TOKENS, 4), []
    with torch.no_grad():
        for b in range(2):
            for place in range(TOKENS):
                content = memory.content[b, place] if usable[b, place] else torch.zeros(WIDTH)
                token = ours.memory_norm(ours.memory_proj(content))
                logits[b, place] = ours.class_head(token)
                boxes[b, place] = (ours.box_head(token) + box_logits[b, place]).sigmoid()
            scores = [row[0] if ours.class_agnostic else max(row) for row in logits[b].tolist()]
            best.append(sorted(range(TOKENS), key=lambda place, scores=scores: -scores[place])[: ours.count])
    return logits, boxes, best


@pytest.mark.parametrize("answer_all", [True, False])
@pytest.mark.parametrize("class_agnostic", [True, False])
def test_the_best_tokens_become_queries(class_agnostic: bool, answer_all: bool) -> None:
    """Best in the first column, or in any; all tokens answer, or those that were chosen."""
    memory = memory_tokens()
    ours = source(class_agnostic=class_agnostic, answer_all=answer_all).eval()
    queries, said = ours(memory, decoder_heads())
    logits, boxes, best = naive_answers(ours, memory)
    assert queries.groups == {"match": slice(0, 5)} and ours.reference_dim == 4
    assert queries.reference_points is not None and not queries.reference_points.requires_grad
    count = TOKENS if answer_all else 5
    assert said.logits.shape == (1, 2, count, CLASSES) and said.boxes.shape == (1, 2, count, 4)
    for b in range(2):
        torch.testing.assert_close(queries.reference_points[b], boxes[b, best[b]])
        places = list(range(TOKENS)) if answer_all else best[b]
        torch.testing.assert_close(said.logits[0, b], logits[b, places])
        torch.testing.assert_close(said.boxes[0, b], boxes[b, places])
    if answer_all:
        assert (said.boxes[0][~naive_proposals(memory)[1]] == 1).all()  # officially infinite logits


def test_the_best_of_all_classes_are_others_than_the_best_of_the_first() -> None:
    memory = memory_tokens()
    first, any_class = (naive_answers(source(class_agnostic=agnostic), memory)[2] for agnostic in (True, False))
    assert all(set(a) != set(b) for a, b in zip(first, any_class, strict=True))


def naive_code(box: list[float]) -> Tensor:
    """The sine code of x, y, w, h, in this order, a half of the width each."""
    features = WIDTH // 2
    code = []
    for x in box:
        for i in range(features):
            angle = x * 2 * math.pi / 10000 ** (2 * (i // 2) / features)
            code.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
    return torch.tensor(code)


@pytest.mark.parametrize("content", CONTENTS)
def test_position_comes_from_the_box_and_content_from_there_or_elsewhere(content: str) -> None:
    """The norm is over the code's two halves, also where the second one is not the content, as officially."""
    ours, memory = source(content=content), memory_tokens()
    queries, _ = ours(memory, decoder_heads())
    assert queries.pos is not None and queries.reference_points is not None
    assert ours.pos_proj is not None and ours.pos_norm is not None and ours.has_pos and ours.has_content
    _, usable = naive_proposals(memory)
    _, _, best = naive_answers(ours, memory)
    for b, n in itertools.product(range(2), range(5)):
        code = ours.pos_norm(ours.pos_proj(naive_code(queries.reference_points[b, n].tolist())))
        torch.testing.assert_close(queries.pos[b, n], code[:WIDTH], rtol=1e-4, atol=1e-4)
        if content == "learned":
            assert ours.content is not None and torch.equal(queries.content[b, n], ours.content[n])
        elif content == "code":
            torch.testing.assert_close(queries.content[b, n], code[WIDTH:], rtol=1e-4, atol=1e-4)
        else:
            place = best[b][n]
            token = ours.memory_norm(ours.memory_proj(memory.content[b, place] * usable[b, place]))
            torch.testing.assert_close(queries.content[b, n], token)


@pytest.mark.parametrize("content", CONTENTS)
def test_positions_that_nobody_reads_are_dropped_where_nothing_else_needs_them(content: str) -> None:
    memory, heads = memory_tokens(), decoder_heads()
    kept, dropped = source(content=content), source(content=content)
    dropped.drop_unread_positions()
    (before, _), (after, _) = kept(memory, heads), dropped(memory, heads)
    goes = content != "code"
    assert torch.equal(after.content, before.content) and (after.pos is None) == (not dropped.has_pos) == goes
    assert before.reference_points is not None and after.reference_points is not None
    assert torch.equal(after.reference_points, before.reference_points)
    gone = {name for name, _ in kept.named_parameters()} - {name for name, _ in dropped.named_parameters()}
    assert gone == (
        {f"pos_{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")} if goes else set()
    )


def watched_memory() -> Tokens:
    memory = memory_tokens()
    return replace(memory, content=memory.content.requires_grad_())


@pytest.mark.parametrize("answer_all", [True, False])
@pytest.mark.parametrize("content", CONTENTS)
def test_the_encoder_learns_through_what_proposals_say_and_not_through_the_queries(
    content: str, answer_all: bool
) -> None:
    memory = watched_memory()
    ours = source(content=content, answer_all=answer_all, class_agnostic=False)
    queries, said = ours(memory, decoder_heads())
    assert queries.reference_points is not None and not queries.reference_points.requires_grad
    assert queries.pos is not None and queries.content.requires_grad == (content != "memory")
    through_queries = queries.pos.sum() + queries.content.sum()
    assert torch.autograd.grad(through_queries, memory.content, allow_unused=True, retain_graph=True) == (None,)
    _, usable = naive_proposals(memory)
    _, _, best = naive_answers(ours, memory)
    expected = torch.zeros(2, TOKENS, dtype=torch.bool)
    for b, places in enumerate(best):
        expected[b, slice(None) if answer_all else places] = True
    for values in (said.logits, said.boxes):
        (gradient,) = torch.autograd.grad(values.square().sum(), memory.content, retain_graph=True)
        assert torch.equal(gradient.abs().sum(-1) > 0, expected & usable)


@pytest.mark.parametrize("answer_all", [True, False])
def test_gradients_of_the_chosen_are_those_of_all_tokens_picked_afterwards(answer_all: bool) -> None:
    """Two ways to the same numbers."""
    gradients = []
    for everything in (True, False):
        ours, memory = source(answer_all=everything, class_agnostic=False), watched_memory()
        _, said = ours(memory, decoder_heads())
        if everything:
            best = torch.tensor(naive_answers(ours, memory)[2])
            said = Predictions(
                *(x[0].gather(1, best[..., None].expand(-1, -1, x.shape[-1]))[None] for x in (said.logits, said.boxes))
            )
        (said.logits.sigmoid().sum() + said.boxes.square().sum()).backward()
        gradients.append([cast("Tensor", memory.content.grad), *(one.grad for one in ours.memory_proj.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("answer_all", [True, False])
@pytest.mark.parametrize("own", [{"class_head"}, {"box_head"}, set()])
def test_heads_are_the_decoders_where_proposals_have_none(own: set[str], answer_all: bool) -> None:
    missing: dict[str, Any] = {name: None for name in ("class_head", "box_head") if name not in own}
    memory, heads = memory_tokens(), decoder_heads()
    ours = source(answer_all=answer_all, class_agnostic=False, **missing)
    assert {name.split(".")[0] for name, _ in ours.named_parameters() if "head" in name} == own
    _, said = ours(memory, heads)
    alike = source(answer_all=answer_all, class_agnostic=False)
    state = ours.state_dict()
    if "class_head" in missing:
        state |= {f"class_head.{name}": value for name, value in heads.class_heads[0].state_dict().items()}
    if "box_head" in missing:
        state |= {f"box_head.{name}": value for name, value in heads.box_heads[0].state_dict().items()}
    alike.load_state_dict(state)
    _, expected = alike(memory, decoder_heads(shared=False))  # nobody asks these
    assert torch.equal(said.logits, expected.logits) and torch.equal(said.boxes, expected.boxes)
    (said.logits.sum() + said.boxes.sum()).backward()
    for name, modules in (("class_head", heads.class_heads), ("box_head", heads.box_heads)):
        learns = any(one.grad is not None and one.grad.any() for one in modules.parameters())
        assert learns == (name in missing)


@pytest.mark.parametrize("answer_all", [True, False])
def test_the_size_of_boxes_around_tokens_is_learned(answer_all: bool) -> None:
    """It starts where the others stay; its gradient is that of a loop over the tokens that answer."""
    memory = memory_tokens()
    ours, fixed = (source(answer_all=answer_all, learn_size=learn) for learn in (True, False))
    assert ours.size_logit is not None and fixed.size_logit is None and ours.class_head is not None
    torch.testing.assert_close(ours.size_logit.detach().sigmoid(), torch.full((1, 2), BASE_SIZE))
    torch.testing.assert_close(ours(memory, decoder_heads())[1].boxes, fixed(memory, decoder_heads())[1].boxes)
    with torch.no_grad():
        ours.size_logit.copy_(torch.tensor([[0.2, 0.1]]).logit())
    _, said = ours(memory, decoder_heads())
    said.boxes.square().sum().backward()
    box_logits, usable = naive_proposals(memory, 0.2, 0.1)
    tokens = ours.memory_norm(ours.memory_proj(memory.content * usable[..., None])).detach()
    size = ours.size_logit.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        scores = ours.class_head(tokens[b])[:, 0].tolist()
        order = sorted(range(TOKENS), key=lambda place, scores=scores: -scores[place])
        for place in order if answer_all else order[:5]:
            if usable[b, place]:
                level = int(place >= SHAPES[0][0] * SHAPES[0][1])
                around = torch.cat([box_logits[b, place, :2].double(), (size[0].sigmoid() * 2**level).logit()])
                assert ours.box_head is not None
                total = total + (ours.box_head(tokens[b, place]).double() + around).sigmoid().square().sum()
    (expected,) = torch.autograd.grad(total, size)
    assert ours.size_logit.grad is not None and expected.all()
    torch.testing.assert_close(ours.size_logit.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_size_that_no_logit_has_gives_no_gradient() -> None:
    """A half, twice as large on the second level, is 1: its tokens are unusable, and the sizes of the others learn."""
    ours = source(learn_size=True)
    assert ours.size_logit is not None
    torch.nn.init.zeros_(ours.size_logit)
    _, said = ours(memory_tokens(), decoder_heads())
    said.boxes.sum().backward()
    fine = SHAPES[0][0] * SHAPES[0][1]
    assert (said.boxes[0, :, fine:] == 1).all() and not (said.boxes[0, 0, :fine] == 1).any()
    assert ours.size_logit.grad is not None and ours.size_logit.grad.isfinite().all() and ours.size_logit.grad.all()


@pytest.mark.parametrize("answer_all", [True, False])
@pytest.mark.parametrize("content", CONTENTS)
def test_training_takes_more_proposals_than_evaluation_and_the_same_first(content: str, answer_all: bool) -> None:
    memory, heads = memory_tokens(), decoder_heads()
    ours = source(4, content=content, answer_all=answer_all, class_agnostic=False, num_one_to_many=7)
    training, said = ours.train()(memory, heads)
    logits, boxes, best = naive_answers(ours, memory)
    assert training.groups == {"match": slice(0, 4), "one_to_many": slice(4, 11)}
    assert training.reference_points is not None and training.attention_mask is not None
    assert training.attention_mask.tolist() == [[(i < 4) != (j < 4) for j in range(11)] for i in range(11)]
    for b in range(2):
        torch.testing.assert_close(training.reference_points[b], boxes[b, best[b]])
    # proposals beyond the first are not answered for
    assert said.logits.shape[2] == said.boxes.shape[2] == (TOKENS if answer_all else 4)
    if not answer_all:
        for b in range(2):
            torch.testing.assert_close(said.logits[0, b], logits[b, best[b][:4]])
            torch.testing.assert_close(said.boxes[0, b], boxes[b, best[b][:4]])
    evaluation, said_then = ours.eval()(memory, heads)
    assert evaluation.groups == {"match": slice(0, 4)} and evaluation.attention_mask is None
    torch.testing.assert_close(said_then.logits, said.logits)
    for name in ("content", "pos", "reference_points"):
        now, then = getattr(training, name), getattr(evaluation, name)
        assert now.shape[1] == 11 and then.shape[1] == 4
        torch.testing.assert_close(then, now[:, :4])


def test_more_queries_than_tokens() -> None:
    memory, heads = memory_tokens(), decoder_heads()
    for ours in (source(61), selected(61)):
        with pytest.raises(ValueError, match="num_queries=61 proposals are wanted from 60 tokens: use fewer"):
            ours(memory, heads)
    many = selected(40, num_one_to_many=21)
    with pytest.raises(ValueError, match="proposals are wanted from 60 tokens: use fewer"):
        many.train()(memory, heads)
    queries, _ = many.eval()(memory, heads)
    assert queries.content.shape[1] == 40
    everything, _ = selected(60)(memory, heads)
    assert everything.content.shape[1] == 60


def test_sixteen_bit_memory_gives_boxes_of_full_precision() -> None:
    memory = memory_tokens()
    memory = replace(memory, content=memory.content.bfloat16())
    queries, said = selected().bfloat16()(memory, decoder_heads())
    assert queries.reference_points is not None and queries.pos is not None
    assert said.logits.dtype == said.boxes.dtype == queries.reference_points.dtype == torch.float32
    assert queries.content.dtype == queries.pos.dtype == torch.bfloat16


def test_what_is_learned_by_each_kind() -> None:
    always = {f"{name}.{kind}" for name in ("memory_proj", "memory_norm") for kind in ("weight", "bias")}
    positions = {f"{name}.{kind}" for name in ("pos_proj", "pos_norm") for kind in ("weight", "bias")}
    headless: dict[str, Any] = {"class_head": None, "box_head": None}
    for changes, more in (
        ({}, set()),
        ({"content": "learned"}, {"content"}),
        ({"content": "memory", "learn_size": True}, {"size_logit"}),
    ):
        ours = source(6, num_one_to_many=3, **headless, **changes)
        assert {name for name, _ in ours.named_parameters()} == always | positions | more
        if ours.content is not None:
            assert ours.content.shape == (9, WIDTH)
