"""What a COCO json holds, as tables of numbers, and all that is wrong with it.

One pass serves both ``detfamily check-data``, which wants all findings, and the reading of a data set for training,
which refuses a file at the first few. A column is looked at for all annotations at once: COCO has 860 000 of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from detfamily.data.check.findings import Finding, Findings
from detfamily.errors import nearest

TOLERANCE = 1.0
"""Pixels by which a box may reach out of its image: the published boxes of COCO do, by fractions of one."""

TINY = 4.0
"""Pixels; a side below this hardly leaves a trace in a feature map of stride 8."""

FARTHEST = 1e9
"""Pixels; no image is that large."""

LISTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class ImageTable:
    """The images of a file that are described well enough to be used, in the order of their ids.

    Attributes:
        ids: (I) whole numbers.
        file_names: (I) paths inside the image folder.
        sizes: (I, 2) int64 height, width.
    """

    ids: tuple[int, ...]
    file_names: tuple[str, ...]
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class BoxTable:
    """The annotations of a file that are described well enough to be used, grouped by image.

    Attributes:
        ids: (M) as in the file; None where there is none.
        rows: (M,) int64 places in the file's list of annotations.
        image_index: (M,) int64, rows of the ``ImageTable``.
        category_ids: (M,) int64.
        xywh: (M, 4) float64 x, y, width, height in pixels, as in the file.
        area: (M,) float64 square pixels, as in the file; that of the box where the file has none.
        crowd: (M,) bool, True for a crowd region.
    """

    ids: tuple[int | None, ...]
    rows: NDArray[np.int64]
    image_index: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    xywh: NDArray[np.float64]
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]


@dataclass(frozen=True)
class Tables:
    """The usable content of an annotation file.

    Attributes:
        categories: id -> name, in the order of the ids.
        images: the images.
        boxes: the annotations.
    """

    categories: dict[int, str]
    images: ImageTable
    boxes: BoxTable

    @property
    def counts(self) -> NDArray[np.int64]:
        """(I,) objects of each image, without crowd regions."""
        found: NDArray[np.int64] = np.bincount(
            self.boxes.image_index[~self.boxes.crowd], minlength=len(self.images.ids)
        )
        return found

    def about_image(self, at: int, words: str) -> Finding:
        """A finding about an image, by its row."""
        return Finding("", words, file=self.images.file_names[at], image_id=self.images.ids[at])

    def about_box(self, at: int, words: str) -> Finding:
        """A finding about an annotation, by its row; the words go on after its name."""
        image = int(self.boxes.image_index[at])
        annotation_id = self.boxes.ids[at]
        nameless = f"an annotation of image {self.images.ids[image]}"
        subject = nameless if annotation_id is None else f"annotation {annotation_id}"
        return Finding(
            "",
            f"{subject} {words}",
            file=self.images.file_names[image],
            image_id=self.images.ids[image],
            annotation_id=annotation_id,
        )


def scan(content: Mapping[str, Any], findings: Findings) -> Tables | None:
    """Look at all there is in the content of a COCO json.

    Args:
        content: the json object.
        findings: takes what is wrong, and what is worth knowing.

    Returns:
        What can be used; None if one of the three lists is not there.
    """
    missing = [key for key in LISTS if not isinstance(content.get(key), list)]
    for key in missing:
        findings.add("json-layout", f"no list {key!r}: a COCO json has 'images', 'annotations' and 'categories'")
    if missing:
        return None
    if not content["images"]:
        findings.add("no-images", "it lists no images")
    if not content["categories"]:
        findings.add("no-categories", "it has no categories: 'categories' is empty, so there is nothing to detect")
    if not content["annotations"]:
        findings.add("no-annotations", "it has no annotations: 'annotations' is empty")
    categories = _categories(content["categories"], findings)
    images, rows = _images(content["images"], findings)
    boxes = _boxes(content["annotations"], images, rows, categories, findings)
    tables = Tables(categories, images, boxes)
    _look_at_boxes(tables, findings)
    _look_for_repeats(tables, findings)
    _look_at_counts(tables, findings)
    return tables


# -- categories and images --------------------------------------------------------------------------------------------


def _categories(entries: Sequence[Any], findings: Findings) -> dict[int, str]:
    categories: dict[int, str] = {}
    ids: dict[str, int] = {}
    for entry in entries:
        category_id = _value(entry, "id")
        if not _is_id(category_id):
            findings.add("category-id", _needs_number("a category", "id", entry))
            continue
        name = entry.get("name")
        if category_id in categories:
            first = categories[category_id]
            findings.add("category-id-twice", f"category id {category_id} occurs twice: {first!r}, {name!r}")
            continue
        if not isinstance(name, str) or not name:
            findings.add("category-name", f"category {category_id} needs a text as its 'name', not {name!r}")
            name = f"(category {category_id})"
        if name in ids:
            findings.add("category-name-twice", f"category name {name!r} occurs twice: ids {ids[name]}, {category_id}")
        ids.setdefault(name, category_id)
        categories[category_id] = name
    return dict(sorted(categories.items()))


def _images(entries: Sequence[Any], findings: Findings) -> tuple[ImageTable, dict[int, int]]:
    """The table, and its row for each image id that is listed; -1 for an image that cannot be used."""
    rows: dict[int, int] = {}
    files: dict[str, int] = {}
    usable: list[tuple[int, str, int, int]] = []
    for entry in entries:
        image_id = _value(entry, "id")
        if not _is_id(image_id):
            findings.add("image-id", _needs_number("an image", "id", entry))
        elif image_id in rows:
            findings.add("image-id-twice", f"image id {image_id} occurs twice", image_id=image_id)
        else:
            rows[image_id] = -1
            size, name = _image_size(entry, findings), _image_file(entry, files, findings)
            if size and name:
                usable.append((image_id, name, *size))
    usable.sort()
    rows.update({image_id: row for row, (image_id, *_) in enumerate(usable)})
    sizes = np.array([size for _, _, *size in usable], dtype=np.int64).reshape(-1, 2)
    return ImageTable(tuple(one[0] for one in usable), tuple(one[1] for one in usable), sizes), rows


def _image_size(image: Mapping[str, Any], findings: Findings) -> tuple[int, int] | None:
    image_id, height, width = image["id"], image.get("height"), image.get("width")
    name = image.get("file_name")
    for key, value in (("height", height), ("width", width)):
        if not _is_id(value):
            findings.add("image-size", _needs_number(f"image {image_id}", key, image), file=name, image_id=image_id)
            return None
    assert _is_id(height) and _is_id(width)
    if not (1 <= height < FARTHEST and 1 <= width < FARTHEST):
        words = f"image {image_id} has the impossible size {width}x{height}"
        findings.add("image-size-zero", words, file=name, image_id=image_id)
        return None
    return height, width


def _image_file(image: Mapping[str, Any], files: dict[str, int], findings: Findings) -> str | None:
    image_id, name = image["id"], image.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        findings.add("file-name", f"image {image_id} has no 'file_name', but {name!r}", image_id=image_id)
        return None
    first = files.setdefault(os.path.normpath(name), image_id)
    if first != image_id:
        words = f"images {first} and {image_id} have the same file {name!r}"
        findings.add("file-name-twice", words, file=name, image_id=image_id)
    return name


# -- annotations, one column after the other --------------------------------------------------------------------------


class _Rows:
    """The annotations as they are in the file, and which of them can still be used."""

    def __init__(self, entries: Sequence[Any], images: ImageTable, rows: Mapping[int, int], findings: Findings) -> None:
        self.entries = [entry if isinstance(entry, dict) else {} for entry in entries]
        self.images, self.rows, self.findings = images, rows, findings
        self.usable = np.ones(len(entries), dtype=bool)

    def column(self, key: str, default: Any = None) -> list[Any]:
        return [entry.get(key, default) for entry in self.entries]

    def subject(self, at: int) -> str:
        known = self.entries[at].get("id")
        return f"annotation number {at}" if known is None else f"annotation {known}"

    def note(self, code: str, at: int, words: str) -> None:
        image_id, annotation_id = self.entries[at].get("image_id"), self.entries[at].get("id")
        row = self.rows.get(image_id, -1) if _is_id(image_id) else -1
        self.findings.add(
            code,
            words,
            file=self.images.file_names[row] if row >= 0 else None,
            image_id=image_id if _is_id(image_id) else None,
            annotation_id=annotation_id if _is_id(annotation_id) else None,
        )

    def refuse(self, code: str, at: int, words: str) -> None:
        self.usable[at] = False
        self.note(code, at, f"{self.subject(at)} {words}")


def _boxes(
    entries: Sequence[Any],
    images: ImageTable,
    rows: Mapping[int, int],
    categories: Mapping[int, str],
    findings: Findings,
) -> BoxTable:
    table = _Rows(entries, images, rows, findings)
    ids = _annotation_ids(table)
    image_index = _image_indices(table)
    category_ids = _category_ids(table, categories)
    xywh = _xywh(table)
    crowd = _crowd(table)
    area = _area(table, xywh)
    chosen = np.flatnonzero(table.usable & (image_index >= 0))
    order = chosen[np.argsort(image_index[chosen], kind="stable")]
    return BoxTable(
        ids=tuple(ids[at] for at in order),
        rows=order,
        image_index=image_index[order],
        category_ids=category_ids[order],
        xywh=xywh[order],
        area=area[order],
        crowd=crowd[order],
    )


def _annotation_ids(table: _Rows) -> list[int | None]:
    ids = table.column("id")
    seen: set[int] = set()
    for at, one in enumerate(ids):
        if not _is_id(one):
            ids[at] = None
            if table.entries[at]:
                words = f"annotation number {at} needs a whole number as its 'id', not {one!r}"
                table.note("annotation-id", at, words)
        elif one in seen:
            table.note("annotation-id-twice", at, f"annotation id {one} occurs twice")
        else:
            seen.add(one)
    return ids


def _image_indices(table: _Rows) -> NDArray[np.int64]:
    """The row of each annotation's image; -1 where there is none, or one that cannot be used."""
    indices = np.full(len(table.entries), -1, dtype=np.int64)
    for at, image_id in enumerate(table.column("image_id")):
        if _is_id(image_id) and image_id in table.rows:
            indices[at] = table.rows[image_id]
        elif _is_id(image_id):
            table.refuse("annotation-image", at, f"belongs to image {image_id}, which is not listed")
        else:
            table.refuse("annotation-image", at, f"needs a whole number as its 'image_id', not {image_id!r}")
    return indices


