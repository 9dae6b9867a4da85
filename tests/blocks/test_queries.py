from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from detfamily.blocks.queries import LearnedQueries, QuerySource
from detfamily.blocks.references import CenterReference, LearnedReference, LinearReference, MLPReference
from detfamily.structures import Queries

from .conftest import WIDTH, decoder_heads, memory_tokens


def test_learned_queries_of_detr() -> None:
    torch.manual_seed(0)
    ours = LearnedQueries(200, WIDTH, learn_pos=True, learn_content=False)
    queries, proposals = ours(memory_tokens(), decoder_heads())
    assert proposals is None and queries.reference_points is None and ours.reference_dim is None
    assert ours.pos is not None and queries.pos is not None and ours.has_pos and not ours.has_content
    assert torch.equal(queries.content, torch.zeros(2, 200, WIDTH))
    assert torch.equal(queries.pos[0], ours.pos) and torch.equal(queries.pos[1], ours.pos)
    assert abs(float(ours.pos.detach().std()) - 1) < 0.1


def test_learned_queries_of_deformable_detr() -> None:
    torch.manual_seed(0)
    reference = partial(LinearReference, embed_dim=WIDTH)
    ours = LearnedQueries(7, WIDTH, learn_pos=True, learn_content=True, reference=reference)
    queries, _ = ours(memory_tokens(), decoder_heads())
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
    queries, _ = ours(memory_tokens(), decoder_heads())
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
    queries, _ = ours(memory_tokens(), decoder_heads())
    assert queries.pos is None and [name for name, _ in ours.named_parameters()] == ["content"]


def test_the_last_channel_is_left_to_an_indicator() -> None:
    ours = LearnedQueries(7, WIDTH, learn_pos=True, learn_content=True, indicator=True)
    queries, _ = ours(memory_tokens(), decoder_heads())
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


def one_to_many(**changes: object) -> LearnedQueries:
    torch.manual_seed(0)
    arguments = {"learn_pos": True, "learn_content": True, "reference": partial(LinearReference, embed_dim=WIDTH)}
    return LearnedQueries(4, WIDTH, num_one_to_many=3, **{**arguments, **changes})  # type: ignore[arg-type]


def test_training_has_more_queries_than_evaluation_and_the_same_first() -> None:
    ours, memory, heads = one_to_many(), memory_tokens(), decoder_heads()
    assert (ours.num_queries, ours.num_one_to_many) == (4, 3)
    training, _ = ours.train()(memory, heads)
    evaluation, _ = ours.eval()(memory, heads)
    assert training.groups == {"match": slice(0, 4), "one_to_many": slice(4, 7)}
    assert evaluation.groups == {"match": slice(0, 4)} and evaluation.attention_mask is None
    assert ours.pos is not None and ours.content is not None and ours.reference is not None
    points = ours.reference(ours.pos)
    for queries, count in ((training, 7), (evaluation, 4)):
        for made, learned in (
            (queries.pos, ours.pos),
            (queries.content, ours.content),
            (queries.reference_points, points),
        ):
            assert made is not None and torch.equal(made, learned[:count].expand(2, -1, -1))


def test_groups_do_not_look_at_each_other() -> None:
    queries, _ = one_to_many().train()(memory_tokens(), decoder_heads())
    assert queries.attention_mask is not None
    assert queries.attention_mask.tolist() == [[(row < 4) != (column < 4) for column in range(7)] for row in range(7)]


def test_queries_of_training_learn() -> None:
    ours = one_to_many(learn_pos=False, learn_content=False, reference=partial(LearnedReference, dim=4)).train()
    queries, _ = ours(memory_tokens(), decoder_heads())
    assert queries.reference_points is not None and queries.content.shape == (2, 7, WIDTH)
    assert not queries.content.any()
    queries.reference_points.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.all() for parameter in ours.parameters())
    assert {parameter.shape[0] for parameter in ours.parameters()} == {7}


def test_no_queries_of_training_change_nothing() -> None:
    ours = LearnedQueries(4, WIDTH, True, True).train()
    queries, _ = ours(memory_tokens(), decoder_heads())
    assert queries.groups == {"match": slice(0, 4)} and queries.attention_mask is None
    with pytest.raises(ValueError, match=r"one_to_many\.num_queries=-1: expected 0 for none, or more"):
        LearnedQueries(4, WIDTH, True, True, num_one_to_many=-1)


def test_a_source_names_the_groups_of_whatever_queries_it_makes() -> None:
    ours, queries = QuerySource(2, 2), Queries(torch.randn(1, 4, WIDTH), torch.randn(1, 4, WIDTH))
    grouped = ours.grouped(queries)
    assert grouped.groups == {"match": slice(0, 2), "one_to_many": slice(2, 4)}
    assert grouped.content is queries.content and grouped.pos is queries.pos
    assert ours.count == 4 and ours.eval().count == 2
    fewer = replace(queries, content=queries.content[:, :2])
    assert ours.grouped(fewer).groups == {"match": slice(0, 2)}
