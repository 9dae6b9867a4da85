"""``data=shapes``: a data set in the COCO format that is drawn on first use, needs no download, and ranks detectors.

Eight classes of rotated shapes with random colours and textures, on a blurred background with lines and blobs that are
no objects; shapes cover one another and stick out of the image, and boxes enclose what remains visible.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.progress import track

from detfamily.data.coco import CocoData, cache_folder
from detfamily.errors import DataError

try:
    import fcntl
except ImportError:  # not on Windows; there, processes that start at once draw the set once each
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

VERSION = 2
"""Raise with every change of what is drawn or written: it is a part of the cache's key."""

COCO_NINTH: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 1024 / 9),
    "medium": (1024 / 9, 1024.0),
    "large": (1024.0, 1e10),
}
"""COCO's area ranges for images of a third of COCO's side, square pixels."""

SPLITS = ("train", "val")
JPEG_QUALITY = 92  # decodes in half the time of PNG, encodes in a tenth; loses no more than the noise that is drawn
CHUNK = 50

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ShapesSettings:
    """What is drawn. An image depends on these, its split and its index alone.

    Attributes:
        image_size: side of the square images, pixels.
        seed: of the whole data set.
        difficulty: 0 draws plain shapes that do not touch, on a flat background; 1 is the standard; up to 2. It scales
            clutter, blur and noise of the background, and how much of a shape may be hidden, and lowers the contrast.
        objects: least and most objects that are tried in an image.
        sides: least and most pixels of the longer side of a shape before it is rotated; drawn log-uniformly.
    """

    image_size: int = 128
    seed: int = 0
    difficulty: float = 1.0
    objects: tuple[int, int] = (1, 10)
    sides: tuple[float, float] = (7.0, 64.0)

    def __post_init__(self) -> None:
        if self.image_size < 32:
            raise DataError(f"data.image_size={self.image_size} is too small to draw on: 32 or more")
        if self.seed < 0:
            raise DataError(f"data.seed={self.seed} must be 0 or more")
        if not 0 <= self.difficulty <= 2:
            raise DataError(f"data.difficulty={self.difficulty} must lie between 0 (plain) and 2; 1 is the standard")
        if not 1 <= self.objects[0] <= self.objects[1]:
            raise DataError(f"data.objects={list(self.objects)} must be [least, most] with 1 <= least <= most")
        if not 4 <= self.sides[0] <= self.sides[1] <= self.image_size:
            raise DataError(
                f"data.sides={list(self.sides)} must be [least, most] pixels with 4 <= least <= most <= image_size"
            )

    @property
    def hidden_limit(self) -> float:
        """The largest share of a shape that may be covered or outside the image."""
        return 0.5 * min(self.difficulty, 1.5)


