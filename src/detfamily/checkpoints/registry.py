"""Which adapter reads the official weights of which family."""

from __future__ import annotations

from collections.abc import Callable

from detfamily.checkpoints import deformable_detr, detr
from detfamily.checkpoints.adapter import Adapter
from detfamily.detector import Detector
from detfamily.errors import CheckpointError, nearest

ADAPTERS: dict[str, Callable[[Detector], Adapter]] = {
    "detr": detr.adapter,
    "deformable_detr": deformable_detr.adapter,
}


def adapter_for(family: str, detector: Detector) -> Adapter:
    """The adapter between the official names of a family and those of this detector.

    Raises:
        CheckpointError: there is no adapter for the family.
    """
    if family not in ADAPTERS:
        raise CheckpointError(f"no official weights are known for the family {family!r}; {nearest(family, ADAPTERS)}")
    return ADAPTERS[family](detector)
