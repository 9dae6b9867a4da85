"""IDEA-Research/DN-DETR, ``dn_dab_deformable_detr``."""

from __future__ import annotations

from torch import Tensor

from detfamily.parity import denoising
from detfamily.parity.case import Case
from detfamily.parity.families import dab_deformable_detr, dab_detr

expected = denoising.expected


def results(case: Case) -> dict[str, Tensor]:
    """A detector in training and evaluation."""
    return dab_deformable_detr.results(case, overrides(case))


def overrides(case: Case) -> list[str]:
    """The official arguments in our words."""
    return ["family=dn_deformable_detr", *dab_deformable_detr.overrides(case)[1:], *dab_detr.denoising_overrides(case)]
