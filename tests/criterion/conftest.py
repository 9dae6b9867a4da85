from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from detfamily.criterion import Criterion
from detfamily.criterion.losses import FocalClassLoss, GIoULoss, L1Loss, SoftmaxClassLoss
from detfamily.criterion.matcher import FocalClassCost, Matcher, SoftmaxClassCost
from detfamily.criterion.rules import Hungarian, Known
from detfamily.structures import Given, Predictions, Targets

COST = {"class": 1.5, "l1": 5.0, "giou": 2.0}
WEIGHTS = {"class": 0.7, "l1": 5.0, "giou": 2.0}
NO_OBJECT, ALPHA, GAMMA = 0.1, 0.3, 2.0


@dataclass(frozen=True)
class Example:
    """Random predictions and objects, with a reference that looks at one layer and one image at a time."""

    kind: str
    predictions: Predictions
    labels: list[Tensor]
    boxes: list[Tensor]

    @property
    def targets(self) -> Targets:
        return Targets.from_lists(self.labels, self.boxes, image_ids=[100 + i for i in range(len(self.labels))])

    def criterion(self, **settings: object) -> Criterion:
        focal = self.kind == "focal"
        loss = FocalClassLoss(ALPHA, GAMMA) if focal else SoftmaxClassLoss(NO_OBJECT)
        arguments: dict[str, object] = {
            "matcher": Matcher(FocalClassCost() if focal else SoftmaxClassCost(), COST),
            "losses": {"class": loss, "l1": L1Loss(), "giou": GIoULoss()},
            "weights": WEIGHTS,
            "groups": {
                "match": Hungarian(),
                "proposals": Hungarian(class_agnostic=True, weight=0.5),
                "denoise": Known(weight=0.25),
            },
            **settings,
        }
        return Criterion(**arguments)  # type: ignore[arg-type]

    def naive_cost(self, layer: int, image: int) -> Tensor:
        """(N, n), with every number computed on its own."""
        logits, boxes = self.predictions.logits[layer, image].detach(), self.predictions.boxes[layer, image].detach()
        cost = torch.zeros(len(boxes), len(self.boxes[image]), dtype=boxes.dtype)
        for query in range(len(boxes)):
            for target, (label, box) in enumerate(zip(self.labels[image], self.boxes[image], strict=True)):
                if self.kind == "focal":
                    p = float(logits[query, label].sigmoid())
                    hit = 0.25 * (1 - p) ** 2 * -torch.log(torch.tensor(p + 1e-8))
                    miss = 0.75 * p**2 * -torch.log(torch.tensor(1 - p + 1e-8))
                    of_class = float(hit - miss)
                else:
                    of_class = -float(logits[query].softmax(-1)[label])
                l1 = float(F.l1_loss(boxes[query], box, reduction="sum"))
                giou = float(_giou(boxes[query][None], box[None])[0, 0])
                cost[query, target] = COST["class"] * of_class + COST["l1"] * l1 - COST["giou"] * giou
        return cost

    def naive_match(self, layer: int, image: int) -> tuple[list[int], list[int]]:
        queries, targets = linear_sum_assignment(self.naive_cost(layer, image).numpy())
        return queries.tolist(), targets.tolist()

    def naive_losses(self, layer: int, num_boxes: float | None = None) -> dict[str, Tensor]:
        logits, boxes = self.predictions.logits[layer], self.predictions.boxes[layer]
        classes = logits.shape[-1]
        count = max(sum(len(one) for one in self.labels), 1) if num_boxes is None else num_boxes
        wanted = torch.full(logits.shape[:2], classes - 1)  # "no object"
        one_hot = torch.zeros_like(logits)
        l1, giou = logits.new_zeros(()), logits.new_zeros(())
        for image in range(len(logits)):
            for query, target in zip(*self.naive_match(layer, image), strict=True):
                label, box = self.labels[image][target], self.boxes[image][target]
                wanted[image, query] = label
                one_hot[image, query, label] = 1
                l1 = l1 + F.l1_loss(boxes[image, query], box, reduction="sum")
                giou = giou + 1 - _giou(boxes[image, query][None], box[None])[0, 0]
        if self.kind == "focal":
            of_class = sigmoid_focal_loss(logits, one_hot, ALPHA, GAMMA, reduction="sum") / count
        else:
            weight = torch.ones(classes, dtype=logits.dtype)
            weight[-1] = NO_OBJECT
            of_class = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight)
        return {"class": of_class, "l1": l1 / count, "giou": giou / count}

    def naive_total(self) -> Tensor:
        total = torch.zeros((), dtype=self.predictions.logits.dtype)
        for layer in range(len(self.predictions.logits)):
            for name, value in self.naive_losses(layer).items():
                total = total + WEIGHTS[name] * value
        return total


