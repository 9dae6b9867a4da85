"""Data sets in the COCO format: the annotation file, the image files, the training and the validation set.

What a user can get wrong is checked here once, before any work, and named by its id.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detfamily.data.check.annotations import scan
from detfamily.data.check.files import missing_files
from detfamily.data.check.findings import Findings
from detfamily.data.check.splits import category_differences
from detfamily.data.copy_paste import CopyPaste
from detfamily.data.images import read_image
from detfamily.data.labels import LabelMap
from detfamily.data.masks import Outlines
from detfamily.data.transforms import Sample, Transform, random_integer
from detfamily.errors import DataError, nearest
from detfamily.files import read_json, write_text_atomically

logger = logging.getLogger(__name__)

COCO_AREA_RANGES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""Square pixels of the original image, as in COCO's published numbers."""

LAYOUT = "train2017/*.jpg, val2017/*.jpg, annotations/instances_train2017.json, annotations/instances_val2017.json"


@dataclass(frozen=True, slots=True)
class SampleKey:
    """What a loader asks a data set for: an image, and the seed of its augmentation."""

    index: int
    seed: int


@dataclass(frozen=True)
class Annotations:
    """The content of one COCO json in compact form: I images in the order of their ids, M boxes grouped by image.

    As in the official training, crowd regions are left out, boxes are clamped to their image, and boxes without width
    or height are left out; images without objects stay.

    Attributes:
        path: the file, for messages.
        categories: id -> name.
        image_ids: id of each image.
        file_names: path of each image inside the image folder.
        sizes: (I, 2) height, width.
        starts: (I + 1,) the boxes of image i are starts[i] .. starts[i + 1].
        boxes: (M, 4) float32 x1, y1, x2, y2 in pixels.
        category_ids: (M,) int64.
        area: (M,) float32, the file's own area (of the segmentation in COCO).
        rows: (M,) int64, places in the file's list of annotations.
        crowds: number of crowd regions left out.
        degenerate: number of boxes left out for having no width or height inside the image.
        errors: number of things that are wrong, but no reason not to train: see ``detfamily check-data``.
    """

    path: Path
    categories: dict[int, str]
    image_ids: tuple[int, ...]
    file_names: tuple[str, ...]
    sizes: Tensor
    starts: Tensor
    boxes: Tensor
    category_ids: Tensor
    area: Tensor
    rows: Tensor
    crowds: int
    degenerate: int
    errors: int

    def __len__(self) -> int:
        return len(self.image_ids)

    @classmethod
    def read(cls, path: Path) -> Annotations:
        """Parse a file; DataError says what is wrong with it, naming the image or annotation."""
        return cls.from_json(read_object(path), path)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], path: Path) -> Annotations:
        """Check and convert the content of a COCO json; ``path`` is for messages only."""
        findings = Findings(most=5)
        tables = scan(content, findings)
        findings.refuse(path)
        assert tables is not None
        images, boxes = tables.images, tables.boxes
        sizes, image_index = torch.from_numpy(images.sizes), torch.from_numpy(boxes.image_index)
        corners = clamped_xyxy(torch.from_numpy(boxes.xywh).float(), sizes[image_index])
        crowd = torch.from_numpy(boxes.crowd)
        solid = (corners[:, 2:] > corners[:, :2]).all(dim=1)
        keep = solid & ~crowd
        counts = torch.bincount(image_index[keep], minlength=len(images.ids))
        return cls(
            path=path,
            categories=tables.categories,
            image_ids=images.ids,
            file_names=images.file_names,
            sizes=sizes,
            starts=torch.cat((counts.new_zeros(1), counts.cumsum(0))),
            boxes=corners[keep],
            category_ids=torch.from_numpy(boxes.category_ids)[keep],
            area=torch.from_numpy(boxes.area).float()[keep],
            rows=torch.from_numpy(boxes.rows)[keep],
            crowds=int(crowd.sum()),
            degenerate=int((~solid & ~crowd).sum()),
            errors=findings.number("error"),
        )

    @property
    def counts(self) -> Tensor:
        """(I,) number of objects of each image."""
        return self.starts.diff()

    def first_with_objects(self, limit: int | None) -> list[int]:
        """Indices of the first ``limit`` images that have objects, in the order of the ids; of all images for None."""
        if limit is None:
            return list(range(len(self)))
        return [int(i) for i in self.counts.nonzero()[:limit, 0]]

    def summary(self, indices: Sequence[int]) -> str:
        """Say how many images and objects there are, and what was left out."""
        objects = int(self.counts[list(indices)].sum())
        text = f"{len(indices)} images with {objects} objects"
        if len(indices) < len(self):
            return text + f" (of {len(self)} images)"
        left_out = [(self.crowds, "crowd regions"), (self.degenerate, "boxes without extent")]
        named = " and ".join(f"{number} {what}" for number, what in left_out if number)
        text += f" ({named} left out)" if named else ""
        return text + (f" ({self.errors} doubtful entries: see detfamily check-data)" if self.errors else "")