class ShapesData(CocoData):
    """The generated data set: the choice ``data=shapes``. It is drawn once, to a folder named after its settings.

    Args:
        train_size: number of training images.
        val_size: number of validation images.
        image_size: side of the square images, pixels.
        seed: of the drawing (not of the training).
        difficulty: 0 is plain, 1 the standard; see ``ShapesSettings``.
        objects: least and most objects in an image.
        sides: least and most pixels of the longer side of a shape.
        root: where to keep the images; None takes the cache folder (``cache_folder``).
        limit_train: train on the first n images; None takes all.
        limit_val: validate on the first n images; None takes all.
        validate_on: "val", or "train" to validate on the training images.
        area_ranges: name -> (low, high) square pixels, for the AP by size; a ninth of COCO's when None.

    Raises:
        DataError: settings that cannot be drawn, or a folder that cannot be written.
    """

    def __init__(
        self,
        train_size: int = 8000,
        val_size: int = 300,
        image_size: int = 128,
        seed: int = 0,
        difficulty: float = 1.0,
        objects: Sequence[int] = (1, 10),
        sides: Sequence[float] = (7, 64),
        root: str | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
        validate_on: Literal["val", "train"] = "val",
        area_ranges: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        if len(objects) != 2 or len(sides) != 2:
            raise DataError(f"data.objects and data.sides are pairs [least, most], not {objects!r} and {sides!r}")
        counts, lengths = (objects[0], objects[1]), (float(sides[0]), float(sides[1]))
        settings = ShapesSettings(image_size, seed, float(difficulty), counts, lengths)
        sizes = {"train": train_size, "val": val_size}
        for split, size in sizes.items():
            if size < 1:
                raise DataError(f"data.{split}_size={size} must be 1 or more")
        super().__init__(
            root=str(prepare(settings, sizes, Path(root).expanduser() if root else cache_folder() / "shapes")),
            train_images="train",
            train_annotations="annotations/instances_train.json",
            val_images="val",
            val_annotations="annotations/instances_val.json",
            limit_train=limit_train,
            limit_val=limit_val,
            validate_on=validate_on,
            area_ranges=COCO_NINTH if area_ranges is None else area_ranges,
        )


# --- files ------------------------------------------------------------------------------------------------------------


def prepare(settings: ShapesSettings, sizes: Mapping[str, int], cache: Path) -> Path:
    """The folder with the data set, drawn now if nobody has done so before.

    It is drawn aside and renamed when complete, so that no process ever sees a part of it.

    Args:
        settings: what to draw.
        sizes: split -> number of images.
        cache: folder in which the folders of all settings lie.
    """
    content = json.dumps({"version": VERSION, **asdict(settings), **sizes}, sort_keys=True)
    name = f"{settings.image_size}px-{'+'.join(str(sizes[split]) for split in SPLITS)}"
    folder = cache.absolute() / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _draw_aside(settings, sizes, folder)
    except OSError as error:
        where = "set data.root or DETFAMILY_CACHE to a folder with space that you own"
        raise DataError(f"cannot write the shapes to {cache}: {error}; {where}") from error
    return folder


def _draw_aside(settings: ShapesSettings, sizes: Mapping[str, int], folder: Path) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        for split in SPLITS:
            (unfinished / split).mkdir()
        found = _draw_all(settings, sizes, unfinished)
        (unfinished / "annotations").mkdir()
        for split, annotations in found.items():
            content = _coco_json(settings, sizes[split], annotations)
            (unfinished / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process, that no lock held back, was first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _draw_all(
    settings: ShapesSettings, sizes: Mapping[str, int], folder: Path
) -> dict[str, list[list[dict[str, Any]]]]:
    """Draw all images on all cores; the annotations of each image, by split."""
    jobs = [
        (settings, split, range(start, min(start + CHUNK, sizes[split])), folder)
        for split in SPLITS
        for start in range(0, sizes[split], CHUNK)
    ]
    total = sum(sizes.values())
    # A forked process starts at once; a fresh one would import torch first, and needs a guarded main module.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    workers = min(_cores(), len(jobs))
    logger.info("drawing %d images on %d cores into %s", total, workers, folder.parent)
    found: dict[str, list[list[dict[str, Any]]]] = {split: [] for split in SPLITS}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as pool:
        done = pool.map(_draw_files, *zip(*jobs, strict=True))
        bar = track(done, f"drawing {total} shapes images", len(jobs), console=Console(stderr=True))
        for (_, split, _, _), annotations in zip(jobs, bar, strict=True):
            found[split].extend(annotations)
    return found


def _draw_files(
    settings: ShapesSettings, split: Literal["train", "val"], indices: Sequence[int], folder: Path
) -> list[list[dict[str, Any]]]:
    annotations = []
    for index in indices:
        pixels, objects = draw(settings, split, index)
        path = folder / split / _file_name(index)
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY, subsampling=0)
        annotations.append([_annotation(one, settings.image_size) for one in objects])
    return annotations


def _annotation(drawn: Drawn, size: int) -> dict[str, Any]:
    x1, y1, x2, y2 = drawn.box
    mask = np.zeros((size, size), dtype=np.uint8, order="F")
    inside, at = _inside(drawn, size)
    mask[at] = drawn.visible[inside]
    runs = coco_mask.encode(mask)
    return {
        "category_id": drawn.label + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": drawn.area,
        "iscrowd": 0,
        "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
    }


def _coco_json(
    settings: ShapesSettings, count: int, annotations: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    side = settings.image_size
    flat = [{"image_id": index + 1, **one} for index, objects in enumerate(annotations) for one in objects]
    return {
        "info": {"description": "generated shapes", "version": str(VERSION), "settings": asdict(settings)},
        "images": [{"id": i + 1, "file_name": _file_name(i), "height": side, "width": side} for i in range(count)],
        "annotations": [{"id": number, **one} for number, one in enumerate(flat, start=1)],
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)],
    }


