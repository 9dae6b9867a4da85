"""LeapLabTHU/DAT and LeapLabTHU/DAT-Detection: cases say which of their modules they are of."""

from __future__ import annotations

from torch import Tensor

from detfamily.parity import dat_backbones, dat_modules
from detfamily.parity.case import Case


def results(case: Case) -> dict[str, Tensor]:
    """What the official module of the case gives.

    Raises:
        DataError: the module, or a value of its arguments, has no counterpart.
    """
    whole = case.info["module"].rpartition(":")[2] in dat_backbones.MODULES
    return dat_backbones.results(case) if whole else dat_modules.results(case)
