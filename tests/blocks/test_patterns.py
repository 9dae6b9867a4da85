from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from detfamily.blocks.patterns import Patterns
from detfamily.structures import Queries

WIDTH = 4


def object_queries() -> Queries:
    torch.manual_seed(0)
    content, pos = torch.randn(2, 2, 3, WIDTH)
    return Queries(content, pos, torch.rand(2, 3, 4), groups={"match": slice(0, 3)})


def test_every_place_with_every_pattern_all_of_the_first_pattern_first() -> None:
    ours, queries = Patterns(5, WIDTH), object_queries()
    repeated = ours(queries)
    assert ours.weight is not None and repeated.content.shape == (2, 15, WIDTH)
    for image, pattern, n in itertools.product(range(2), range(5), range(3)):
        place = pattern * 3 + n
        expected = queries.content[image, n] + ours.weight[pattern]
        assert torch.equal(repeated.content[image, place], expected)
        for theirs, original in (
            (repeated.pos, queries.pos),
            (repeated.reference_points, queries.reference_points),
        ):
            assert theirs is not None and original is not None
            assert torch.equal(theirs[image, place], original[image, n])
    assert repeated.groups == {"match": slice(0, 15)}


def test_queries_without_positions_and_references() -> None:
    repeated = Patterns(2, WIDTH)(replace(object_queries(), pos=None, reference_points=None))
    assert repeated.pos is None and repeated.reference_points is None and repeated.content.shape == (2, 6, WIDTH)


def test_no_patterns_change_nothing() -> None:
    queries = object_queries()
    assert Patterns(0, WIDTH)(queries) is queries and not list(Patterns(0, WIDTH).parameters())


def test_patterns_start_apart_and_learn() -> None:
    torch.manual_seed(0)
    ours = Patterns(600, WIDTH)
    assert ours.weight is not None and abs(float(ours.weight.detach().std()) - 1) < 0.05
    ours(object_queries()).content.sum().backward()
    assert ours.weight.grad is not None  # two images with three places each
    torch.testing.assert_close(ours.weight.grad, torch.full((600, WIDTH), 6.0))


def test_places_learn_from_all_their_patterns() -> None:
    queries = object_queries()
    assert queries.reference_points is not None
    queries.reference_points.requires_grad_()
    repeated = Patterns(3, WIDTH)(queries).reference_points
    assert repeated is not None
    repeated.sum().backward()
    assert queries.reference_points.grad is not None
    torch.testing.assert_close(queries.reference_points.grad, torch.full((2, 3, 4), 3.0))


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"model\.num_patterns=-1: expected 0 for none, or more"):
        Patterns(-1, WIDTH)
    queries = object_queries()
    for wrong in (
        replace(queries, attention_mask=torch.zeros(3, 3, dtype=torch.bool)),
        replace(queries, groups={"denoise": slice(0, 1), "match": slice(1, 3)}),
        replace(queries, groups={"match": slice(0, 2), "one_to_many": slice(2, 3)}),
    ):
        with pytest.raises(ValueError, match="the queries of one group without a mask"):
            Patterns(2, WIDTH)(wrong)
