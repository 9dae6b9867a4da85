"""One cell: what is measured, against counts by hand, and what is found to be wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detfamily.config import compose
from detfamily.errors import ConfigError, DataError
from detfamily.matrix import cell as module
from detfamily.matrix.cell import (
    FAILED,
    OK,
    REFUSED,
    BrokenError,
    Step,
    check_changes,
    check_finite,
    check_gradients,
    counting_kept,
    examine,
    is_refusal,
    make_batch,
)
from detfamily.matrix.request import Cell, Settings, read_request
from detfamily.structures import Predictions

SMALL = ("families=[detr]", "attentions=[dense]", "backbones=[small]", "size=[64,64]", "repeats=1", "runtime=cpu")


def one_cell(*words: str) -> Cell:
    given = {one.partition("=")[0]: one for one in (*SMALL, "runtime.threads=1", *words)}
    (cell,) = read_request(list(given.values())).cells()
    return cell


def test_bytes_kept_for_the_backward_pass() -> None:
    """A linear layer keeps its input, a ReLU its output, a softmax its output; views of one storage count once."""
    linear = nn.Linear(6, 10)
    x = torch.randn(5, 6, requires_grad=True)
    with counting_kept(linear) as kept:
        hidden = linear(x).relu()
        hidden.softmax(-1)
    assert kept() == 4 * (5 * 6 + 5 * 10 + 5 * 10)
    with counting_kept(linear) as kept:
        (x.t().exp() * 2).square()  # the output of exp, and what is squared
    assert kept() == 4 * (2 * 5 * 6)
    with counting_kept(linear) as kept, torch.no_grad():
        linear(x).relu()
    assert kept() == 0


def test_more_images_keep_more() -> None:
    one, four = (Step(*parts(f"batch_size={count}")).first()[0] for count in (1, 4))
    assert 3 * one < four < 5 * one


def parts(*words: str) -> tuple:
    cell = one_cell(*words)
    cfg = compose("train", cell.overrides)
    from detfamily.config import build

    return cfg, cell.settings, build(cfg.runtime)


def test_a_batch_has_padding_and_an_image_without_objects() -> None:
    batch = make_batch((64, 96), 4, 7)
    assert batch.images.sizes == ((64, 96), (48, 72)) * 2 and batch.images.padded
    assert batch.targets.counts == (3, 2, 1, 0)
    boxes = batch.targets.boxes[batch.targets.valid]
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    assert (low >= 0).all() and (high <= 1).all() and int(batch.targets.labels.max()) < 7


def test_an_outcome_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = examine(one_cell())
    assert outcome.status == OK and outcome.figures is not None and outcome.figures.loss > 0
    refused = examine(one_cell("model.num_heads=3"))
    assert refused.status == REFUSED and "num_heads=3 does not divide embed_dim=64" in refused.reason

    def fail(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(module, "build_criterion", fail)
    failed = examine(one_cell())
    assert failed.status == FAILED and failed.reason == "KeyError: 'x'" and "in fail" in failed.details


def caught(function, *arguments) -> Exception:
    with pytest.raises(Exception) as info:
        function(*arguments)
    return info.value


def test_only_what_our_checks_raise_is_a_refusal() -> None:
    from detfamily.attention import DenseAttention

    assert is_refusal(ConfigError("x")) and is_refusal(DataError("x"))
    assert is_refusal(caught(DenseAttention, 32, 5))
    assert not is_refusal(caught(nn.Conv2d, 3, 3, -1, 1, 0, 1, 2))  # a ValueError of torch
    assert not is_refusal(caught(make_batch, (8, 8, 8), 1, 1)), "a ValueError of Python in our code"
    assert not is_refusal(caught(lambda: [][0]))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def test_gradients_that_are_missing_or_not_finite() -> None:
    toy = Toy()
    toy.used.sum().backward()
    with pytest.raises(BrokenError, match="no gradient reaches unused"):
        check_gradients(toy)
    (toy.unused * 0).sum().backward()
    check_gradients(toy)
    toy.used.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(BrokenError, match="gradient of used is not finite"):
        check_gradients(toy)


def test_a_step_that_does_nothing_or_too_much() -> None:
    toy = Toy()
    before = {name: one.detach().clone() for name, one in toy.named_parameters()}
    toy.used.grad, toy.unused.grad = torch.tensor([0.0, 1e-3]), torch.tensor([0.0, 1e-10])
    with pytest.raises(BrokenError, match="a step leaves used as it was"):
        check_changes(before, toy)
    with torch.no_grad():
        toy.used.add_(1)
    assert check_changes(before, toy) == ["unused"]
    toy.frozen.add_(1)
    with pytest.raises(BrokenError, match="frozen is frozen"):
        check_changes(before, toy)


def test_numbers_that_are_none() -> None:
    good = Predictions(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 4))
    bad = Predictions(good.logits, good.boxes / 0)
    losses = SimpleNamespace(total=torch.tensor(1.0), parts={"match/0/giou": torch.tensor(float("inf"))})
    with pytest.raises(BrokenError, match="the group 'match' are not finite"):
        check_finite({"match": bad}, losses)
    with pytest.raises(BrokenError, match="loss 'match/0/giou'"):
        check_finite({"match": good}, losses)


def test_settings_are_those_of_the_cell() -> None:
    assert one_cell("num_classes=3").settings == Settings((64, 64), 2, 3, 1)