def _category_ids(table: _Rows, categories: Mapping[int, str]) -> NDArray[np.int64]:
    ids = table.column("category_id")
    for at in [at for at, one in enumerate(ids) if not (_is_id(one) and one in categories)]:
        if table.usable[at]:
            known = nearest(str(ids[at]), (str(one) for one in categories))
            table.refuse("annotation-category", at, f"has the category {ids[at]!r}, which is not listed; {known}")
        table.usable[at] = False
        ids[at] = 0
    return np.array(ids, dtype=np.int64)


def _xywh(table: _Rows) -> NDArray[np.float64]:
    boxes = table.column("bbox")
    for at, box in enumerate(boxes):
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            if table.entries[at]:
                words = f"needs a 'bbox' of four numbers [x, y, width, height], not {box!r}"
                table.refuse("box-format", at, words)
            boxes[at] = [0, 0, 0, 0]
    try:
        values = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    except OverflowError:  # whole numbers of more than 300 digits
        values = np.array([[_as_float(one) for one in box] for box in boxes], dtype=np.float64)
    for at in np.flatnonzero(~(np.abs(values) < FARTHEST).all(axis=1)).tolist():
        finite = np.isfinite(values[at]).all()
        problem = "which is far beyond any image" if finite else "which is not finite"
        table.refuse("box-not-finite", at, f"has the box {boxes[at]!r}, {problem}")
        values[at] = 0
    return values


