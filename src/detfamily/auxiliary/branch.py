"""One auxiliary head in the place of the decoder (Co-DETR, arXiv 2211.12860, table 11)."""

from __future__ import annotations

from typing import cast

from torch import nn

from detfamily.auxiliary.head import AuxiliaryHead
from detfamily.detector import Detector
from detfamily.errors import ConfigError, nearest
from detfamily.structures import Detections, Images


class Branch(nn.Module):
    """What an auxiliary head of a detector finds on its own.

    Args:
        detector: with that head.
        name: of the head: "atss".

    Raises:
        ConfigError: the detector has no such head.
    """

    def __init__(self, detector: Detector, name: str) -> None:
        super().__init__()
        check_branch(detector, name)
        self.detector = detector
        self.name = name

    def forward(self, images: Images) -> list[Detections]:
        """The detections of each image."""
        auxiliary = self.detector.auxiliary
        assert auxiliary is not None
        maps = auxiliary.maps(self.detector.encode(images))
        return cast("AuxiliaryHead", auxiliary.heads[self.name]).detect(maps, images)


def check_branch(detector: Detector, name: str) -> None:
    """Refuse the name of a head that a detector does not have.

    Raises:
        ConfigError: with the heads that there are.
    """
    if detector.auxiliary is None:
        raise ConfigError(
            f"evaluation.branch={name} wants an auxiliary head, and this model has none: add auxiliary={name} to its "
            "training, or evaluation.branch=null for the decoder's answers"
        )
    if name not in detector.auxiliary.heads:
        raise ConfigError(
            f"evaluation.branch={name} is no auxiliary head: {nearest(name, list(detector.auxiliary.heads))}"
        )