class CocoDetection(Dataset[Sample]):
    """Images and objects of one annotation file.

    Args:
        annotations: the parsed file.
        folder: where the file names start.
        label_map: from category ids to labels.
        transform: what to do with each sample.
        indices: which images to take; None takes all.
        outlines: of all objects of the file, for samples with masks; None for samples without.
    """

    def __init__(
        self,
        annotations: Annotations,
        folder: Path,
        label_map: LabelMap,
        transform: Transform | CopyPaste,
        indices: Sequence[int] | None = None,
        outlines: Outlines | None = None,
    ) -> None:
        self.annotations = annotations
        self.outlines = outlines
        self.folder = folder
        self.transform = transform
        self.indices = list(range(len(annotations)) if indices is None else indices)
        used, inverse = annotations.category_ids.unique(return_inverse=True)
        self._labels = torch.tensor([label_map.label_of(int(one)) for one in used], dtype=torch.int64)[inverse]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def image_ids(self) -> list[int]:
        """The ids of the images, in the order of the data set."""
        return [self.annotations.image_ids[i] for i in self.indices]

    @property
    def max_objects(self) -> int:
        """The number of objects in the fullest sample: a detector needs more queries than this."""
        most = int(self.annotations.counts[self.indices].max()) if self.indices else 0
        return self.transform.most_objects(most) if isinstance(self.transform, CopyPaste) else most

    def load(self, index: int) -> Sample:
        """The sample as it is on disk, before any transform.

        Raises:
            DataError: the image file is missing, broken, or of another size than the annotations say.
        """
        found = self.annotations
        at = self.indices[index]
        image_id, path = found.image_ids[at], self.folder / found.file_names[at]
        try:
            image = read_image(path)
        except DataError as error:
            raise DataError(f"image {image_id}: {error}") from None
        height, width = found.sizes[at].tolist()
        if tuple(image.shape[1:]) != (height, width):
            raise DataError(
                f"image {image_id}: {path} is {image.shape[2]}x{image.shape[1]} pixels (width x height), but "
                f"{found.path} says {width}x{height}, so its boxes would be misplaced"
            )
        return self.sample(index, image)

    def sample(self, index: int, image: Tensor) -> Sample:
        """The sample with the given pixels in place of those on disk."""
        found = self.annotations
        at = self.indices[index]
        first, last = int(found.starts[at]), int(found.starts[at + 1])
        objects = slice(first, last)
        height, width = found.sizes[at].tolist()
        boxes, outlines = found.boxes[objects], self.outlines
        return Sample(
            image=image,
            boxes=boxes,
            labels=self._labels[objects],
            area=found.area[objects],
            iscrowd=torch.zeros(last - first, dtype=torch.int64),
            image_id=found.image_ids[at],
            original_size=(height, width),
            masks=None if outlines is None else outlines.masks(range(first, last), boxes, (height, width)),
        )

    def __getitem__(self, key: int | SampleKey) -> Sample:
        if not isinstance(key, SampleKey):
            key = SampleKey(key, seed=key)
        sample, rng = self.load(key.index), torch.Generator().manual_seed(key.seed)
        if isinstance(self.transform, CopyPaste):
            return self.transform(sample, rng, self._another)
        return self.transform(sample, rng)

    def _another(self, rng: torch.Generator) -> Sample:
        return self.load(random_integer(0, len(self) - 1, rng))


