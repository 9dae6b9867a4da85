from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from detfamily.criterion.matcher import FocalClassCost, Matcher, SoftmaxClassCost, assign, pairs
from detfamily.errors import NonFiniteError
from detfamily.structures import Targets

Given = Callable[..., Any]
COUNTS = [2, 0, 9, 5]  # nothing, and more than the 7 queries


@pytest.mark.parametrize("kind", ["focal", "softmax"])
def test_costs_number_by_number(given: Given, kind: str) -> None:
    one = given(kind, COUNTS)
    cost = one.criterion().matcher.cost(one.predictions, one.targets)
    assert cost.shape == (3, 4, 7, 9) and not cost.requires_grad
    for layer in range(3):
        for image, count in enumerate(COUNTS):
            torch.testing.assert_close(
                cost[layer, image, :, :count], one.naive_cost(layer, image), rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("kind", ["focal", "softmax"])
def test_assignments_are_scipys_on_each_layer_and_image_alone(given: Given, kind: str) -> None:
    one = given(kind, COUNTS)
    cost = one.criterion().matcher.cost(one.predictions, one.targets)
    assignments, rode = assign({"match": cost}, {"match": one.targets})
    assignment = assignments["match"]
    assert rode is None and assignment.query.shape == assignment.matched.shape == (3, 4, 9)
    for layer in range(3):
        found = pairs(assignment, one.targets.counts, layer)
        for image in range(4):
            queries, targets = one.naive_match(layer, image)
            assert found[image][0].tolist() == queries and found[image][1].tolist() == targets
            assert int(assignment.matched[layer, image].sum()) == min(COUNTS[image], 7)
    assert not assignment.query[~assignment.matched].any()


def test_gather_gives_each_target_the_values_of_its_query() -> None:
    cost = torch.tensor([[[[3.0, 0.0], [0.0, 3.0], [2.0, 2.0]]]])
    targets = Targets.from_lists([torch.tensor([0, 0])], [torch.full((2, 4), 0.5)])
    assignments, _ = assign({"match": cost}, {"match": targets})
    values = torch.tensor([[[[10.0], [11.0], [12.0]]]])
    assert assignments["match"].gather(values).flatten().tolist() == [11.0, 10.0]


def test_groups_and_passengers_share_the_copy(given: Given) -> None:
    first, second = given("focal", [2, 3]), given("focal", [2, 3], layers=1, queries=9)
    matcher = first.criterion().matcher
    targets = {"match": first.targets, "proposals": second.targets}
    costs = {"match": matcher.cost(first.predictions, first.targets)}
    costs["proposals"] = matcher.cost(second.predictions, second.targets)
    together, rode = assign(costs, targets, torch.tensor([1.5, -2.0]))
    assert rode is not None and rode.tolist() == [1.5, -2.0]
    for name in costs:
        alone, _ = assign({name: costs[name]}, {name: targets[name]})
        assert torch.equal(together[name].query, alone[name].query)
        assert torch.equal(together[name].matched, alone[name].matched)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_cost_that_is_no_number_names_group_layer_and_image(given: Given, bad: float) -> None:
    one = given("focal", [2, 0, 3])
    cost = one.criterion().matcher.cost(one.predictions, one.targets)
    cost[1, 2, 4, 2] = bad
    with pytest.raises(NonFiniteError, match="group 'match', layer 1, image 102 has NaN or infinite"):
        assign({"match": cost}, {"match": one.targets})


def test_what_lies_in_the_padding_of_targets_may_be_anything(given: Given) -> None:
    one = given("focal", [2, 0, 3])
    cost = one.criterion().matcher.cost(one.predictions, one.targets)
    before, _ = assign({"match": cost}, {"match": one.targets})
    cost[:, 0, :, 2:] = float("nan")
    cost[:, 1] = float("-inf")
    after, _ = assign({"match": cost}, {"match": one.targets})
    assert torch.equal(before["match"].query, after["match"].query)


def test_parts_without_weight_are_left_out(given: Given) -> None:
    one = given("softmax", [3])
    only = {
        name: Matcher(SoftmaxClassCost(), {"class": 0, "l1": 0, "giou": 0, name: 2.0}).cost(
            one.predictions, one.targets
        )
        for name in ("class", "l1", "giou")
    }
    boxes, wanted = one.predictions.boxes[0, 0].detach(), one.boxes[0]
    torch.testing.assert_close(only["l1"][0, 0], 2 * torch.cdist(boxes, wanted, p=1))
    probabilities = one.predictions.logits[0, 0].detach().softmax(-1)[:, one.labels[0]]
    torch.testing.assert_close(only["class"][0, 0], -2 * probabilities)
    assert ((only["giou"] >= -2) & (only["giou"] <= 2)).all()


def test_weights_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"has \['class', 'iou', 'l1'\]; expected 'class', 'l1' and 'giou'"):
        Matcher(FocalClassCost(), {"class": 1, "l1": 1, "iou": 1})
    with pytest.raises(ValueError, match="all zero"):
        Matcher(FocalClassCost(), {"class": 0, "l1": 0, "giou": 0})