def _giou(a: Tensor, b: Tensor) -> Tensor:
    return generalized_box_iou(box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy"))


def random_boxes(*shape: int) -> Tensor:
    return torch.cat([torch.rand(*shape, 2), 0.05 + 0.4 * torch.rand(*shape, 2)], -1).double()


Giver = Callable[..., Example]


@pytest.fixture(scope="session")
def given() -> Giver:
    """Make predictions of a kind ("focal" or "softmax") for images with so many objects each."""

    def make(kind: str, counts: Sequence[int], layers: int = 3, queries: int = 7, classes: int = 4) -> Example:
        torch.manual_seed(sum(counts) + queries)
        columns = classes + (kind == "softmax")
        logits = torch.randn(layers, len(counts), queries, columns, dtype=torch.float64)
        predictions = Predictions(logits.requires_grad_(), random_boxes(layers, len(counts), queries).requires_grad_())
        labels = [torch.randint(0, classes, (count,)) for count in counts]
        return Example(kind, predictions, labels, [random_boxes(count) for count in counts])

    return make


@dataclass(frozen=True)
class NoisedExample:
    """Random predictions for copies of the objects of an example, with a reference that looks at one copy at a time.

    Attributes:
        example: whose objects are copied.
        predictions: of the copies, group by group, with slots for the fullest image's objects.
        others: (image, slot) of queries that are to find nothing.
    """

    example: Example
    predictions: Predictions
    others: list[tuple[int, int]]

    def naive_losses(self, layer: int, num_boxes: float | None = None) -> dict[str, Tensor]:
        assert self.predictions.given is not None
        logits, boxes = self.predictions.logits[layer], self.predictions.boxes[layer]
        most, groups = max(len(one) for one in self.example.labels), self.predictions.given.copies
        focal, classes = self.example.kind == "focal", logits.shape[-1]
        sums = {name: logits.new_zeros(()) for name in ("class", "l1", "giou")}
        weights = 0.0
        for image, (labels, wanted) in enumerate(zip(self.example.labels, self.example.boxes, strict=True)):
            for group in range(groups):
                for t, (label, box) in enumerate(zip(labels.tolist(), wanted, strict=True)):
                    slot = group * most + t
                    sums["class"] = sums["class"] + _class_loss(focal, logits[image, slot], label)
                    sums["l1"] = sums["l1"] + F.l1_loss(boxes[image, slot], box, reduction="sum")
                    sums["giou"] = sums["giou"] + 1 - _giou(boxes[image, slot][None], box[None])[0, 0]
                    weights += 1
        for image, slot in self.others:
            nothing = _class_loss(focal, logits[image, slot], None if focal else classes - 1)
            sums["class"] = sums["class"] + (nothing if focal else NO_OBJECT * nothing)
            weights += NO_OBJECT
        total = max(sum(len(one) for one in self.example.labels), 1) * groups
        count = total if num_boxes is None else num_boxes
        divisor = count if focal else (weights if weights else 1.0)
        return {"class": sums["class"] / divisor, "l1": sums["l1"] / count, "giou": sums["giou"] / count}

    def naive_total(self) -> Tensor:
        total = torch.zeros((), dtype=self.predictions.logits.dtype)
        for layer in range(len(self.predictions.logits)):
            for name, value in self.naive_losses(layer).items():
                total = total + WEIGHTS[name] * value
        return total


def _class_loss(focal: bool, logits: Tensor, label: int | None) -> Tensor:
    """Of one query; None is nothing, which in softmax losses is a class."""
    if not focal:
        assert label is not None
        return F.cross_entropy(logits[None], torch.tensor([label]))
    one_hot = torch.zeros_like(logits)
    if label is not None:
        one_hot[label] = 1
    return sigmoid_focal_loss(logits, one_hot, ALPHA, GAMMA, reduction="sum")


Noiser = Callable[..., NoisedExample]


@pytest.fixture(scope="session")
def noised() -> Noiser:
    """Make predictions for copies of an example's objects; ``others``: some queries are to find nothing."""

    def make(example: Example, groups: int, layers: int = 3, others: bool = False, limit: int = 1000) -> NoisedExample:
        torch.manual_seed(groups)
        batch, most = len(example.labels), max(len(one) for one in example.labels)
        columns = example.predictions.logits.shape[-1]
        matched = torch.zeros(batch, groups * most, dtype=torch.bool)
        labels = (
            torch.randint(0, columns - 1, matched.shape)
            if columns > 1
            else torch.zeros(matched.shape, dtype=torch.int64)
        )
        boxes = random_boxes(*matched.shape)  # unused slots hold anything
        for image, group in itertools.product(range(batch), range(groups)):
            here = slice(group * most, group * most + len(example.labels[image]))
            matched[image, here] = True
            labels[image, here], boxes[image, here] = example.labels[image], example.boxes[image]
        empty = (~matched).nonzero().tolist() if others else []
        counted = matched.clone()
        for image, slot in empty[::2]:
            counted[image, slot] = True
        counts = tuple(len(one) * groups for one in example.labels)
        known = Given(Targets(labels, boxes, counts, tuple(range(batch))), matched, counted, groups, limit)
        logits = torch.randn(layers, *matched.shape, columns, dtype=torch.float64)
        said = Predictions(logits.requires_grad_(), random_boxes(layers, *matched.shape).requires_grad_(), known)
        return NoisedExample(example, said, [(image, slot) for image, slot in empty[::2]])

    return make
