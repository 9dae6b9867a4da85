"""COCO's results files: writing, reading with clear errors, and evaluating one without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detfamily.errors import DataError, nearest
from detfamily.evaluation.coco_metrics import (
    Backend,
    CocoMetrics,
    GroundTruth,
    MetricSettings,
    compute_metrics,
)
from detfamily.files import read_json, write_text_atomically

_KEYS = ("image_id", "category_id", "bbox", "score")


def write_results(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write a COCO results file: a list of image_id, category_id, bbox (x, y, w, h in pixels), score.

    Numbers are written in full, so that evaluating the file gives the same bits as evaluating the model. The file
    appears whole or not at all.

    Raises:
        DataError: a number is NaN or infinite, which json cannot hold.
    """
    try:
        text = json.dumps([{key: one[key] for key in _KEYS} for one in results], allow_nan=False)
    except ValueError as error:
        raise DataError(f"{path} is not written: a box or score is NaN or infinite") from error
    write_text_atomically(Path(path), text)


def read_results(path: Path, truth: GroundTruth) -> list[dict[str, Any]]:
    """Read a COCO results file of boxes, whoever wrote it; other keys are left out.

    Args:
        path: the json file.
        truth: the ground truth that it belongs to.

    Raises:
        DataError: not a list, an entry that lacks a key or holds something else than finite numbers, or an image or
            category that the ground truth does not have.
    """
    content = read_json(path)
    if not isinstance(content, list):
        hint = f" with the keys {list(content)[:5]}" if isinstance(content, dict) else ""
        raise DataError(
            f"{path}: a COCO results file is a list of {', '.join(_KEYS)}, but this is a {type(content).__name__}{hint}"
        )
    rows = [_checked(one, f"{path}, entry {index}") for index, one in enumerate(content)]
    _check_known("image_id", rows, set(truth.image_ids), path)
    _check_known("category_id", rows, set(truth.categories), path)
    return rows


def _checked(entry: object, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object with {', '.join(_KEYS)}, got {entry!r:.60}")
    for key in _KEYS:
        if key not in entry:
            raise DataError(f"{where} has no {key!r}; {nearest(key, entry)}")
    for key in ("image_id", "category_id"):
        if not isinstance(entry[key], int) or isinstance(entry[key], bool):
            raise DataError(f"{where}: {key} must be an integer, got {entry[key]!r:.60}")
    if not _finite(entry["score"]):
        raise DataError(f"{where}: score must be a finite number, got {entry['score']!r:.60}")
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(_finite(one) for one in box):
        raise DataError(f"{where}: bbox must be four finite numbers x, y, w, h in pixels, got {box!r:.60}")
    return {key: entry[key] for key in _KEYS}


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_known(key: str, rows: Sequence[Mapping[str, Any]], known: set[int], path: Path) -> None:
    unknown = sorted({one[key] for one in rows} - known)
    if unknown:
        shown = ", ".join(str(one) for one in unknown[:5])
        raise DataError(
            f"{path}: {key} {shown} not in the annotation file ({len(unknown)} unknown ids; it has {len(known)}, from "
            f"{min(known)} to {max(known)}): do results and annotations belong together?"
        )


def evaluate_results(
    annotations: Path,
    results: Path,
    area_ranges: Mapping[str, Sequence[float]],
    backend: Backend = "faster",
    class_agnostic: bool = False,
) -> CocoMetrics:
    """Evaluate a results file against an annotation file, without a model.

    Args:
        annotations: COCO annotation file; all its images count.
        results: COCO results file of boxes.
        area_ranges: what small, medium and large mean in this data set, in square pixels.
        backend: "faster" or "pycocotools".
        class_agnostic: evaluate as if all categories were one.

    Raises:
        DataError: one of the files is missing or broken, or they do not belong together.
        ValueError: the backend or an area range does not exist.
    """
    settings = MetricSettings(area_ranges, class_agnostic=class_agnostic)
    truth = GroundTruth.load(annotations)
    return compute_metrics(truth, read_results(results, truth), settings, backend)
