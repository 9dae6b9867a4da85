from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from detfamily.data.labels import LabelMap
from detfamily.errors import DataError

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 7, "name": "train"}, {"id": 21, "name": "cow"}]


def test_contiguous_labels_follow_the_category_ids() -> None:
    labels = LabelMap.contiguous(CATEGORIES)
    assert labels.num_classes == labels.num_categories == 3
    assert labels.names == ("train", "cow", "toothbrush")
    assert [labels.label_of(i) for i in (7, 21, 90)] == [0, 1, 2]
    assert [labels.category_id(i) for i in range(3)] == [7, 21, 90]


def test_by_category_id_keeps_the_columns_of_official_heads() -> None:
    labels = LabelMap.by_category_id(CATEGORIES)
    assert labels.num_classes == 91
    assert labels.num_categories == 3
    used = {i for i in range(91) if labels.category_id(i) is not None}
    assert used == {7, 21, 90}
    assert all(labels.label_of(i) == i == labels.category_id(i) for i in used)
    assert labels.name(21) == "cow"
    assert labels.names[8] is None
    assert "unused" in labels.name(8)


@pytest.mark.parametrize("make", [LabelMap.contiguous, LabelMap.by_category_id])
def test_the_state_survives_json(make: Callable[..., Any]) -> None:
    labels = make(CATEGORIES)
    assert LabelMap.from_state_dict(json.loads(json.dumps(labels.state_dict()))) == labels


@pytest.mark.parametrize(
    ("categories", "word"),
    [
        ([], "no categories"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "category id 1 occurs twice"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "name 'a' occurs twice: ids 1 and 2"),
        ([{"id": "1", "name": "a"}], "whole number"),
        ([{"id": 1}], "category 1 needs a text"),
    ],
)
@pytest.mark.parametrize("make", [LabelMap.contiguous, LabelMap.by_category_id])
def test_bad_categories_are_named(make: Callable[..., Any], categories: list[dict[str, object]], word: str) -> None:
    with pytest.raises(DataError, match=word):
        make(categories)


def test_an_unknown_category_is_answered_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="category id 8 is not in the label map; valid names: 21, 7, 90"):
        LabelMap.contiguous(CATEGORIES).label_of(8)


def test_huge_or_negative_ids_do_not_become_huge_heads() -> None:
    for category_id in (-1, 10_000_000):
        with pytest.raises(DataError, match="contiguous"):
            LabelMap.by_category_id([{"id": category_id, "name": "a"}])


def test_a_state_without_its_parts_is_refused() -> None:
    with pytest.raises(DataError, match="category_ids"):
        LabelMap.from_state_dict({"names": ["a"]})
    with pytest.raises(DataError, match="2 category ids but 1 names"):
        LabelMap.from_state_dict({"category_ids": [1, 2], "names": ["a"]})
