"""The training and the validation set side by side, and what single images cannot show."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detfamily.data.check.annotations import Tables
from detfamily.data.check.files import FileFacts, unlisted_files
from detfamily.data.check.findings import Finding, Findings

IMBALANCE = 100
"""Objects of the most frequent class for each of the rarest, from which on it is worth a notice."""

SIZE_RATIO = 4
"""The same for the longer sides of the largest and the smallest image."""


@dataclass(frozen=True)
class Split:
    """One of the two sets, as far as it could be read.

    Attributes:
        name: "train" or "val".
        path: the annotation file.
        folder: the image folder.
        tables: what the file holds.
        facts: row -> what the image file is; empty where images were not decoded.
    """

    name: str
    path: Path
    folder: Path
    tables: Tables
    facts: Mapping[int, FileFacts]

    def place(self, at: int) -> str:
        """The image file of a row, in one way of writing."""
        return os.path.normpath(os.path.join(os.path.realpath(self.folder), self.tables.images.file_names[at]))


def category_differences(train: Mapping[int, str], val: Mapping[int, str], names: Sequence[str]) -> str | None:
    """In words, how the categories (id -> name) of two files differ; None if they are the same.

    Args:
        train: of the training set.
        val: of the validation set.
        names: of the two files.
    """
    if train == val:
        return None
    only = [
        f"only in {name}: " + ", ".join(f"{i} {one[i]!r}" for i in ids[:5])
        for name, one, other in ((names[0], train, val), (names[1], val, train))
        if (ids := [i for i in one if other.get(i) != one[i]])
    ]
    return "training and validation annotations have different categories; " + "; ".join(only)


def look_within(split: Split, num_queries: int | None, findings: Findings) -> None:
    """What concerns a whole set: classes, sizes, identical files, images with too many objects."""
    tables = split.tables
    images, counts = tables.images, tables.counts
    if num_queries is not None:
        full = np.flatnonzero(counts > num_queries).tolist()

        def full_words(at: int) -> Finding:
            words = f"image {images.ids[at]} has {counts[at]} objects, the detector {num_queries} queries"
            return tables.about_image(at, words)

        findings.add_each("many-objects", sorted(full, key=lambda at: -counts[at]), full_words)
    per_class = class_counts(tables)
    present = sorted((number, name) for name, number in per_class.items() if number)
    if present and present[-1][0] > IMBALANCE * present[0][0]:
        (few, rare), (many, frequent) = present[0], present[-1]
        findings.add("class-imbalance", f"{many} objects of {frequent!r}, {few} of {rare!r}", file=split.path.name)
    if len(images.ids):
        longer = images.sizes.max(axis=1)
        small, large = int(longer.argmin()), int(longer.argmax())
        if longer[large] >= SIZE_RATIO * longer[small]:
            words = " and ".join(f"image {images.ids[at]} of {_size_words(images.sizes[at])}" for at in (small, large))
            findings.add("sizes-vary", words, file=images.file_names[large], image_id=images.ids[large])
    seen: dict[bytes, int] = {}
    for at, facts in split.facts.items():
        first = seen.setdefault(facts.digest, at) if facts.digest and not facts.problem else at
        if first != at:
            words = f"images {images.ids[first]} and {images.ids[at]} have the same bytes"
            findings.add("image-twice", words, file=images.file_names[at], image_id=images.ids[at])


def look_between(splits: Mapping[str, Split], findings: Findings) -> None:
    """What concerns both sets: categories, classes that one of them lacks, images in both, files in neither."""
    per_class = {name: class_counts(split.tables) for name, split in splits.items()}
    if len(splits) == 2:
        train, val = splits["train"], splits["val"]
        names = (train.path.name, val.path.name)
        differences = category_differences(train.tables.categories, val.tables.categories, names)
        if differences:
            findings.add("categories-differ", differences)
        _look_for_leaks(train, val, findings)
        for one, other in (("train", "val"), ("val", "train")):
            for name, number in per_class[one].items():
                if number and not per_class[other].get(name):
                    findings.add(f"class-only-in-{one}", f"class {name!r} has {number} objects, all in {one}")
    for name in dict.fromkeys(name for counts in per_class.values() for name in counts):
        if not any(counts.get(name) for counts in per_class.values()):
            findings.add("class-unused", f"class {name!r} has no objects")
    named: dict[Path, list[str]] = {}
    for split in splits.values():
        named.setdefault(split.folder, []).extend(split.tables.images.file_names)
    for folder, files in named.items():
        others = [Finding("", str(folder / name), file=name) for name in unlisted_files(folder, files)]
        findings.add_each("file-unlisted", range(len(others)), others.__getitem__)


def class_counts(tables: Tables) -> dict[str, int]:
    """Class name -> number of objects, without crowd regions, in the order of the category ids."""
    ids, numbers = np.unique(tables.boxes.category_ids[~tables.boxes.crowd], return_counts=True)
    found = dict(zip(ids.tolist(), numbers.tolist(), strict=True))
    return {name: found.get(category_id, 0) for category_id, name in tables.categories.items()}


def _look_for_leaks(train: Split, val: Split, findings: Findings) -> None:
    ids = train.tables.images.ids
    by_place = {train.place(at): at for at in range(len(ids))}
    by_bytes = {one.digest: at for at, one in train.facts.items() if one.digest and not one.problem}
    for at, image_id in enumerate(val.tables.images.ids):
        name = val.tables.images.file_names[at]
        same_file = by_place.get(val.place(at))
        digest = val.facts[at].digest if at in val.facts else b""
        same_bytes = by_bytes.get(digest) if digest else None
        if same_file is not None:
            words = f"validation image {image_id} is training image {ids[same_file]}: {val.place(at)}"
        elif same_bytes is not None:
            words = (
                f"validation image {image_id} ({name}) has the same bytes as training image {ids[same_bytes]} "
                f"({train.tables.images.file_names[same_bytes]})"
            )
        else:
            continue
        findings.add("image-in-both", words, file=name, image_id=image_id)


def _size_words(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"