def _crowd(table: _Rows) -> NDArray[np.bool_]:
    missing = object()
    values = table.column("iscrowd", missing)
    for at in [at for at, one in enumerate(values) if one not in (0, 1)]:
        if values[at] is not missing:
            words = f"has 'iscrowd' {values[at]!r}; 0 is an object, 1 a crowd region"
            table.note("crowd-wrong", at, f"{table.subject(at)} {words}")
        elif table.usable[at]:
            table.note("crowd-missing", at, f"{table.subject(at)} has no 'iscrowd'")
        values[at] = False
    return np.array(values, dtype=bool)


def _area(table: _Rows, xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    """(M,) the file's own areas (those of the segmentation in COCO); those of the boxes where it has none."""
    area: NDArray[np.float64] = np.abs(xywh[:, 2] * xywh[:, 3])
    for at, value in enumerate(table.column("area")):
        if value is None:
            if table.usable[at]:
                table.note("area-missing", at, f"{table.subject(at)} has no 'area'")
        elif not _is_number(value) or not 0 <= _as_float(value) < np.inf:
            table.note("area-wrong", at, f"{table.subject(at)} has the area {value!r}, expected a number of 0 or more")
        else:
            area[at] = value
    return area


# -- all boxes at once ------------------------------------------------------------------------------------------------


def _look_at_boxes(tables: Tables, findings: Findings) -> None:
    boxes, xywh = tables.boxes, tables.boxes.xywh
    sizes = tables.images.sizes[boxes.image_index]
    low, high = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    limits = sizes[:, ::-1]
    negative = (xywh[:, 2:] < 0).any(axis=1)
    empty = (xywh[:, 2:] == 0).any(axis=1) & ~negative
    proper = ~(negative | empty)
    outside = ((high <= 0) | (low >= limits)).any(axis=1) & proper
    beyond = np.maximum(-low, high - limits).max(axis=1, initial=0)
    sticks_out = (beyond > TOLERANCE) & proper & ~outside
    tiny = (xywh[:, 2:].min(axis=1, initial=np.inf) < TINY) & proper & ~outside & ~boxes.crowd

    def box(at: int) -> str:
        width, height = limits[at].tolist()
        return f"{_plain(xywh[at])} in an image of {width}x{height}"

    for code, mask, words in (
        ("box-negative", negative, "has the box {}: its width or height is negative"),
        ("box-empty", empty, "has the box {}: its width or height is 0"),
        ("box-outside", outside, "has the box {}: nothing of it is inside"),
        ("box-sticks-out", sticks_out, "has the box {}: it reaches {:.6g} pixels out of it"),
        ("tiny-object", tiny, "has the box {}"),
        ("crowd", boxes.crowd, "is a crowd region, {}"),
    ):

        def describe(at: int, words: str = words) -> Finding:
            return tables.about_box(at, words.format(box(at), beyond[at]))

        findings.add_each(code, np.flatnonzero(mask).tolist(), describe)
    _look_at_format(tables, outside | sticks_out, proper, findings)


def _look_at_format(
    tables: Tables, out: NDArray[np.bool_], proper: NDArray[np.bool_], findings: Findings, enough: int = 10
) -> None:
    """Tell boxes that are plainly of another format from a few bad ones."""
    xywh, number = tables.boxes.xywh, len(tables.boxes.xywh)
    if not number:
        return
    example = tables.about_box(0, "")

    def note(code: str, words: str) -> None:
        findings.add(code, words, image_id=example.image_id, annotation_id=example.annotation_id)

    least_side = tables.images.sizes[tables.boxes.image_index].min()
    if proper.any() and xywh.min() >= 0 and xywh.max() <= 1 and least_side > 16:
        note(
            "boxes-relative",
            f"all boxes lie between 0 and 1, so they seem to be relative to the image (image {example.image_id}: "
            f"{_plain(xywh[0])}); COCO's boxes are [x, y, width, height] in pixels",
        )
    if number < enough:
        return
    if not proper.any():
        note("boxes-empty", f"none of its {number} boxes has a width and a height above 0")
    if out.mean() > 0.5:
        first = int(np.flatnonzero(out)[0])
        example = tables.about_box(first, "")
        note(
            "boxes-corners",
            f"{int(out.sum())} of {number} boxes reach out of their image (image {example.image_id}: "
            f"{_plain(xywh[first])}); COCO's boxes are [x, y, width, height] in pixels, not two corners",
        )


def _look_for_repeats(tables: Tables, findings: Findings) -> None:
    boxes = tables.boxes
    columns = (*boxes.xywh.T[::-1], boxes.category_ids, boxes.image_index)
    order = np.lexsort(columns)  # keeps the order of the file among equals
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for column in columns:
        same &= column[order][1:] == column[order][:-1]
    first_of = dict(zip(order[1:][same].tolist(), order[:-1][same].tolist(), strict=True))

    def describe(at: int) -> Finding:
        first = boxes.ids[first_of[at]]
        name = tables.categories[int(boxes.category_ids[at])]
        return tables.about_box(at, f"repeats annotation {first}: the same {name!r} at {_plain(boxes.xywh[at])}")

    findings.add_each("box-twice", sorted(first_of), describe)


def _look_at_counts(tables: Tables, findings: Findings) -> None:
    without = np.flatnonzero(tables.counts == 0).tolist()
    ids = tables.images.ids

    def describe(at: int) -> Finding:
        return tables.about_image(at, f"image {ids[at]} has no objects")

    findings.add_each("no-objects", without, describe)


# -- single values ----------------------------------------------------------------------------------------------------


def _value(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _is_id(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number of at most 64 bits; truth values are none."""
    return type(value) is int and -(2**63) <= value < 2**63


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) is float or type(value) is int


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _needs_number(what: str, key: str, entry: Any) -> str:
    in_short = {k: entry[k] for k in list(entry)[:4]} if isinstance(entry, dict) else entry
    return f"{what} needs a whole number as its {key!r}, not {_value(entry, key)!r} (in {in_short!r})"


def _plain(box: NDArray[np.float64]) -> str:
    return "[" + ", ".join(f"{value:.10g}" for value in box) + "]"
