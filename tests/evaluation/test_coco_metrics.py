from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detfamily.data.labels import LabelMap
from detfamily.errors import DataError, NonFiniteError
from detfamily.evaluation.coco_metrics import (
    BACKENDS,
    COCO_AREA_RANGES,
    Backend,
    CocoEvaluator,
    CocoMetrics,
    GroundTruth,
    MetricSettings,
    compute_metrics,
)
from detfamily.structures import Detections

NINTH = {name: (least / 9, greatest / 9) for name, (least, greatest) in COCO_AREA_RANGES.items()}
Row = dict[str, Any]


def annotation_file(images: list[int], categories: list[int], annotations: list[Row]) -> Row:
    return {
        "images": [{"id": one, "height": 200, "width": 200, "file_name": f"{one}.jpg"} for one in images],
        "categories": [{"id": one, "name": f"class {one}"} for one in categories],
        "annotations": annotations,
    }


def objects(*rows: tuple[int, int, list[float]], crowd: bool = False) -> list[Row]:
    """One annotation per (image, category, box), counted from 1."""
    return [
        {
            "id": index + 1,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(crowd),
        }
        for index, (image, category, box) in enumerate(rows)
    ]


def result(image: int, category: int, box: list[float], score: float) -> Row:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def random_set(rng: np.random.Generator) -> tuple[Row, list[Row]]:
    """Annotations and results: with crowds, empty images, equal scores, boxes without area, many of one category."""
    images = [int(one) for one in rng.choice(10_000, rng.integers(1, 9), replace=False)]
    categories = sorted(int(one) for one in rng.choice(200, rng.choice([1, 2, 5, 20]), replace=False))
    most_objects, most_found = int(rng.choice([0, 1, 6, 30])), int(rng.choice([0, 3, 20, 250]))
    crowds = float(rng.choice([0.0, 0.1, 0.6]))
    annotations: list[Row] = []
    results: list[Row] = []
    for image in images:
        here = []
        for _ in range(rng.integers(0, most_objects + 1)):
            box = [*rng.uniform(0, 100, 2).tolist(), *np.exp(rng.uniform(1, 5, 2)).tolist()]
            if rng.random() < 0.3:
                box = [float(round(one)) for one in box]
            if rng.random() < 0.03:
                box[2] = 0.0
            here += objects((image, int(rng.choice(categories)), box), crowd=bool(rng.random() < crowds))
            here[-1]["id"] = len(annotations) + len(here)
            here[-1]["area"] *= float(rng.choice([1.0, 0.7]))
        annotations += here
        for _ in range(rng.integers(0, most_found + 1)):
            box, category = rng.uniform(0, 100, 4).tolist(), int(rng.choice(categories))
            if here and rng.random() < 0.7:
                chosen = here[rng.integers(len(here))]
                box = (np.array(chosen["bbox"]) + rng.normal(size=4) * rng.choice([0, 1, 4])).tolist()
                category = chosen["category_id"]
            results.append(result(image, category, box, round(float(rng.random()), int(rng.choice([1, 6])))))
    return annotation_file(images, categories, annotations), results


def write(folder: Path, annotations: Row) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(annotations))
    return path


def labels_for(annotations: Row) -> LabelMap:
    return LabelMap.contiguous(annotations["categories"])


