"""What was not finite is found and named, and the search leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from detfamily.build import build_criterion, build_detector
from detfamily.config import build, compose
from detfamily.criterion import Normalizer
from detfamily.data.loader import train_loader
from detfamily.engine.diagnosis import StepRecord, bad_words, diagnose, tensors
from detfamily.engine.runtime import Runtime
from detfamily.structures import Predictions

FAMILIES = {
    "detr": ("family=detr",),
    "deformable_detr": ("family=deformable_detr",),
    "two_stage": ("family=deformable_detr", "decoder=refine", "query_source=proposals"),
}
NAN, INF = float("nan"), float("inf")


class Step:
    """A detector, and a step of it that is fine until something is planted."""

    def __init__(self, tiny, *more):
        cfg = compose("train", [*(one for one in tiny if not one.startswith("family=")), *more, "model.dropout=0.1"])
        data = build(cfg.data)
        loader = train_loader(data.train(build(cfg.augmentation.train)), 2, 0, seed=0)
        self.batches = list(islice(iter(loader), 2))
        torch.manual_seed(0)
        self.model = build_detector(cfg, data.label_map.num_classes)
        self.criterion = build_criterion(cfg)
        self.ids = [list(batch.images.image_ids) for batch in self.batches]

    def parameter(self, name):
        return dict(self.model.named_parameters())[name]

    def plant(self, name, value=NAN):
        with torch.no_grad():
            self.parameter(name).view(-1)[0] = value

    def plant_box(self, batch, image, value):
        boxes = self.batches[batch].targets.boxes.clone()
        boxes[image, 0, 2] = value
        self.batches[batch] = replace(self.batches[batch], targets=replace(self.batches[batch].targets, boxes=boxes))

    def diagnose(self, scale=1.0):
        counts = torch.tensor([count for batch in self.batches for count in batch.targets.counts], dtype=torch.float32)
        record = StepRecord.of(self.batches, Normalizer(counts))
        return diagnose(self.model, self.criterion, record, torch.device("cpu"), Runtime().autocast, scale)


@pytest.fixture(params=FAMILIES)
def any_step(request, tiny):
    return Step(tiny, *FAMILIES[request.param])


@pytest.fixture
def step(tiny):
    return Step(tiny, *FAMILIES["deformable_detr"])


def test_a_step_that_is_fine_is_not_blamed_and_nothing_is_changed(any_step):
    model = any_step.model.train()
    for one in model.parameters():
        one.grad = torch.ones_like(one)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert any_step.diagnose() is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((one.grad == 1).all()) for one in model.parameters())
    assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        ("backbone.blocks.0.0.0.weight", "backbone.blocks.0.0.0"),
        ("encoder.layers.0.ffn.layers.0.bias", "encoder.layers.0.ffn.layers.0"),
        ("heads.box_heads.0.layers.0.bias", "heads.box_heads.0.layers.0"),
    ],
)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_broken_weight_is_named_with_the_first_output_that_shows_it(step, parameter, module, value):
    if parameter not in dict(step.model.named_parameters()):
        parameter = next(name for name, _ in step.model.named_parameters() if name.startswith("encoder.layers.0.ffn"))
        module = parameter.rpartition(".")[0]
    step.plant(parameter, value)
    words = step.diagnose()
    kind = "1 NaN" if value != value else "1 infinite"
    assert words.startswith(f"The weights are broken: {parameter} ({kind} of ")
    assert f"; the output of {module} (" in words


def test_every_broken_weight_is_counted(step):
    names = [name for name, _ in step.model.named_parameters()][:5]
    for name in names:
        step.plant(name)
    assert f"{names[0]} (1 NaN" in step.diagnose() and "and 2 more" in step.diagnose()


class Spoiling(nn.Module):
    """Normalises, and spoils one number of the second image of one batch."""

    def __init__(self, normalize, pixels):
        super().__init__()
        self.normalize = normalize.forward
        self.pixels = pixels

    def forward(self, pixels, padding_mask):
        found = self.normalize(pixels, padding_mask)
        if torch.equal(pixels, self.pixels):
            found[1, 0, 5, 5] = NAN
        return found


def test_an_output_names_the_image_that_it_came_from(step):
    normalize = step.model.normalize
    step.model.normalize = Spoiling(normalize, step.batches[1].images.pixels)
    size = 2 * 3 * 96 * 96
    assert step.diagnose() == f"First is the output of normalize (1 NaN of {size} numbers, image {step.ids[1][1]})"


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_box_that_no_check_has_seen_is_named_with_its_image(any_step, value):
    any_step.plant_box(1, 0, value)
    words = any_step.diagnose()
    assert words.startswith(f"First is the box of object 0 of image {any_step.ids[1][0]}: cx, cy, w, h = (")
    assert f", {value:g}, " in words


def test_a_loss_is_named_by_group_layer_and_term(step, monkeypatch):
    giou = step.criterion.losses["giou"]
    forward = giou.forward

    def broken(*arguments):
        values = forward(*arguments)
        return values + torch.tensor([0.0, INF])

    monkeypatch.setattr(giou, "forward", broken)
    assert step.diagnose() == "First is the loss match/1/giou (1 infinite of 1 number)"


class RootOfZero(nn.Module):
    """Zero, whose gradient is infinite times zero."""

    def forward(self, values):
        return values + (values * 0).sqrt()


def test_a_gradient_is_named_where_the_backward_pass_meets_it_first(step):
    head = step.model.heads.box_heads[0]
    head.layers[1] = nn.Sequential(head.layers[1], RootOfZero())
    words = step.diagnose()
    assert words.startswith("First is the gradient of heads.box_heads.0.layers.1.0.")
    assert words.endswith("more parameters; all losses are finite")


def test_gradients_are_those_of_the_scaled_loss(step):
    assert step.diagnose(scale=1e38).startswith("First is the gradient of heads.")


def test_words_about_numbers():
    assert bad_words(torch.tensor([1, 2])) == "" and bad_words(torch.ones(2)) == ""
    assert bad_words(torch.tensor([NAN, INF, -INF, 1.0])) == "1 NaN and 2 infinite of 4 numbers"
    assert bad_words(torch.tensor(NAN)) == "1 NaN of 1 number"


def test_tensors_are_found_wherever_they_are():
    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    value = {"a": [Predictions(one, two), None], "b": ("x", three, 1)}
    assert [tensor.numel() for tensor in tensors(value)] == [1, 2, 3]
