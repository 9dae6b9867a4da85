from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detfamily.auxiliary import ATSS, FasterRCNN, Objects, PositiveQueries, Positives
from detfamily.auxiliary.anchors import Anchors
from detfamily.auxiliary.assigners import ATSSAssigner, MaxIoUAssigner
from detfamily.auxiliary.coder import DeltaCoder
from detfamily.auxiliary.detect import BestBoxes
from detfamily.auxiliary.roi_head import RoIHead
from detfamily.auxiliary.rpn import RPN
from detfamily.auxiliary.samplers import RandomSampler
from detfamily.blocks.denoising import Draws
from detfamily.checkpoints.adapter import Adapter
from detfamily.checkpoints.co_detr_heads import rules
from detfamily.parity.case import Case
from detfamily.structures import Images, Targets

SHAPES = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
HEADS = ("rpn_head.", "roi_head.", "bbox_head.")


class Stored(Draws):
    """Draws that make the first entries of stored permutations win, in their order.

    Args:
        orders: for every row that is asked for, the order of its candidates, or the beginning of it; None where nothing
            has to be chosen.
    """

    def __init__(self, orders: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.orders = list(orders)

    def uniform(self, wanted: Tensor, *more: int) -> Tensor:
        rows = wanted.reshape(-1, wanted.shape[-1])
        drawn = torch.full(rows.shape, 0.99)
        for row, candidates in zip(drawn, rows, strict=True):
            order = self.orders.pop(0)
            if order is not None:
                place = candidates.nonzero()[:, 0][order.long()]
                row[place] = torch.arange(len(order)) / 1e4
        return drawn.view(wanted.shape)


@dataclass(frozen=True)
class Golden:
    """A training step of the official code."""

    case: Case
    maps: list[Tensor]
    images: Images
    targets: Targets
    heads: nn.ModuleDict

    @property
    def objects(self) -> Objects:
        return Objects.of(self.images, self.targets)

    def __getitem__(self, key: str) -> Tensor:
        return self.case.io[key]

    def order(self, number: int) -> Tensor:
        return self[f"rng.{number:02}.randperm"]

    def draws(self, head: str) -> Stored:
        """What the official code drew for a head; the others are those that it does not draw, as all are taken."""
        if head == "faster_rcnn":
            sampled = [one for number in range(4, 8) for one in (None, self.order(number))]
            return Stored([*sampled, None, None, self.order(8), self.order(9)])
        return Stored([self.order(10), None, None, self.order(11)])

    def step(self, head: str) -> tuple[dict[str, Tensor], Positives]:
        """Losses and queries of a head, chosen as officially."""
        draws = self.draws(head)
        found = self.heads[head](self.maps, self.images, self.objects, draws)
        choose = PositiveQueries(self.case.info["args"]["max_pos_coords"])
        return found.losses, choose(found.candidates, self.objects, self.images, draws)

    def weight(self, official: str) -> float:
        groups: dict[str, dict[str, float]] = self.case.info["matcher_and_loss"]["co_heads"]
        (found,) = [group[official] for group in groups.values() if official in group]
        return found

    def gradients(self, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
        """By our names."""
        stored = {key.removeprefix("grad."): value for key, value in self.case.io.items() if key.startswith("grad.")}
        return Adapter(rules()).to_ours({key: value for key, value in stored.items() if key.startswith(prefixes)})


def heads_of(args: dict[str, Any]) -> nn.ModuleDict:
    width, classes, strides = args["embed_dims"], args["num_classes"], args["anchor_strides"]
    stds = (0.1, 0.1, 0.2, 0.2)
    rpn = partial(
        RPN,
        embed_dim=width,
        anchors=partial(Anchors, size=4, scales=3, ratios=(0.5, 1.0, 2.0)),
        coder=DeltaCoder(),
        assigner=MaxIoUAssigner(0.7, 0.3, 0.3),
        sampler=RandomSampler(args["rpn_sampler_num"], 0.5),
        per_level=args["rpn_nms_pre"],
        proposals=args["rpn_max_per_img"],
    )
    roi = partial(
        RoIHead,
        embed_dim=width,
        num_classes=classes,
        finest_scale=args["roi_finest_scale"],
        resolution=7,
        hidden_dim=args["roi_fc_out_channels"],
        coder=DeltaCoder(stds),
        assigner=MaxIoUAssigner(0.5, 0.5),
        sampler=RandomSampler(args["rcnn_sampler_num"], 0.25),
        selection=BestBoxes(0.5, None),
    )
    atss = ATSS(
        strides,
        width,
        classes,
        depth=1,
        num_groups=32,
        anchors=partial(Anchors, size=8, scales=1, ratios=(1.0,)),
        coder=DeltaCoder(stds),
        assigner=ATSSAssigner(9),
        weights=dict.fromkeys(ATSS.losses, 1.0),
        selection=BestBoxes(0.6),
    )
    two_stage = FasterRCNN(strides, rpn, roi, dict.fromkeys(FasterRCNN.losses, 1.0))
    return nn.ModuleDict({"faster_rcnn": two_stage, "atss": atss})


@pytest.fixture(params=["co_dino_train", "co_dino_train_empty"])
def golden(goldens: Path, request: pytest.FixtureRequest) -> Golden:
    """A step with objects in both images, and one with an image without objects."""
    case = Case.load(goldens / "co_detr" / request.param)
    memory = case.io["mid.encoder_memory"].transpose(1, 2).split([h * w for h, w in SHAPES[:-1]], -1)
    maps = [one.unflatten(-1, shape) for one, shape in zip(memory, SHAPES[:-1], strict=True)]
    sizes = tuple((int(case.io[f"targets.{i}.size"][0]), int(case.io[f"targets.{i}.size"][1])) for i in range(2))
    mask = case.io["mask"]
    heads = heads_of(case.info["args"])
    official = {name: value for name, value in case.weights.items() if name.startswith(HEADS)}
    heads.load_state_dict(Adapter(rules()).to_ours(official))
    return Golden(
        case,
        [*maps, case.io["mid.aux_feat_extra"]],
        Images(torch.zeros(2, 3, *mask.shape[1:]), mask, sizes, sizes, (0, 1)),
        Targets.from_lists(*([case.io[f"targets.{i}.{what}"] for i in range(2)] for what in ("labels", "boxes"))),
        heads,
    )


Batch = tuple[list[Tensor], Images, Objects]


@pytest.fixture
def batch() -> Callable[..., Batch]:
    """Random maps of two levels in float64, of two images, the second of which is smaller."""

    def make(counts: tuple[int, int] = (3, 1), width: int = 8) -> Batch:
        torch.manual_seed(0)
        maps = [torch.randn(2, width, *shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 8), (3, 4))]
        mask = torch.zeros(2, 48, 64, dtype=torch.bool)
        mask[1, 36:], mask[1, :, 42:] = True, True
        sizes = ((48, 64), (36, 42))
        low = [0.5 * torch.rand(count, 2, dtype=torch.float64) for count in counts]
        side = [0.2 + 0.3 * torch.rand(count, 2, dtype=torch.float64) for count in counts]
        boxes = [torch.cat([a + b / 2, b], 1) for a, b in zip(low, side, strict=True)]
        labels = [torch.randint(5, (count,)) for count in counts]
        images = Images(torch.zeros(2, 3, 48, 64), mask, sizes, ((96, 128), (24, 63)), (0, 1))
        return maps, images, Objects.of(images, Targets.from_lists(labels, boxes))

    return make