def reference(annotations: Row, results: list[Row], ranges: dict[str, tuple[float, float]]) -> tuple[list[float], str]:
    """pycocotools in its own words: the twelve numbers, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(annotations)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.params.areaRng = [[0, 1e10], *(list(ends) for ends in ranges.values())]
        evaluation.evaluate()
        evaluation.accumulate()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        evaluation.summarize()
    return evaluation.stats.tolist(), printed.getvalue().rstrip("\n")


def evaluate(
    folder: Path, annotations: Row, results: list[Row], backend: Backend = "faster", **settings: Any
) -> CocoMetrics:
    evaluator = CocoEvaluator(write(folder, annotations), labels_for(annotations), COCO_AREA_RANGES, backend)
    evaluator.extend(results)
    return evaluator.summarize(**settings)


def test_both_backends_give_the_bits_and_the_table_of_pycocotools(tmp_path: Path) -> None:
    compared = 0
    for seed in range(60):
        annotations, results = random_set(np.random.default_rng(seed))
        ranges = NINTH if seed % 2 else COCO_AREA_RANGES
        truth = GroundTruth.load(write(tmp_path, annotations))
        ours = {backend: compute_metrics(truth, results, MetricSettings(ranges), backend) for backend in BACKENDS}
        assert ours["faster"] == ours["pycocotools"], seed
        if results:  # pycocotools cannot read an empty list
            stats, table = reference(annotations, results, ranges)
            assert list(ours["faster"].stats.values()) == stats, seed
            assert ours["faster"].table() == table
            compared += 1
    assert compared > 35


def test_backends_agree_without_categories_and_with_other_settings(tmp_path: Path) -> None:
    for seed in range(100, 130):
        annotations, results = random_set(np.random.default_rng(seed))
        truth = GroundTruth.load(write(tmp_path, annotations))
        settings = MetricSettings(
            NINTH,
            max_detections=(2, 20, 300),
            iou_thresholds=(0.3, 0.5, 0.9),
            recall_thresholds=(0.0, 0.004, 0.3, 1.0),
            class_agnostic=bool(seed % 2),
        )
        faster, slow = (compute_metrics(truth, results, settings, backend) for backend in BACKENDS)
        assert faster == slow, seed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("missed_second", "precision"), [(False, 1.0), (True, 1 / (1 + 2**-52))])
def test_epsilon_of_the_reference_shows_after_one_hit_only(
    tmp_path: Path, backend: Backend, missed_second: bool, precision: float
) -> None:
    # So many objects that the second hit lies between two recalls of the usual grid, too.
    boxes = [(1, 1, [float(x), 0.0, 8.0, 8.0]) for x in range(0, 4000, 10)]
    truth = GroundTruth.load(write(tmp_path, annotation_file([1], [1], objects(*boxes))))
    found = [result(1, 1, [0, 0, 8, 8], 0.9), result(1, 1, [10, 0, 8, 8], 0.7)]
    found += [result(1, 1, [0, 50, 8, 8], 0.8)] * missed_second
    for recalls in ((0.0,), (0.0, 0.01), (0.0025,)):
        settings = MetricSettings(COCO_AREA_RANGES, recall_thresholds=recalls)
        assert compute_metrics(truth, found, settings, backend).stats["AP"] == precision / len(recalls)


@pytest.mark.parametrize("backend", BACKENDS)
def test_overlap_decides_at_each_threshold(tmp_path: Path, backend: Backend) -> None:
    # Overlap 0.82: found at 0.5, 0.55 ... 0.8, that is at seven of ten thresholds.
    annotations = annotation_file([1], [1], objects((1, 1, [0, 0, 100, 100])))
    metrics = evaluate(tmp_path, annotations, [result(1, 1, [0, 0, 100, 82], 0.5)], backend)
    assert metrics.stats["AP"] == pytest.approx(0.7)
    assert metrics.stats["AP50"] == pytest.approx(1.0)
    assert metrics.stats["AR1"] == pytest.approx(0.7)
    assert metrics.stats["APl"] == pytest.approx(0.7)
    assert metrics.stats["APs"] == metrics.stats["APm"] == -1
    assert metrics.per_class == {"class 1": pytest.approx(0.7)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_area_ranges_are_those_of_the_data_set(tmp_path: Path, backend: Backend) -> None:
    annotations = annotation_file([1], [1], objects((1, 1, [0, 0, 20, 20])))
    found = [result(1, 1, [0, 0, 20, 20], 0.5)]
    path = write(tmp_path, annotations)
    for ranges, expected in ((COCO_AREA_RANGES, "APs"), (NINTH, "APm")):
        evaluator = CocoEvaluator(path, labels_for(annotations), ranges, backend)
        evaluator.extend(found)
        stats = evaluator.summarize().stats
        assert {name for name in ("APs", "APm", "APl") if stats[name] > -1} == {expected}


@pytest.mark.parametrize("backend", BACKENDS)
def test_hundred_detections_per_image_and_category(tmp_path: Path, backend: Backend) -> None:
    annotations = annotation_file([1], [1, 2], objects((1, 1, [0, 0, 50, 50]), (1, 2, [0, 0, 50, 50])))
    noise = [result(1, 1, [100, 100, 9, 9], 0.9) for _ in range(99)]
    hits = [result(1, 1, [0, 0, 50, 50], 0.5), result(1, 2, [0, 0, 50, 50], 0.1)]
    assert evaluate(tmp_path, annotations, noise + hits, backend).stats["AR100"] == 1
    one_more = [*noise, noise[0], *hits]
    metrics = evaluate(tmp_path, annotations, one_more, backend)
    assert metrics.per_class == {"class 1": 0.0, "class 2": pytest.approx(1.0)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_crowd_absorbs_detections(tmp_path: Path, backend: Backend) -> None:
    wanted = objects((1, 1, [0, 0, 50, 50]))
    crowd = {**wanted[0], "id": 2, "bbox": [100, 0, 100, 100], "area": 10_000, "iscrowd": 1}
    found = [result(1, 1, [120, 10, 10, 10], 0.9), result(1, 1, [150, 10, 10, 10], 0.8)]
    found.append(result(1, 1, [0, 0, 50, 50], 0.5))
    with_crowd = evaluate(tmp_path, annotation_file([1], [1], [*wanted, crowd]), found, backend)
    without = evaluate(tmp_path, annotation_file([1], [1], wanted), found, backend)
    assert with_crowd.stats["AP50"] == pytest.approx(1.0)
    assert without.stats["AP50"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_class_agnostic_forgives_the_wrong_class(tmp_path: Path, backend: Backend) -> None:
    annotations = annotation_file([1], [1, 2], objects((1, 1, [0, 0, 50, 50])))
    found = [result(1, 2, [0, 0, 50, 50], 0.5)]
    assert evaluate(tmp_path, annotations, found, backend).stats["AP"] == 0
    agnostic = evaluate(tmp_path, annotations, found, backend, class_agnostic=True)
    assert agnostic.stats["AP"] == pytest.approx(1.0)
    assert agnostic.per_class == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_found_and_nothing_to_find(tmp_path: Path, backend: Backend) -> None:
    some = annotation_file([1, 2], [7, 21], objects((1, 7, [0, 0, 50, 50])))
    nothing_found = evaluate(tmp_path, some, [], backend)
    assert nothing_found.stats["AP"] == nothing_found.stats["APm"] == nothing_found.stats["AR100"] == 0
    assert nothing_found.stats["APs"] == nothing_found.stats["APl"] == -1
    assert nothing_found.per_class == {"class 7": 0, "class 21": -1}
    none = annotation_file([1, 2], [7, 21], [])
    for found in ([], [result(1, 7, [0, 0, 50, 50], 0.5)]):
        metrics = evaluate(tmp_path, none, found, backend)
        assert set(metrics.stats.values()) == {-1.0}


def test_annotations_counted_from_zero_or_twice_the_same_id_are_not_lost(tmp_path: Path) -> None:
    boxes = [[0.0, 0.0, 20.0, 20.0], [50.0, 0.0, 20.0, 20.0]]
    annotations = annotation_file([1], [1], objects(*((1, 1, box) for box in boxes)))
    for ids in ((0, 1), (5, 5)):
        for one, new in zip(annotations["annotations"], ids, strict=True):
            one["id"] = new
        metrics = evaluate(tmp_path, annotations, [result(1, 1, box, 0.5) for box in boxes])
        assert metrics.stats["AP"] == pytest.approx(1.0)


def test_annotations_without_area_and_iscrowd(tmp_path: Path) -> None:
    annotations = annotation_file([1], [1], [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 20]}])
    metrics = evaluate(tmp_path, annotations, [result(1, 1, [0, 0, 20, 20], 0.5)])
    assert metrics.stats["APs"] == pytest.approx(1.0)


def detections(labels: list[int], boxes_xyxy: list[list[float]], scores: list[float]) -> Detections:
    return Detections(torch.tensor(scores), torch.tensor(labels), torch.tensor(boxes_xyxy).reshape(-1, 4))


def test_update_maps_labels_and_turns_corners_into_width_and_height(tmp_path: Path) -> None:
    annotations = annotation_file([4, 5], [7, 21, 90], objects((5, 90, [10, 20, 30, 40])))
    evaluator = CocoEvaluator(write(tmp_path, annotations), labels_for(annotations), COCO_AREA_RANGES)
    evaluator.update(
        [5, 4], [detections([2, 0], [[10, 20, 40, 60], [0.1, 0, 0.3, 1]], [0.75, 0.5]), detections([], [], [])]
    )
    first, second = evaluator.results()
    assert first == result(5, 90, [10, 20, 30, 40], 0.75)
    corners = np.array([0.1, 0.3], dtype=np.float32).astype(np.float64)
    assert second == result(5, 7, [corners[0], 0, corners[1] - corners[0], 1], 0.5)  # in full, nothing rounded
    assert evaluator.summarize().stats["AP"] == pytest.approx(1.0)


def test_update_takes_half_precision(tmp_path: Path) -> None:
    annotations = annotation_file([1], [3], [])
    evaluator = CocoEvaluator(write(tmp_path, annotations), labels_for(annotations), COCO_AREA_RANGES)
    found = detections([0], [[1, 2, 3, 5]], [0.5])
    evaluator.update([1], [Detections(found.scores.bfloat16(), found.labels, found.boxes_xyxy.half())])
    assert evaluator.results() == [result(1, 3, [1, 2, 2, 3], 0.5)]


def test_columns_without_a_category_are_dropped(tmp_path: Path) -> None:
    annotations = annotation_file([1], [1, 3], [])
    columns = LabelMap((None, 1, None, 3, 90), (None, "class 1", None, "class 3", "elsewhere"))
    evaluator = CocoEvaluator(write(tmp_path, annotations), columns, COCO_AREA_RANGES)
    evaluator.update([1], [detections([0, 1, 2, 3, 4], [[0, 0, 1, 1]] * 5, [0.5] * 5)])
    assert [one["category_id"] for one in evaluator.results()] == [1, 3]


def test_processes_that_share_the_images_give_the_same_bits(tmp_path: Path) -> None:
    annotations, results = random_set(np.random.default_rng(7))
    path, labels = write(tmp_path, annotations), labels_for(annotations)
    images = [one["id"] for one in annotations["images"]]
    assert len(images) > 2
    alone = evaluate(tmp_path, annotations, results)
    ranks = [CocoEvaluator(path, labels, COCO_AREA_RANGES) for _ in range(2)]
    for index, image in enumerate(reversed(images)):
        ranks[index % 2].extend([one for one in results if one["image_id"] == image])
    ranks[0].extend(ranks[1].results())
    assert ranks[0].summarize() == alone


def test_some_images_only(tmp_path: Path) -> None:
    annotations, results = random_set(np.random.default_rng(7))
    chosen = [one["id"] for one in annotations["images"]][::2]
    found = [one for one in results if one["image_id"] in chosen]
    evaluator = CocoEvaluator(write(tmp_path, annotations), labels_for(annotations), COCO_AREA_RANGES, image_ids=chosen)
    evaluator.extend(found)
    fewer = {key: list(rows) for key, rows in annotations.items()}
    fewer["images"] = [one for one in fewer["images"] if one["id"] in chosen]
    fewer["annotations"] = [one for one in fewer["annotations"] if one["image_id"] in chosen]
    assert evaluator.summarize() == evaluate(tmp_path, fewer, found)
    with pytest.raises(DataError, match="no image of id 123456"):
        GroundTruth.load(tmp_path / "annotations.json", [123456])


@pytest.mark.parametrize("backend", BACKENDS)
def test_libraries_are_silent(tmp_path: Path, backend: Backend, capfd: pytest.CaptureFixture[str]) -> None:
    annotations, results = random_set(np.random.default_rng(7))
    evaluate(tmp_path, annotations, results, backend)
    assert capfd.readouterr() == ("", "")


def test_class_table_is_sorted_and_marks_classes_without_objects(tmp_path: Path) -> None:
    rows = objects((1, 1, [0, 0, 50, 50]), (1, 2, [0, 0, 50, 50]))
    metrics = evaluate(tmp_path, annotation_file([1], [1, 2, 3], rows), [result(1, 2, [0, 0, 50, 50], 0.5)])
    assert [line.split() for line in metrics.class_table().splitlines()] == [
        ["class", "2", "1.000"],
        ["class", "1", "0.000"],
        ["class", "3", "-"],
    ]


def test_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    annotations = annotation_file([1], [1, 2], [])
    for one in annotations["categories"]:
        one["name"] = "cat"
    truth = GroundTruth.load(write(tmp_path, annotations))
    assert list(compute_metrics(truth, [], MetricSettings(NINTH)).per_class) == ["cat (1)", "cat (2)"]


def test_mistakes_in_use_are_named(tmp_path: Path) -> None:
    annotations = annotation_file([1, 2], [1], [])
    path, labels = write(tmp_path, annotations), labels_for(annotations)
    evaluator = CocoEvaluator(path, labels, COCO_AREA_RANGES)
    one = detections([0], [[0, 0, 1, 1]], [0.5])
    with pytest.raises(DataError, match="no image of id 9"):
        evaluator.update([9], [one])
    with pytest.raises(ValueError, match="2 image ids but detections of 1"):
        evaluator.update([1, 2], [one])
    with pytest.raises(NonFiniteError, match="image 2"):
        evaluator.update([1, 2], [one, detections([0], [[0, 0, float("nan"), 1]], [0.5])])
    evaluator = CocoEvaluator(path, labels, COCO_AREA_RANGES)
    evaluator.update([1], [one])
    for again in (lambda: evaluator.update([1], [one]), lambda: evaluator.extend([result(1, 1, [0, 0, 1, 1], 0.5)])):
        with pytest.raises(DataError, match="image 1 were given twice"):
            again()
    with pytest.raises(DataError, match="image 2 were given twice"):
        evaluator.update([2, 2], [one, one])


def test_mistakes_in_settings_are_named(tmp_path: Path) -> None:
    annotations = annotation_file([1], [1], [])
    path, labels = write(tmp_path, annotations), labels_for(annotations)
    with pytest.raises(ValueError, match="'smal' does not exist; did you mean 'small'"):
        CocoEvaluator(path, labels, {"smal": (0, 1)})
    with pytest.raises(ValueError, match="'small' must be"):
        CocoEvaluator(path, labels, {"small": (2, 1)})
    with pytest.raises(ValueError, match="'pycocotool' does not exist; did you mean 'pycocotools'"):
        CocoEvaluator(path, labels, COCO_AREA_RANGES, "pycocotool")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_detections"):
        MetricSettings(COCO_AREA_RANGES, max_detections=(100, 10, 1))
    with pytest.raises(ValueError, match="iou_thresholds"):
        MetricSettings(COCO_AREA_RANGES, iou_thresholds=(0.9, 0.5))
    with pytest.raises(DataError, match=r"categories 8, but .* lists 1: not one in common"):
        CocoEvaluator(path, LabelMap((8,), ("other",)), COCO_AREA_RANGES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not a json file"),
        ("[]", "not a COCO annotation file"),
        ('{"images": [], "annotations": []}', "not a COCO annotation file"),
        ('{"images": [], "annotations": [], "categories": []}', "0 images and 0 categories"),
        ('{"images": [{}], "annotations": [], "categories": []}', "incomplete or not a number: 'id'"),
        (
            '{"images": [{"id": 1}], "annotations": [{"id": 1, "bbox": [1, 2]}], "categories": []}',
            "incomplete or not a number",
        ),
    ],
)
def test_broken_annotation_files_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        GroundTruth.load(path)
    assert "broken.json" in str(error.value)
