"""What all heads have in common."""

from __future__ import annotations

from typing import ClassVar

import pytest

from detfamily.auxiliary import ATSS, AuxiliaryHead, FasterRCNN


class Two(AuxiliaryHead):
    name: ClassVar[str] = "two"
    losses: ClassVar[tuple[str, ...]] = ("class", "l1")


def test_weights_in_the_order_of_the_losses() -> None:
    assert list(Two({"l1": 5, "class": 0.0}).weights.items()) == [("class", 0.0), ("l1", 5.0)]


@pytest.mark.parametrize(
    "weights", [{}, {"class": 1.0}, {"class": 1.0, "l1": 1.0, "giou": 1.0}, {"class": 1, "l1": -1}]
)
def test_other_weights(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"two\.weights=.*for each of class, l1"):
        Two(weights)


def test_names() -> None:
    assert (ATSS.name, FasterRCNN.name) == ("atss", "faster_rcnn")