def _file_name(index: int) -> str:
    return f"{index + 1:06d}.jpg"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock that dies with its process, so that the processes of one run do not all draw the same set."""
    if fcntl is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- drawing ----------------------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """A shape in an image.

    Attributes:
        label: index of its class.
        top: first row of its window; may be negative where it sticks out of the image, as may ``left``.
        left: first column of its window.
        pixels: number of pixels of the whole shape, hidden ones included.
        visible: (h, w) which pixels of the window show it.
    """

    label: int
    top: int
    left: int
    pixels: int
    visible: Mask

    @property
    def area(self) -> int:
        """Visible pixels."""
        return int(self.visible.sum())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2: the edges of the visible pixels."""
        rows, columns = (np.flatnonzero(self.visible.any(axis=axis)) for axis in (1, 0))
        return (
            self.left + int(columns[0]),
            self.top + int(rows[0]),
            self.left + int(columns[-1]) + 1,
            self.top + int(rows[-1]) + 1,
        )


def draw(settings: ShapesSettings, split: Literal["train", "val"], index: int) -> tuple[NDArray[np.uint8], list[Drawn]]:
    """Draw one image.

    Returns:
        (S, S, 3) uint8 pixels, and its shapes from the back to the front.
    """
    rng = np.random.default_rng((settings.seed, SPLITS.index(split), index))
    canvas = _background(settings, rng)
    for _ in range(rng.poisson(8 * settings.difficulty)):
        _draw_clutter(canvas, rng)
    drawn: list[Drawn] = []
    for _ in range(rng.integers(settings.objects[0], settings.objects[1] + 1)):
        _draw_shape(canvas, drawn, settings, rng)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(4 * settings.difficulty)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), drawn


def _background(settings: ShapesSettings, rng: np.random.Generator) -> Floats:
    """(S, S, 3) a colour that changes slowly over the image."""
    cells = int(rng.integers(3, 7))
    coarse = rng.uniform(40, 215, 3) + settings.difficulty * rng.normal(0, 30, (cells, cells, 3))
    image = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    fine = image.resize((settings.image_size, settings.image_size), Image.Resampling.BICUBIC)
    return np.asarray(fine, dtype=np.float32).copy()


def _draw_clutter(canvas: Floats, rng: np.random.Generator) -> None:
    """A thin line or a soft blob: neither is an object."""
    size = canvas.shape[0]
    centre, angle = rng.uniform(0, size, 2), rng.uniform(0, math.pi)
    line = rng.random() < 0.6
    if line:
        length, width = size * rng.uniform(0.1, 0.35), size / 128 * rng.uniform(0.5, 1.1)
    else:
        length, width = size / 128 * rng.uniform(2, 9, 2)
    reach = length + 2 if line else 2.5 * max(length, width)
    rows, columns = (slice(max(int(at - reach), 0), min(int(at + reach) + 1, size)) for at in centre)
    along, across = _turned(rows, columns, centre, angle)
    if line:
        beyond_end = np.maximum(np.abs(along) - np.float32(length), 0)
        cover = np.clip(np.float32(width + 0.5) - np.hypot(beyond_end, across), 0, 1)
    else:
        cover = np.exp(-((along / np.float32(length)) ** 2) - (across / np.float32(width)) ** 2)
    colour, strength = rng.uniform(0, 255, 3).astype(np.float32), np.float32(rng.uniform(0.5, 0.9))
    _blend(canvas[rows, columns], cover * strength, colour)


