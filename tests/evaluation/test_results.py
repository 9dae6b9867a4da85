from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detfamily.errors import DataError
from detfamily.evaluation.coco_metrics import BACKENDS, COCO_AREA_RANGES, GroundTruth, MetricSettings, compute_metrics
from detfamily.evaluation.results import evaluate_results, read_results, write_results


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        {
            "id": index,
            "image_id": int(rng.integers(1, 4)),
            "category_id": int(rng.choice([7, 21, 90])),
            "bbox": [*rng.uniform(0, 60, 2).tolist(), *rng.uniform(20, 60, 2).tolist()],
            "area": float(rng.uniform(100, 4000)),
            "iscrowd": 0,
        }
        for index in range(20)
    ]
    content = {
        "images": [{"id": one} for one in (1, 2, 3)],
        "categories": [{"id": one, "name": f"class {one}"} for one in (7, 21, 90)],
        "annotations": rows,
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def found(truth: GroundTruth) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "bbox": (np.array(one["bbox"]) + rng.normal(size=4)).tolist(),
            "score": float(np.float32(rng.random())),
        }
        for one in truth.annotations
    ]


def test_a_file_holds_every_bit(annotations: Path, tmp_path: Path) -> None:
    truth = GroundTruth.load(annotations)
    rows = found(truth)
    path = tmp_path / "new" / "results.json"
    write_results(path, rows)
    assert read_results(path, truth) == rows
    for backend in BACKENDS:
        direct = compute_metrics(truth, rows, MetricSettings(COCO_AREA_RANGES), backend)
        assert 0.3 < direct.stats["AP"] < 1
        assert evaluate_results(annotations, path, COCO_AREA_RANGES, backend) == direct
    agnostic = evaluate_results(annotations, path, COCO_AREA_RANGES, class_agnostic=True)
    assert agnostic.settings.class_agnostic and not agnostic.per_class


def test_an_empty_list_is_a_results_file(annotations: Path, tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", [])
    assert evaluate_results(annotations, tmp_path / "results.json", COCO_AREA_RANGES).stats["AP"] == 0


def test_other_keys_are_left_out(annotations: Path, tmp_path: Path) -> None:
    truth = GroundTruth.load(annotations)
    rows = found(truth)[:1]
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**rows[0], "segmentation": [], "id": 5}]))
    assert read_results(path, truth) == rows


GOOD = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 1, 1], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"annotations": []}, r"is a list of .* this is a dict with the keys \['annotations'\]"),
        ([GOOD, 3], "entry 1: expected an object"),
        ([{key: GOOD[key] for key in ("image_id", "category_id", "bbox")}], "entry 0 has no 'score'"),
        ([{**GOOD, "image_id": "1"}], "image_id must be an integer, got '1'"),
        ([{**GOOD, "category_id": True}], "category_id must be an integer"),
        ([{**GOOD, "score": float("nan")}], "score must be a finite number, got nan"),
        ([{**GOOD, "score": None}], "score must be a finite number, got None"),
        ([{**GOOD, "bbox": [0, 0, 1]}], "bbox must be four finite numbers"),
        ([{**GOOD, "bbox": [0, 0, 1, float("inf")]}], "bbox must be four finite numbers"),
        ([GOOD, {**GOOD, "image_id": 44}, {**GOOD, "image_id": 45}], r"image_id 44, 45 not in .* from 1 to 3"),
        ([GOOD, {**GOOD, "category_id": 8}], "category_id 8 not in the annotation file"),
    ],
)
def test_broken_files_are_named(annotations: Path, tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as error:
        read_results(path, GroundTruth.load(annotations))
    assert "results.json" in str(error.value)


def test_missing_file(annotations: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        evaluate_results(annotations, tmp_path / "none.json", COCO_AREA_RANGES)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, [GOOD])
    before = path.read_bytes()
    with pytest.raises(DataError, match="not written"):
        write_results(path, [{**GOOD, "score": float("nan")}])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
