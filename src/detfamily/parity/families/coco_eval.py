"""pycocotools' box metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from detfamily.parity import coco_eval
from detfamily.parity.case import Case


def expected(case: Case) -> dict[str, tuple[Tensor, str]]:
    """The stored numbers, once for each library."""
    return {key: (value, "output") for key, value in _as_tensors(coco_eval.expected(case.info)).items()}


def results(case: Case) -> dict[str, Tensor]:
    """The same numbers from the annotations and detections of the case."""
    return _as_tensors(coco_eval.results(case.info, case.folder))


def _as_tensors(numbers: Mapping[str, float]) -> dict[str, Tensor]:
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
