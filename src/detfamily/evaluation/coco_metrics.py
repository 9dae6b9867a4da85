"""COCO's box metrics: twelve numbers and the AP of each class, from detections and an annotation file.

The matching and the precision-recall curves come from a library, faster-coco-eval or pycocotools; the averages and the
table are taken here from the curves, in the order in which pycocotools takes them, so that both libraries give the same
bits. The metric itself: Lin et al., "Microsoft COCO: Common Objects in Context", 2014, and cocodataset.org.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import faster_coco_eval
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import torch
from numpy.typing import NDArray

from detfamily.errors import DataError, NonFiniteError, nearest
from detfamily.files import read_json
from detfamily.structures import Detections

Backend = Literal["faster", "pycocotools"]
"""Which library matches: faster-coco-eval in C++, or pycocotools, the reference."""

BACKENDS: tuple[Backend, ...] = get_args(Backend)

ALL_AREAS = (0.0, 1e10)
COCO_AREA_RANGES: dict[str, tuple[float, float]] = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""COCO's sizes of objects, in square pixels; both ends belong to the range."""

_LARGEST = -1
_STATS: dict[str, tuple[str, float | None, str, int]] = {
    "AP": ("precision", None, "all", _LARGEST),
    "AP50": ("precision", 0.5, "all", _LARGEST),
    "AP75": ("precision", 0.75, "all", _LARGEST),
    "APs": ("precision", None, "small", _LARGEST),
    "APm": ("precision", None, "medium", _LARGEST),
    "APl": ("precision", None, "large", _LARGEST),
    "AR1": ("recall", None, "all", 0),
    "AR10": ("recall", None, "all", 1),
    "AR100": ("recall", None, "all", 2),
    "ARs": ("recall", None, "small", _LARGEST),
    "ARm": ("recall", None, "medium", _LARGEST),
    "ARl": ("recall", None, "large", _LARGEST),
}
"""Name -> (curve, one IoU threshold or None for the mean over all, area range, index into max_detections)."""


class Labels(Protocol):
    """What the evaluator asks of a label map: which category each column of the class head stands for, if any."""

    @property
    def num_classes(self) -> int: ...

    def category_id(self, label: int) -> int | None: ...