def _draw_shape(canvas: Floats, drawn: list[Drawn], settings: ShapesSettings, rng: np.random.Generator) -> None:
    """Put one shape where it hides no other too much; leave it out if chance finds no such place."""
    size = settings.image_size
    label = int(rng.integers(len(CLASSES)))
    low, high = settings.sides
    half = 0.5 * math.exp(rng.uniform(math.log(low), math.log(high)))
    reach = math.ceil(half * REACH) + 1
    angle = rng.uniform(0, 2 * math.pi)
    window = slice(-reach, reach + 1)
    along, across = _turned(window, window, rng.uniform(-0.5, 0.5, 2), angle)
    cover = np.clip(0.5 - list(CLASSES.values())[label](along, across, np.float32(half)), 0, 1)
    hard = cover >= 0.5
    for _ in range(20):
        top, left = (int(one) for one in rng.integers(-reach, size - reach, 2))
        shape = _placed(Drawn(label, top, left, int(hard.sum()), hard), drawn, settings)
        if shape is None:
            continue
        inside, at = _inside(shape, size)
        patch = canvas[at]
        colours = _colours(patch.mean(axis=(0, 1)), settings, rng)
        paint = _paint(along[inside], across[inside], half, colours, rng)
        _blend(patch, cover[inside], paint)
        drawn.append(shape)
        return


def _placed(shape: Drawn, drawn: Sequence[Drawn], settings: ShapesSettings) -> Drawn | None:
    """The shape as it shows in the image, having covered those behind it; None if too much of any were hidden."""
    inside, _ = _inside(shape, settings.image_size)
    visible = np.zeros_like(shape.visible)
    visible[inside] = shape.visible[inside]
    shape = Drawn(shape.label, shape.top, shape.left, shape.pixels, visible)
    least = 1 - settings.hidden_limit
    if shape.area < least * shape.pixels:
        return None
    covered = []
    for other in drawn:
        overlap = _overlap(shape, other)
        if overlap is None:
            continue
        mine, theirs = overlap
        hidden = shape.visible[mine] & other.visible[theirs]
        if other.area - int(hidden.sum()) < least * other.pixels:
            return None
        covered.append((other, theirs, hidden))
    for other, theirs, hidden in covered:
        other.visible = other.visible.copy()
        other.visible[theirs] &= ~hidden
    return shape


def _inside(shape: Drawn, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of a shape's window that lies in the image: in the window's and in the image's coordinates."""
    height, width = shape.visible.shape
    rows = slice(max(-shape.top, 0), min(height, size - shape.top))
    columns = slice(max(-shape.left, 0), min(width, size - shape.left))
    at = (
        slice(rows.start + shape.top, rows.stop + shape.top),
        slice(columns.start + shape.left, columns.stop + shape.left),
    )
    return (rows, columns), at


def _overlap(one: Drawn, other: Drawn) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """Where two windows overlap, in the coordinates of each; None if they do not."""
    top, left = max(one.top, other.top), max(one.left, other.left)
    bottom = min(one.top + one.visible.shape[0], other.top + other.visible.shape[0])
    right = min(one.left + one.visible.shape[1], other.left + other.visible.shape[1])
    if bottom <= top or right <= left:
        return None
    mine, theirs = (
        (slice(top - shape.top, bottom - shape.top), slice(left - shape.left, right - shape.left))
        for shape in (one, other)
    )
    return mine, theirs


def _turned(rows: slice, columns: slice, centre: NDArray[np.float64], angle: float) -> tuple[Floats, Floats]:
    """Coordinates of the pixels' centres along two axes turned by an angle, pixels from the centre."""
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(centre[0])
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None] - np.float32(centre[1])
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def _blend(patch: Floats, cover: Floats, colour: Floats) -> None:
    patch += cover[..., None] * (colour - patch)


