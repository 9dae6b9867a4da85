"""Golden cases of COCO's box metrics: the stored numbers, and ours from both libraries."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from detfamily.errors import DataError
from detfamily.evaluation.coco_metrics import (
    BACKENDS,
    Backend,
    CocoMetrics,
    GroundTruth,
    MetricSettings,
    compute_metrics,
)

_GRID = re.compile(r"([\d.]+):([\d.]+):([\d.]+)(?:\s*\((\d+)\))?")
_REFERENCE_MOST = 100


def expected(case: Mapping[str, Any]) -> dict[str, float]:
    """The stored numbers, once for each library: "faster.stats.AP", "pycocotools.AP_per_category.17", ..."""
    stored = {f"stats.{name}": value for name, value in zip(case["stats_names"], case["stats"], strict=True)}
    stored |= {f"AP_per_category.{category}": value for category, value in case["AP_per_category"].items()}
    return {f"{backend}.{key}": float(value) for backend in BACKENDS for key, value in stored.items()}


def results(case: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """The same numbers, computed anew from annotations.json and detections.json in the case's folder.

    Raises:
        DataError: a file is missing, or the case's arguments are of a form that is not known.
    """
    truth = GroundTruth.load(folder / "annotations.json")
    detections = json.loads((folder / "detections.json").read_text(encoding="utf-8"))
    settings = _settings(case["args"])
    ours: dict[str, float] = {}
    for backend in BACKENDS:
        metrics = compute_metrics(truth, detections, settings, backend)
        first = _first_line(truth, detections, metrics, backend)
        ours |= {
            f"{backend}.{key}": value for key, value in _named(case, {**metrics.stats, "AP": first}, metrics).items()
        }
    return ours


def _first_line(
    truth: GroundTruth, detections: Sequence[Mapping[str, Any]], metrics: CocoMetrics, backend: Backend
) -> float:
    """AP as the reference prints it: at 100 detections, whatever the largest number is, and -1 without a 100."""
    most = metrics.settings.max_detections
    if most[-1] == _REFERENCE_MOST:
        return metrics.stats["AP"]
    if _REFERENCE_MOST not in most:
        return -1.0
    settings = replace(metrics.settings, max_detections=(1, 10, _REFERENCE_MOST))
    return compute_metrics(truth, detections, settings, backend).stats["AP"]


def _named(case: Mapping[str, Any], stats: Mapping[str, float], metrics: CocoMetrics) -> dict[str, float]:
    named = {f"stats.{name}": value for name, value in zip(case["stats_names"], stats.values(), strict=True)}
    for category, value in metrics.per_category.items():
        # Categories without an object are not stored; one that has an AP here and is not stored must show up.
        if value > -1 or str(category) in case["AP_per_category"]:
            named[f"AP_per_category.{category}"] = value
    return named


def _settings(args: Mapping[str, Any]) -> MetricSettings:
    if args.get("iouType", "bbox") != "bbox":
        raise DataError(f"iouType {args['iouType']!r}: only boxes are evaluated")
    small, medium, large = sorted(int(one) for one in args["maxDets"])
    return MetricSettings(
        area_ranges=args["areaRng"],
        max_detections=(small, medium, large),
        iou_thresholds=_grid(args["iouThrs"]),
        recall_thresholds=_grid(args["recThrs"]),
        class_agnostic=not args.get("useCats", 1),
    )


def _grid(given: str | Sequence[float]) -> tuple[float, ...]:
    """Numbers as they are, or as "first:step:last (how many)"."""
    if not isinstance(given, str):
        return tuple(float(one) for one in given)
    match = _GRID.fullmatch(given.strip())
    if match is None:
        raise DataError(f"{given!r} is not of the form 'first:step:last (how many)'")
    first, step, last = (float(one) for one in match.group(1, 2, 3))
    count = int(match.group(4)) if match.group(4) else round((last - first) / step) + 1
    return tuple(np.linspace(first, last, count).tolist())
