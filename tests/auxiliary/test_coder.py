"""Steps between boxes against the formulas, one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from detfamily.auxiliary.coder import DeltaCoder

from .checks import check_output
from .conftest import SHAPES, Golden

SOURCE, BOX, STDS = (10.0, 20.0, 50.0, 40.0), (0.0, 25.0, 20.0, 65.0), (0.1, 0.1, 0.2, 0.2)
# centres (30, 30) and (10, 45), sides (40, 20) and (20, 40)
STEP = (-20 / 40 / 0.1, 15 / 20 / 0.1, math.log(20 / 40) / 0.2, math.log(40 / 20) / 0.2)


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def test_there_and_back() -> None:
    coder = DeltaCoder(STDS)
    torch.testing.assert_close(coder.encode(row(*SOURCE), row(*BOX)), row(*STEP))
    torch.testing.assert_close(coder.decode(row(*SOURCE), row(*STEP)), row(*BOX))


@pytest.mark.parametrize(("step", "ratio"), [(50.0, 62.5), (-50.0, 1 / 62.5)])
def test_sides_do_not_explode(step: float, ratio: float) -> None:
    found = DeltaCoder().decode(row(*SOURCE), row(0, 0, step, 0))
    torch.testing.assert_close(found, row(30 - 20 * ratio, 20, 30 + 20 * ratio, 40))


def test_the_official_steps_to_objects(golden: Golden) -> None:
    rpn = golden.heads["faster_rcnn"].rpn
    anchors = rpn.anchors(SHAPES, golden["targets.0.boxes_xyxy"])
    for image in range(2):
        source = anchors[golden[f"rpn.{image}.pos_inds"]]
        objects = golden[f"targets.{image}.boxes_xyxy"][golden[f"rpn.{image}.pos_gt"]]
        check_output(rpn.coder.encode(source, objects), golden[f"rpn.{image}.pos_deltas"])


@pytest.mark.parametrize("stds", [(1.0, 1.0), (1.0, 1.0, 0.0, 1.0)])
def test_stds_out_of_range(stds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="coder.stds"):
        DeltaCoder(stds)