def _colours(behind: Floats, settings: ShapesSettings, rng: np.random.Generator) -> Floats:
    """(2, 3) two colours that differ from what lies behind; the second is a relative of the first."""
    contrast = 75 * (1.5 - 0.5 * settings.difficulty)
    for _ in range(50):
        first = rng.uniform(0, 255, 3)
        second = np.clip(first + rng.choice((-1, 1)) * rng.uniform(35, 80) + rng.normal(0, 25, 3), 0, 255)
        if min(np.linalg.norm(first - behind), np.linalg.norm(second - behind)) >= contrast:
            break
    return np.stack((first, second)).astype(np.float32)


def _paint(along: Floats, across: Floats, half: float, colours: Floats, rng: np.random.Generator) -> Floats:
    """(h, w, 3) or (3,) the colour of each pixel of a window: plain, stripes, checks, or a gradient."""
    kind = rng.integers(4)
    frequency = np.float32(math.pi / max(half * rng.uniform(0.25, 0.6), 2.0))
    phase = np.float32(rng.uniform(0, 2 * math.pi))
    if kind == 0:
        return colours[0]
    if kind == 1:
        share = np.clip(0.5 + 1.5 * np.sin(along * frequency + phase), 0, 1)
    elif kind == 2:
        share = np.clip(0.5 + 2 * np.sin(along * frequency + phase) * np.sin(across * frequency + phase), 0, 1)
    else:
        share = np.clip(0.5 + along / np.float32(2 * half), 0, 1)
    return colours[0] + share[..., None].astype(np.float32) * (colours[1] - colours[0])


# Each class is the distance of a point (u, v) to the outline in pixels, negative inside; r is half of the longer side.


def _circle(u: Floats, v: Floats, r: np.float32) -> Floats:
    return np.hypot(u, v) - r


def _square(u: Floats, v: Floats, r: np.float32) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - r


def _triangle(u: Floats, v: Floats, r: np.float32) -> Floats:
    half_root = np.float32(math.sqrt(3) / 2)
    return np.maximum(np.abs(u) * half_root - v * np.float32(0.5), v) - r / np.float32(math.sqrt(3))


def _star(u: Floats, v: Floats, r: np.float32) -> Floats:
    fifth = np.float32(2 * math.pi / 5)
    angle = np.abs((np.arctan2(v, u) + fifth / 2) % fifth - fifth / 2)
    distance = np.hypot(u, v)
    inner_x, inner_y = 0.45 * math.cos(math.pi / 5), 0.45 * math.sin(math.pi / 5)
    length = math.hypot(1 - inner_x, inner_y)
    normal_x, normal_y = np.float32(inner_y / length), np.float32((1 - inner_x) / length)
    return (distance * np.cos(angle) - r) * normal_x + distance * np.sin(angle) * normal_y


def _ring(u: Floats, v: Floats, r: np.float32) -> Floats:
    return np.abs(np.hypot(u, v) - np.float32(0.72) * r) - np.float32(0.28) * r


def _cross(u: Floats, v: Floats, r: np.float32) -> Floats:
    a, b = np.abs(u), np.abs(v)
    thin = np.float32(0.3) * r
    return np.minimum(np.maximum(a - r, b - thin), np.maximum(a - thin, b - r))


def _bar(u: Floats, v: Floats, r: np.float32) -> Floats:
    return np.maximum(np.abs(u) - r, np.abs(v) - np.float32(0.28) * r)


def _crescent(u: Floats, v: Floats, r: np.float32) -> Floats:
    bite = np.float32(0.85) * r - np.hypot(u - np.float32(0.55) * r, v)
    return np.maximum(np.hypot(u, v) - r, bite)


CLASSES: dict[str, Callable[[Floats, Floats, np.float32], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "bar": _bar,
    "crescent": _crescent,
}
REACH = math.sqrt(2)  # from the centre to the farthest point of any class, in half sides: a corner of the square