@dataclass(frozen=True)
class MetricSettings:
    """What is averaged over what.

    Attributes:
        area_ranges: name -> (least, greatest) area of an object in square pixels, both included. "all" is added when
            it is not named. A name that is missing of small, medium, large leaves its numbers at -1.
        max_detections: three numbers of detections that count, per image and category, in rising order.
        iou_thresholds: (T,) from which overlap on a detection is a hit.
        recall_thresholds: (R,) where precision is read off.
        class_agnostic: whether a detection may match an object of any category.
    """

    area_ranges: Mapping[str, Sequence[float]]
    max_detections: tuple[int, int, int] = (1, 10, 100)
    iou_thresholds: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
    recall_thresholds: tuple[float, ...] = tuple(np.linspace(0.0, 1.0, 101).tolist())
    class_agnostic: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "area_ranges", _complete_ranges(self.area_ranges))
        if len(self.max_detections) != 3 or list(self.max_detections) != sorted(self.max_detections):
            raise ValueError(f"max_detections must be three rising numbers, got {self.max_detections}")
        for name in ("iou_thresholds", "recall_thresholds"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must be rising numbers, got {values}")


def _complete_ranges(area_ranges: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    known = ("all", *COCO_AREA_RANGES)
    for name, ends in area_ranges.items():
        if name not in known:
            raise ValueError(f"area range {name!r} does not exist; {nearest(name, known)}")
        if len(ends) != 2 or not ends[0] <= ends[1]:
            raise ValueError(f"area range {name!r} must be (least, greatest) in square pixels, got {ends}")
    with_all = {"all": ALL_AREAS, **area_ranges}
    return {name: (float(with_all[name][0]), float(with_all[name][1])) for name in known if name in with_all}


@dataclass(frozen=True)
class GroundTruth:
    """The part of a COCO annotation file that box metrics need.

    Attributes:
        image_ids: the images that count.
        categories: id -> name.
        annotations: image_id, category_id, bbox (x, y, w, h in pixels), area, iscrowd, id. The ids are counted from 1
            here: both libraries mark "not matched" with 0, so that an object of id 0, or one of two with the same id,
            would silently be lost.
    """

    image_ids: tuple[int, ...]
    categories: dict[int, str]
    annotations: tuple[dict[str, Any], ...]

    @classmethod
    def load(cls, path: Path, image_ids: Collection[int] | None = None) -> GroundTruth:
        """Read a COCO annotation file, without the polygons.

        Args:
            path: a json file of COCO's "instances" form. An object without "area" has that of its box, one without
                "iscrowd" is none.
            image_ids: evaluate these images only; None means all of the file.

        Raises:
            DataError: the file is missing, is not such a file, or lacks one of the wanted images.
        """
        content = read_json(path)
        needed = ("images", "annotations", "categories")
        if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in needed):
            raise DataError(f"{path} is not a COCO annotation file: expected an object with the lists {needed}")
        try:
            in_file = [int(image["id"]) for image in content["images"]]
            categories = {int(one["id"]): str(one["name"]) for one in content["categories"]}
            annotations = tuple(_slim(one, index) for index, one in enumerate(content["annotations"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: an image, category or annotation is incomplete or not a number: {error}"
            ) from error
        if not in_file or not categories:
            raise DataError(f"{path} has {len(in_file)} images and {len(categories)} categories: nothing to evaluate")
        if image_ids is None:
            return cls(tuple(in_file), categories, annotations)
        if missing := sorted(set(image_ids) - set(in_file)):
            raise DataError(f"{path} has no image of id {_some(missing)}")
        return cls(tuple(image_ids), categories, annotations)


def _slim(annotation: Mapping[str, Any], index: int) -> dict[str, Any]:
    x, y, w, h = (float(one) for one in annotation["bbox"])
    return {
        "id": index + 1,
        "image_id": int(annotation["image_id"]),
        "category_id": int(annotation["category_id"]),
        "bbox": [x, y, w, h],
        "area": float(annotation.get("area", w * h)),
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }


def _some(ids: Sequence[int], most: int = 5) -> str:
    rest = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(str(one) for one in ids[:most]) + rest


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's numbers as fractions; -1 where there is no object to be found.

    Attributes:
        stats: AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl, in this order.
        per_category: category id -> AP over all areas, at the largest number of detections; empty if class-agnostic.
        category_names: category id -> name.
        settings: what the numbers are averages over.
    """

    stats: dict[str, float]
    per_category: dict[int, float]
    category_names: dict[int, str]
    settings: MetricSettings

    @property
    def per_class(self) -> dict[str, float]:
        """Class name -> AP; a name that several categories share is followed by the category id."""
        names = [self.category_names[one] for one in self.per_category]
        return {
            name if names.count(name) == 1 else f"{name} ({category})": ap
            for name, (category, ap) in zip(names, self.per_category.items(), strict=True)
        }

    def table(self) -> str:
        """The twelve lines that pycocotools prints."""
        return "\n".join(self._line(name) for name in _STATS)

    def _line(self, name: str) -> str:
        curve, threshold, area, most = _STATS[name]
        first, last = self.settings.iou_thresholds[0], self.settings.iou_thresholds[-1]
        overlap = f"{first:.2f}:{last:.2f}" if threshold is None else f"{threshold:.2f}"
        title = f"{'Average ' + curve.capitalize():<18} ({'AP' if curve == 'precision' else 'AR'})"
        condition = f"IoU={overlap:<9} | area={area:>6} | maxDets={self.settings.max_detections[most]:>3}"
        return f" {title} @[ {condition} ] = {self.stats[name]:.3f}"

    def class_table(self) -> str:
        """One line per class, best first: name and AP; "-" where the class has no object."""
        best_first = sorted(self.per_class.items(), key=lambda item: -item[1])
        width = max((len(name) for name, _ in best_first), default=0)
        return "\n".join(f" {name:<{width}}  {f'{ap:.3f}' if ap > -1 else '-':>5}" for name, ap in best_first)


def compute_metrics(
    truth: GroundTruth, results: Iterable[Mapping[str, Any]], settings: MetricSettings, backend: Backend = "faster"
) -> CocoMetrics:
    """Compare results with the ground truth.

    Args:
        truth: what is there.
        results: image_id, category_id, bbox (x, y, w, h in pixels) and score of each detection. Within an image and
            category, equal scores keep their order. Not to be trimmed before: max_detections counts per image *and
            category*. Those of categories that the ground truth does not list do not count.
        settings: what is averaged over what.
        backend: the library that matches.

    Raises:
        ValueError: the backend does not exist.
    """
    precision, recall = _curves(truth, results, settings, backend)
    stats = {name: _mean(_select(precision, recall, settings, name)) for name in _STATS}
    per_category = {}
    if not settings.class_agnostic:
        areas = list(settings.area_ranges).index("all")
        for index, category in enumerate(sorted(truth.categories)):
            per_category[category] = _mean(precision[:, :, index, areas, -1])
    return CocoMetrics(stats, per_category, dict(truth.categories), settings)


def _curves(
    truth: GroundTruth, results: Iterable[Mapping[str, Any]], settings: MetricSettings, backend: Backend
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision (T, R, K, A, M) and recall (T, K, A, M) over thresholds, recalls, categories, areas, numbers."""
    detections = [_as_annotation(one, index) for index, one in enumerate(results)]
    recalls = np.array(settings.recall_thresholds)
    if backend != "faster":
        return _run(truth, detections, settings, backend, recalls)
    witnesses = _witnesses(truth, settings)
    both = np.unique(np.concatenate([recalls, witnesses.ravel()]))
    precision, recall = _run(truth, detections, settings, backend, both)
    # The reference divides hits by (hits + misses + epsilon). The epsilon shows in one case only: the first detection
    # is right and the second wrong, which gives 1 / (1 + epsilon). faster-coco-eval gives 1 there.
    chosen = np.searchsorted(both, witnesses)[None, None, :, :, None]
    first_hit_only = np.take_along_axis(precision, chosen, axis=1) < 1
    precision = precision[:, np.searchsorted(both, recalls)]
    return np.where((precision == 1) & first_hit_only, 1 / (1 + np.spacing(1.0)), precision), recall


def _witnesses(truth: GroundTruth, settings: MetricSettings) -> NDArray[np.float64]:
    """(K, A) recalls that the second hit reaches and the first does not: precision 1 there means two hits in a row."""
    ranges = np.array(list(settings.area_ranges.values()))
    images = set(truth.image_ids)
    objects = [one for one in truth.annotations if not one["iscrowd"] and one["image_id"] in images]
    areas = np.array([one["area"] for one in objects])[:, None]
    inside = (areas >= ranges[:, 0]) & (areas <= ranges[:, 1])
    owners = np.array([one["category_id"] for one in objects])[:, None]
    categories = np.array(sorted(truth.categories))
    if settings.class_agnostic:
        counts = inside[np.isin(owners[:, 0], categories)].sum(0, keepdims=True)
    else:
        counts = (owners == categories).astype(np.int64).T @ inside
    first, second = 1 / np.maximum(counts, 1), 2 / np.maximum(counts, 1)
    recalls = np.array(settings.recall_thresholds)
    on_grid = recalls[np.minimum(np.searchsorted(recalls, first, side="right"), len(recalls) - 1)]
    return np.where((on_grid > first) & (on_grid <= second), on_grid, second)


def _run(
    truth: GroundTruth,
    detections: list[dict[str, Any]],
    settings: MetricSettings,
    backend: Backend,
    recalls: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    index_class, evaluation_class = _library(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # both libraries narrate
        evaluation = evaluation_class(
            _index(index_class, truth, [dict(one) for one in truth.annotations]),
            _index(index_class, truth, detections),
            iouType="bbox",
        )
        wanted = evaluation.params
        wanted.imgIds = sorted(truth.image_ids)
        wanted.areaRng = [list(ends) for ends in settings.area_ranges.values()]
        wanted.areaRngLbl = list(settings.area_ranges)
        wanted.maxDets = list(settings.max_detections)
        wanted.iouThrs = np.array(settings.iou_thresholds)
        wanted.recThrs = recalls
        wanted.useCats = int(not settings.class_agnostic)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _library(backend: Backend) -> tuple[Any, Any]:
    if backend == "faster":
        return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
    if backend == "pycocotools":
        return pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval
    raise ValueError(f"evaluation backend {backend!r} does not exist; {nearest(str(backend), BACKENDS)}")


def _as_annotation(result: Mapping[str, Any], index: int) -> dict[str, Any]:
    # What the libraries' own loadRes adds, without its polygon per box, and without its failure on an empty list.
    box = result["bbox"]
    return {
        "id": index + 1,
        "image_id": result["image_id"],
        "category_id": result["category_id"],
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
        "score": result["score"],
    }


def _index(index_class: Any, truth: GroundTruth, annotations: list[dict[str, Any]]) -> Any:
    index = index_class()
    index.dataset = {
        "images": [{"id": one} for one in truth.image_ids],
        "categories": [{"id": one, "name": name} for one, name in truth.categories.items()],
        "annotations": annotations,
    }
    index.createIndex()
    return index


def _select(
    precision: NDArray[np.float64], recall: NDArray[np.float64], settings: MetricSettings, name: str
) -> NDArray[np.float64]:
    """What one of the twelve numbers averages; empty where its area or threshold is not among the settings."""
    curve, threshold, area, most = _STATS[name]
    areas = list(settings.area_ranges)
    if area not in areas:
        return np.empty(0)
    values = precision if curve == "precision" else recall
    if threshold is not None:
        values = values[np.array(settings.iou_thresholds) == threshold]
    return np.asarray(values[..., areas.index(area), most])


def _mean(values: NDArray[np.float64]) -> float:
    """The mean over what exists; the libraries mark with -1 what has no object."""
    existing = values[values > -1]
    return float(existing.mean()) if existing.size else -1.0


class CocoEvaluator:
    """Collects detections image by image, and says how good they are.

    Args:
        annotations: COCO annotation file of the ground truth.
        label_map: which category each column of the class head stands for. Detections of columns without a category,
            or with one that the annotation file does not list, are dropped.
        area_ranges: what small, medium and large mean in this data set, see ``MetricSettings``.
        backend: "faster" (faster-coco-eval), or "pycocotools", the reference; they agree to the bit.
        image_ids: evaluate these images only. None means all of the file: an image that no detections were given for
            counts its objects as missed.

    Raises:
        DataError: the file is not a COCO annotation file, or it and the label map have no category in common.
        ValueError: the backend or an area range does not exist.
    """

    def __init__(
        self,
        annotations: Path,
        label_map: Labels,
        area_ranges: Mapping[str, Sequence[float]],
        backend: Backend = "faster",
        image_ids: Collection[int] | None = None,
    ) -> None:
        _library(backend)
        self._area_ranges = MetricSettings(area_ranges).area_ranges
        self._backend = backend
        self._truth = GroundTruth.load(annotations, image_ids)
        columns = {label: label_map.category_id(label) for label in range(label_map.num_classes)}
        self._categories = {label: one for label, one in columns.items() if one in self._truth.categories}
        if not self._categories:
            raise DataError(
                f"the label map stands for the categories {_some([one for one in columns.values() if one is not None])}"
                f", but {annotations} lists {_some(sorted(self._truth.categories))}: not one in common"
            )
        self._known = set(self._truth.image_ids)
        self._seen: set[int] = set()
        self._results: list[dict[str, Any]] = []

    def update(self, image_ids: Sequence[int], detections: Sequence[Detections]) -> None:
        """Add the detections of a few images, with one copy to the host for all.

        Boxes are kept as they are, x, y, w, h in pixels, in double precision and without rounding.

        Raises:
            DataError: an image is not in the annotation file, or was added before.
            NonFiniteError: a score or a box is NaN or infinite.
            ValueError: not as many image ids as detections.
        """
        if len(image_ids) != len(detections):
            raise ValueError(f"{len(image_ids)} image ids but detections of {len(detections)} images")
        if not detections:
            return
        self._claim(image_ids)
        scores = torch.cat([one.scores for one in detections]).detach().cpu().double()
        labels = torch.cat([one.labels for one in detections]).detach().cpu()
        boxes = torch.cat([one.boxes_xyxy for one in detections]).detach().cpu().double()
        counts = [one.scores.shape[0] for one in detections]
        owners = torch.tensor(list(image_ids)).repeat_interleave(torch.tensor(counts))
        broken = ~(scores.isfinite() & boxes.isfinite().all(1))
        if broken.any():
            raise NonFiniteError(
                f"NaN or infinity in the detections of image {_some(owners[broken].unique().tolist())}"
            )
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(owners.tolist(), labels.tolist(), boxes.tolist(), scores.tolist(), strict=True)
        self._results += [
            {"image_id": owner, "category_id": self._categories[label], "bbox": box, "score": score}
            for owner, label, box, score in rows
            if label in self._categories
        ]

    def results(self) -> list[dict[str, Any]]:
        """COCO's results form: image_id, category_id, bbox (x, y, w, h in pixels), score."""
        return list(self._results)

    def extend(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Add the results of another evaluator, which has seen other images.

        Raises:
            DataError: an image is not in the annotation file, or was added before.
        """
        self._claim(sorted({one["image_id"] for one in results}))
        self._results += [dict(one) for one in results]

    def _claim(self, image_ids: Sequence[int]) -> None:
        if unknown := sorted(set(image_ids) - self._known):
            raise DataError(f"the ground truth has no image of id {_some(unknown)}")
        again = sorted(self._seen.intersection(image_ids))
        if again or len(set(image_ids)) < len(image_ids):
            again = again or sorted({one for one in image_ids if list(image_ids).count(one) > 1})
            raise DataError(f"detections of image {_some(again)} were given twice; each image counts once")
        self._seen.update(image_ids)

    def summarize(self, class_agnostic: bool = False) -> CocoMetrics:
        """Evaluate what was added; with ``class_agnostic``, as if all categories were one."""
        settings = MetricSettings(self._area_ranges, class_agnostic=class_agnostic)
        return compute_metrics(self._truth, self._results, settings, self._backend)
