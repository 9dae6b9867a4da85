from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detfamily.errors import DataError
from detfamily.parity import coco_eval

NAMES = [
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
]


def test_stored_cases_to_the_bit(goldens: Path) -> None:
    files = sorted((goldens / "coco_eval").glob("*/case.json"))
    assert files
    for file in files:
        case = json.loads(file.read_text())
        expected = coco_eval.expected(case)
        assert len(expected) == 2 * (12 + len(case["AP_per_category"]))
        assert coco_eval.results(case, file.parent) == expected


def make_case(folder: Path, **changes: Any) -> dict[str, Any]:
    """A case of the stored form, computed by pycocotools with other arguments."""
    rng = np.random.default_rng(3)
    images, categories = [11, 12, 15], [2, 4, 9]
    rows = [
        {
            "id": index + 1,
            "image_id": int(rng.choice(images)),
            "category_id": int(rng.choice(categories[:2])),
            "bbox": [*rng.uniform(0, 50, 2).tolist(), *rng.uniform(5, 60, 2).tolist()],
            "area": float(rng.uniform(20, 3000)),
            "iscrowd": int(rng.random() < 0.1),
        }
        for index in range(25)
    ]
    results = [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "bbox": (np.array(one["bbox"]) + rng.normal(size=4) * 2).tolist(),
            "score": round(float(rng.random()), 1),
        }
        for one in rows * 40
    ]
    content = {
        "info": {},
        "images": [{"id": one} for one in images],
        "categories": [{"id": one, "name": str(one)} for one in categories],
        "annotations": rows,
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "detections.json").write_text(json.dumps(results))
    args: dict[str, Any] = {
        "iouType": "bbox",
        "useCats": 1,
        "maxDets": [1, 10, 100],
        "recThrs": "0:0.01:1 (101)",
        "iouThrs": "0.5:0.05:0.95 (10)",
        "areaRng": {"all": [0, 1e10], "small": [0, 1024], "medium": [1024, 9216], "large": [9216, 1e10]},
    } | changes
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "annotations.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / "detections.json")), "bbox")
        evaluation.params.maxDets = list(args["maxDets"])
        evaluation.params.areaRng = list(args["areaRng"].values())
        evaluation.params.areaRngLbl = list(args["areaRng"])
        evaluation.params.useCats = args["useCats"]
        if isinstance(args["iouThrs"], list):
            evaluation.params.iouThrs = np.array(args["iouThrs"])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_category = {}
    if args["useCats"]:
        for index, category in enumerate(categories):
            values = evaluation.eval["precision"][:, :, index, 0, -1]
            if (values > -1).any():
                per_category[str(category)] = float(values[values > -1].mean())
    return {"args": args, "stats_names": NAMES, "stats": evaluation.stats.tolist(), "AP_per_category": per_category}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"maxDets": [1, 2, 3]},
        {"maxDets": [1, 10, 300]},
        {"maxDets": [5, 100, 300]},
        {"useCats": 0},
        {"areaRng": {"all": [0, 1e10], "small": [0, 500], "medium": [500, 900], "large": [900, 1e10]}},
        {"areaRng": {"all": [0, 1e10], "small": [0, 500]}},
        {"iouThrs": [0.3, 0.5, 0.6]},
    ],
)
def test_cases_never_seen(tmp_path: Path, changes: dict[str, Any]) -> None:
    case = make_case(tmp_path, **changes)
    expected = coco_eval.expected(case)
    assert coco_eval.results(case, tmp_path) == expected
    assert max(expected.values()) > 0.05


def test_an_altered_number_shows(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    case["stats"][3] += 1e-6
    del case["AP_per_category"]["4"]
    expected, ours = coco_eval.expected(case), coco_eval.results(case, tmp_path)
    assert ours["faster.stats.AP_small"] != expected["faster.stats.AP_small"]
    assert set(ours) - set(expected) == {"faster.AP_per_category.4", "pycocotools.AP_per_category.4"}


def test_arguments_that_are_not_understood_are_named(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    case["args"]["iouThrs"] = "all of them"
    with pytest.raises(DataError, match="'all of them' is not of the form"):
        coco_eval.results(case, tmp_path)
    case["args"]["iouType"] = "segm"
    with pytest.raises(DataError, match="'segm'"):
        coco_eval.results(case, tmp_path)
