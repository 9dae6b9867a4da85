"""What an importer reads, whatever the layout: images with their objects, problems, and remarks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from detfamily.errors import DataError


@dataclass(frozen=True)
class ImportedObject:
    """One object of an image.

    Attributes:
        category: its class name.
        xywh: x, y of the upper left corner, width, height; pixels.
        ignored: whether evaluation ignores it and training leaves it out, as with COCO's crowd regions.
        flags: what else the layout says of it; kept in the json as it is.
    """

    category: str
    xywh: tuple[float, float, float, float]
    ignored: bool = False
    flags: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportedImage:
    """One image: its file, its width and height in pixels, its objects."""

    path: Path
    width: int
    height: int
    objects: tuple[ImportedObject, ...]


@dataclass(frozen=True)
class Imported:
    """A data set of another layout.

    Attributes:
        root: the folder that file names start from.
        splits: name of the split -> its images.
        categories: class name -> category id.
        remarks: what is worth knowing about the import.
    """

    root: Path
    splits: dict[str, list[ImportedImage]]
    categories: dict[str, int]
    remarks: list[str]

    def coco(self, split: str) -> dict[str, Any]:
        """The content of a COCO json for one split.

        Images and annotations are numbered from 1, through all splits in their order, so that ids are unique.
        """
        before = [self.splits[name] for name in list(self.splits)[: list(self.splits).index(split)]]
        first_image = 1 + sum(len(images) for images in before)
        first_annotation = 1 + sum(len(image.objects) for images in before for image in images)
        images = list(enumerate(self.splits[split], start=first_image))
        objects = [(image_id, one) for image_id, image in images for one in image.objects]
        return {
            "images": [
                {"id": i, "file_name": self.file_name(one.path), "width": one.width, "height": one.height}
                for i, one in images
            ],
            "annotations": [
                {"id": number, "image_id": image_id, **self._annotation(one)}
                for number, (image_id, one) in enumerate(objects, start=first_annotation)
            ],
            "categories": [{"id": i, "name": name} for name, i in self.categories.items()],
        }

    def file_name(self, path: Path) -> str:
        """The image file as the json names it: inside the root, or else with its whole path."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def _annotation(self, one: ImportedObject) -> dict[str, Any]:
        return {
            "category_id": self.categories[one.category],
            "bbox": list(one.xywh),
            "area": one.xywh[2] * one.xywh[3],
            "iscrowd": int(one.ignored),
            **one.flags,
        }


class Problems:
    """Collects what is wrong with the files of a data set, so that all can be mended at once."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, path: Path, line: int | None, words: str) -> None:
        """Note a problem at a line of a file, counted from 1; None for the file as a whole."""
        self.add_words(f"{path}: {words}" if line is None else f"{path}:{line}: {words}")

    def add_words(self, words: str) -> None:
        """Note a problem whose words name the place already."""
        self._found.append(words)

    def refuse(self, most: int = 20) -> None:
        """Raise if there is a problem.

        Raises:
            DataError: names the files and lines.
        """
        if not self._found:
            return
        number = len(self._found)
        if number == 1:
            raise DataError(f"{self._found[0]}; nothing is written")
        rest = [f"... and {number - most} more"] * (number > most)
        raise DataError("\n".join([f"{number} problems, so nothing is written:", *self._found[:most], *rest]))


def image_size(path: Path, problems: Problems) -> tuple[int, int, bool] | None:
    """Width and height of an image as stored, and whether EXIF turns or mirrors it; None if it is no image."""
    try:
        with Image.open(path) as image:
            return *image.size, _orientation(image) in range(2, 9)
    except OSError as error:
        problems.add(path, None, error.strerror or "is not an image, or its beginning is damaged")
    except Exception as error:  # decoders report damage through a dozen types
        problems.add(path, None, f"cannot be read as an image: {error}")
    return None


def read_text(path: Path, problems: Problems) -> str | None:
    """The text of a file, None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        problems.add(path, None, error.strerror or str(error))
    except UnicodeDecodeError:
        problems.add(path, None, "is not text in UTF-8")
    return None


def rotated_remark(paths: Sequence[Path]) -> list[str]:
    """What to say about images with an EXIF orientation."""
    if not paths:
        return []
    return [
        f"{len(paths)} images have an EXIF orientation (first: {paths[0]}): their boxes are taken to refer to the "
        "pixels as stored, not to the upright image"
    ]


def files_below(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """All files with one of the suffixes (in lower case) in a folder and those in it, in the order of their names."""
    known = frozenset(suffixes)
    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in known and not name.startswith(".")
    )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block, which says nothing about the size
        return 1