class CocoData:
    """A data set in the COCO format: the choice ``data=coco``, and any other data set by overriding its arguments.

    Annotations are read when something asks for them, so that a checkpoint can be evaluated where only the validation
    set is, and that all of what is wrong with a data set can be said (``detfamily check-data``).

    Args:
        root: folder of the data set.
        train_images: folder of the training images, inside the root; file names may lead into subfolders.
        train_annotations: COCO json of the training images, inside the root.
        val_images: folder of the validation images.
        val_annotations: COCO json of the validation images.
        labels: "contiguous" (0 .. K-1 in the order of the category ids), or "category_id" (column i = category id i)
            for heads of the official checkpoints.
        limit_train: train on the first n images that have objects, in the order of their ids; None takes all images.
        limit_val: validate on the first n images that have objects; None takes all images.
        validate_on: "val", or "train" to validate on the training images: can the detector learn them by heart?
        area_ranges: name -> (low, high) square pixels, for the AP by size; COCO's when None.

    Raises:
        DataError: a file or folder is not there, is broken, or contradicts another.
    """

    def __init__(
        self,
        root: str,
        train_images: str = "train2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_images: str = "val2017",
        val_annotations: str = "annotations/instances_val2017.json",
        labels: Literal["contiguous", "category_id"] = "contiguous",
        limit_train: int | None = None,
        limit_val: int | None = None,
        validate_on: Literal["val", "train"] = "val",
        area_ranges: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        maps = {"contiguous": LabelMap.contiguous, "category_id": LabelMap.by_category_id}
        if labels not in maps:
            raise DataError(f"data.labels={labels} does not exist; {nearest(str(labels), maps)}")
        for name, limit in (("limit_train", limit_train), ("limit_val", limit_val)):
            if limit is not None and limit < 1:
                raise DataError(f"data.{name}={limit} leaves nothing; give 1 or more, or null for all images")
        self.root = _existing_root(root)
        self.limit_train, self.limit_val = limit_train, limit_val
        self.area_ranges = _checked_area_ranges(COCO_AREA_RANGES if area_ranges is None else area_ranges)
        if validate_on == "train":
            val_images, val_annotations = train_images, train_annotations
        elif validate_on != "val":
            raise DataError(f"data.validate_on={validate_on} does not exist; {nearest(validate_on, ('val', 'train'))}")
        self._folders = {"train": self.root / train_images, "val": self.root / val_images}
        self._files = {"train": self.root / train_annotations, "val": self.root / val_annotations}
        self._make_label_map = maps[labels]

    @cached_property
    def label_map(self) -> LabelMap:
        """Which category each column of the class head stands for."""
        return self._make_label_map([{"id": i, "name": n} for i, n in self._val.categories.items()])

    @property
    def sources(self) -> dict[str, tuple[Path, Path]]:
        """Split -> its annotation file and its image folder; "train" alone where it serves as validation, too."""
        found = {split: (self._files[split], self._folders[split]) for split in ("train", "val")}
        return {"train": found["train"]} if found["train"] == found["val"] else found

    def train(self, transform: Transform | CopyPaste) -> CocoDetection:
        """The training set, with masks if objects are to be pasted.

        Raises:
            DataError: its categories are not those of the validation set, or a segmentation that is asked for is none.
        """
        _check_same_categories(self._train, self._val)
        if not len(self._train.boxes):
            raise DataError(f"{self._train.path} has no objects to learn from: detfamily check-data says what it holds")
        dataset = self._dataset("train", self._train, transform, self.limit_train)
        if isinstance(transform, CopyPaste) and transform.enabled:
            dataset.outlines = read_outlines(self._train)
        return dataset

    def validation(self, transform: Transform) -> CocoDetection:
        """The validation set."""
        return self._dataset("val", self._val, transform, self.limit_val)

    @cached_property
    def validation_annotations(self) -> Path:
        """COCO json for the evaluator, with exactly the images of ``validation``.

        It is the data set's own file, or with ``limit_val`` a copy of a part of it in the cache folder.
        """
        path = self._files["val"]
        chosen = {self._val.image_ids[i] for i in self._val.first_with_objects(self.limit_val)}
        if len(chosen) == len(self._val):
            return path
        content = read_object(path)
        part = {
            "images": [image for image in content["images"] if image["id"] in chosen],
            "annotations": [
                {key: value for key, value in annotation.items() if key != "segmentation"}
                for annotation in content["annotations"]
                if annotation["image_id"] in chosen
            ],
            "categories": content["categories"],
        }
        text = json.dumps(part)
        target = cache_folder() / "annotations" / f"{path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        if not target.exists():
            write_to_cache(target, text)
        return target

    def describe(self) -> str:
        """One line: where, how many categories, images and objects; training images once they have been read."""
        parts = [f"{self.root}: {self.label_map.num_categories} categories"]
        if "_train" in self.__dict__:
            parts.append("train " + self._train.summary(self._train.first_with_objects(self.limit_train)))
        parts.append("val " + self._val.summary(self._val.first_with_objects(self.limit_val)))
        return ", ".join(parts)

    @cached_property
    def _val(self) -> Annotations:
        return self._read("val")

    @cached_property
    def _train(self) -> Annotations:
        return self._val if self._files["train"] == self._files["val"] else self._read("train")

    def _read(self, split: str) -> Annotations:
        path = self._files[split]
        if not path.is_file():
            raise DataError(
                f"the annotations {path} do not exist. data.root={self.root} should hold COCO's layout ({LAYOUT}); "
                f"for other names set data.{split}_annotations=... and data.{split}_images=... (relative to data.root)"
            )
        return Annotations.read(path)

    def _dataset(
        self, split: str, found: Annotations, transform: Transform | CopyPaste, limit: int | None
    ) -> CocoDetection:
        indices = found.first_with_objects(limit)
        if not indices:
            raise DataError(f"no image of {found.path} has an object; without data.limit_{split} all images are taken")
        self._check_files(split, found, indices)
        return CocoDetection(found, self._folders[split], self.label_map, transform, indices)

    def _check_files(self, split: str, found: Annotations, indices: Sequence[int]) -> None:
        """Look for all images, so that one that is missing shows before training does."""
        folder, names = self._folders[split], [found.file_names[i] for i in indices]
        missing = missing_files(folder, names)
        if not missing:
            return
        first = names[missing[0]]
        places = {".": self.root, **{path.name: path for path in sorted(self.root.iterdir()) if path.is_dir()}}
        hints = [name for name, place in places.items() if (place / first).is_file()]
        hint = f"; it is there with data.{split}_images={hints[0]}" if hints else ""
        problem = f"lacks {len(missing)} of {len(names)} images" if folder.is_dir() else "does not exist"
        raise DataError(
            f"the image folder {folder} {problem}: {found.path.name} names {first!r} (image "
            f"{found.image_ids[indices[missing[0]]]}){hint}. Set data.{split}_images=... to the folder (relative to "
            "data.root) in which these file names start; detfamily check-data names all that is missing"
        )


def read_outlines(annotations: Annotations) -> Outlines | None:
    """The segmentations of all objects, from the file once more; None, and a line in the log, if it has none.

    Raises:
        DataError: a segmentation that is none; says of which annotation.
    """
    entries = read_object(annotations.path)["annotations"]
    rows = annotations.rows.tolist()
    sizes = annotations.sizes.repeat_interleave(annotations.counts, dim=0).tolist()
    try:
        outlines = Outlines.pack((entries[row].get("segmentation") for row in rows), sizes)
    except ValueError as error:
        words, at = error.args
        named = entries[rows[at]].get("id", f"number {rows[at]}")
        raise DataError(f"{annotations.path}: the 'segmentation' of annotation {named}: {words}") from None
    if outlines.known < len(rows):
        logger.warning(
            "%s: %d of %d objects have no segmentation; they are pasted as rectangles (augmentation.copy_paste=false "
            "pastes nothing)",
            annotations.path,
            len(rows) - outlines.known,
            len(rows),
        )
    return outlines if outlines.known else None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a json file; DataError if it cannot be read, or holds something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; a COCO json is an object with 'images', ...")
    return content


def write_to_cache(path: Path, text: str) -> None:
    """Write a file of the cache folder.

    Raises:
        DataError: it cannot be written; says how to use another folder.
    """
    try:
        write_text_atomically(path, text)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}; set DETFAMILY_CACHE to a folder that you own"
        ) from None


