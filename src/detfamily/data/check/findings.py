"""The kinds of things that can be wrong with a data set, and what has been found of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from detfamily.errors import DataError

Level = Literal["stop", "error", "notice"]
"""``stop``: an error that training refuses, too. ``error``: training would live with it, as the official code does, but
something is wrong. ``notice``: worth knowing, nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of finding.

    Attributes:
        code: its name, which stays the same for good.
        level: how bad it is.
        title: what it is, in words.
    """

    code: str
    level: Level
    title: str


_STOPS = {
    "json-missing": "the annotation file is not there",
    "json-broken": "the annotation file cannot be read, or is not json, or only a part of one",
    "json-layout": "a list is missing: a COCO json has 'images', 'annotations' and 'categories'",
    "no-images": "the annotation file lists no images",
    "no-categories": "the annotation file lists no categories",
    "category-id": "a category without a whole number as its id",
    "category-id-twice": "a category id occurs twice",
    "category-name": "a category without a name",
    "category-name-twice": "a category name occurs twice",
    "categories-differ": "training and validation have different categories",
    "boxes-relative": "all boxes lie between 0 and 1: relative to the image instead of in pixels",
    "boxes-corners": "most boxes reach out of their image: two corners instead of x, y, width, height",
    "boxes-empty": "no box of the file has a width and a height",
    "image-id": "an image without a whole number as its id",
    "image-id-twice": "an image id occurs twice",
    "image-size": "an image without a whole number as its width or height",
    "image-size-zero": "an image of width or height 0 or less",
    "file-name": "an image without a file name",
    "annotation-image": "an annotation of an image that is not listed",
    "annotation-category": "an annotation of a category that is not listed",
    "box-format": "a box that is not four numbers",
    "box-not-finite": "a box with NaN or infinity in it",
    "box-negative": "a box of negative width or height",
    "area-wrong": "an area that is negative or not a number: evaluation would leave the object out",
    "crowd-wrong": "an 'iscrowd' that is neither 0 nor 1",
    "file-missing": "an image file is not there",
}
_ERRORS = {
    "no-annotations": "the annotation file lists no annotations at all: nothing to train on",
    "file-name-twice": "two images with the same file",
    "annotation-id": "an annotation without a whole number as its id",
    "annotation-id-twice": "an annotation id occurs twice",
    "box-empty": "a box of width or height 0 (left out of training)",
    "box-outside": "a box with nothing inside its image (left out of training)",
    "box-sticks-out": "a box that reaches more than a pixel out of its image (cut off for training)",
    "box-twice": "the same box of the same class occurs twice in an image",
    "area-missing": "an annotation without an area (that of the box is taken, official tools refuse the file)",
    "file-unreadable": "a file that cannot be read",
    "file-empty": "a file of 0 bytes",
    "not-an-image": "a file that is not an image",
    "file-damaged": "an image that is damaged or cut off",
    "pixels-32-bit": "an image of 32 bits per value, whose range nobody has agreed on",
    "size-differs": "an image of another size than the annotation file says",
    "image-in-both": "an image of the training set that is in the validation set, too",
}
_NOTICES = {
    "no-objects": "images without objects",
    "crowd": "crowd regions (left out of training, ignored in evaluation)",
    "crowd-missing": "annotations without 'iscrowd' (0 is taken, official tools refuse the file)",
    "tiny-object": "objects with a side below 4 pixels",
    "many-objects": "images with more objects than the detector has queries: the rest can never be found",
    "class-only-in-train": "classes with objects in training alone",
    "class-only-in-val": "classes with objects in validation alone: they cannot be learned",
    "class-unused": "classes without a single object",
    "class-imbalance": "some classes have more than 100 times the objects of others",
    "sizes-vary": "images of very different sizes",
    "image-twice": "identical files under different names",
    "file-unlisted": "image files that no annotation file names",
    "grey": "grey images (the value becomes red, green and blue)",
    "alpha": "images with transparency (which is dropped)",
    "deep": "images of 16 bits per value (brought down to 8)",
    "cmyk": "images in CMYK (converted to RGB)",
    "rotated": "images with an EXIF orientation (ignored: boxes refer to the pixels as stored)",
    "frames": "files with several images (the first is taken)",
}
_TITLES: dict[Level, dict[str, str]] = {"stop": _STOPS, "error": _ERRORS, "notice": _NOTICES}
KINDS: dict[str, Kind] = {
    code: Kind(code, level, title) for level, titles in _TITLES.items() for code, title in titles.items()
}
"""All kinds by their codes, the worst first."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        code: its kind.
        words: a sentence that names the image or annotation.
        split: "train" or "val", None where it concerns both.
        file: the annotation file or the image that it is about.
        image_id: the image, where there is one.
        annotation_id: the annotation, where there is one.
    """

    code: str
    words: str
    split: str | None = None
    file: str | None = None
    image_id: int | None = None
    annotation_id: int | None = None


class Findings:
    """Counts all findings, and keeps the first few of each kind.

    Args:
        split: "train" or "val", None for what concerns both.
        most: how many findings of each kind to keep; None keeps all.
    """

    def __init__(self, split: str | None = None, most: int | None = None) -> None:
        self.split, self.most = split, most
        self.counts: Counter[str] = Counter()
        self._kept: dict[str, list[Finding]] = {}

    def add(
        self,
        code: str,
        words: str,
        *,
        file: str | Path | None = None,
        image_id: int | None = None,
        annotation_id: int | None = None,
    ) -> None:
        """Note one finding."""
        assert code in KINDS, code
        self.counts[code] += 1
        kept = self._kept.setdefault(code, [])
        if self.most is None or len(kept) < self.most:
            name = None if file is None else str(file)
            kept.append(Finding(code, words, self.split, name, image_id, annotation_id))

    def add_each(self, code: str, indices: Sequence[int], describe: Callable[[int], Finding]) -> None:
        """Note a finding for each index; those that would not be kept are only counted, as words cost time.

        Args:
            code: the kind.
            indices: of whatever ``describe`` knows.
            describe: makes the finding; its split and code are set here.
        """
        room = len(indices) if self.most is None else max(self.most - len(self.of(code)), 0)
        kept = [replace(describe(at), code=code, split=self.split) for at in indices[:room]]
        if len(indices):
            self.counts[code] += len(indices)
            self._kept.setdefault(code, []).extend(kept)

    def extend(self, other: Findings) -> None:
        """Take over what another collection has."""
        self.counts.update(other.counts)
        for code, found in other._kept.items():
            self._kept.setdefault(code, []).extend(found)

    def of(self, code: str) -> list[Finding]:
        """The findings of a kind that were kept, in the order in which they came."""
        return self._kept.get(code, [])

    def kinds(self, *levels: Level) -> list[Kind]:
        """The kinds that were found, of the given levels, the worst first."""
        return [kind for kind in KINDS.values() if kind.level in levels and self.counts[kind.code]]

    def number(self, *levels: Level) -> int:
        """How many findings of the given levels there are."""
        return sum(self.counts[kind.code] for kind in self.kinds(*levels))

    def __iter__(self) -> Iterator[Finding]:
        return (one for kind in KINDS for one in self.of(kind))

    def refuse(self, path: Path, most: int = 5) -> None:
        """Raise if there is anything that training cannot live with.

        Args:
            path: the annotation file, for the message.
            most: how many findings the message names at the most.

        Raises:
            DataError: names the first findings.
        """
        kinds = self.kinds("stop")
        if not kinds:
            return
        named = [one.words for kind in kinds for one in self.of(kind.code)][:most]
        rest = self.number("stop") - len(named)
        more = [f"and {rest} more, which detfamily check-data names"] * (rest > 0)
        raise DataError("\n".join([f"{path}: {named[0]}", *named[1:], *more]))