def cache_folder() -> Path:
    """Where generated data are kept: DETFAMILY_CACHE, or "detfamily" in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("DETFAMILY_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "detfamily"


def clamped_xyxy(boxes_xywh: Tensor, sizes: Tensor) -> Tensor:
    """COCO's boxes (M, 4) as corners, clamped to images of (M, 2) height, width; all in pixels."""
    corners = torch.cat((boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]), dim=1)
    limits = sizes.flip(1).repeat(1, 2).to(corners.dtype)
    return torch.minimum(corners.clamp(min=0), limits)


def _existing_root(root: str) -> Path:
    if not root:
        raise DataError(f"data.root is not set: give the folder of the data set, which holds {LAYOUT}")
    path = Path(root).expanduser().absolute()
    if not path.is_dir():
        raise DataError(f"data.root={root} is not a folder; it should hold {LAYOUT}")
    return path


def _checked_area_ranges(ranges: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    if missing := [name for name in COCO_AREA_RANGES if name not in ranges]:
        raise DataError(f"data.area_ranges lacks {missing[0]!r}; it needs {', '.join(COCO_AREA_RANGES)}")
    for name, bounds in ranges.items():
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1]:
            raise DataError(f"data.area_ranges.{name} must be [low, high] square pixels, low < high, not {bounds!r}")
    return {name: (float(low), float(high)) for name, (low, high) in ranges.items()}


def _check_same_categories(train: Annotations, val: Annotations) -> None:
    if words := category_differences(train.categories, val.categories, (train.path.name, val.path.name)):
        raise DataError(words)
