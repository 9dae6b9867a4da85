"""YOLO: a text file of normalised boxes for each image, and a YAML file that says where images and class names are.

A line is ``class cx cy w h``, or ``class x1 y1 x2 y2 ...`` for a polygon, all but the class relative to the image. The
labels of ``.../images/a/b.jpg`` are in ``.../labels/a/b.txt``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from detfamily.data.check.files import SUFFIXES
from detfamily.data.importers.imported import (
    Imported,
    ImportedImage,
    ImportedObject,
    Problems,
    files_below,
    image_size,
    read_text,
    rotated_remark,
)
from detfamily.errors import DataError
from detfamily.tracking.console import ProgressBar

SPLITS = ("train", "val", "test")
SLACK = 0.01
"""By how much a coordinate may leave 0..1: writers round."""


def read_yolo(root: Path) -> Imported:
    """Read a data set in YOLO's layout.

    Args:
        root: its folder with one YAML file (or ``data.yaml`` among others), or the YAML file.

    Raises:
        DataError: a file or folder is missing, or something in the files is wrong; names files and lines.
    """
    file = _yaml_file(root)
    settings = _read_yaml(file)
    names = _names(settings, file)
    base = _base(settings, file)
    problems = Problems()
    listed = {
        split: _images(settings[split], split, base, file, problems)
        for split in SPLITS
        if settings.get(split) is not None
    }
    if not listed:
        raise DataError(f"{file} names no images: it needs train and val, each a folder, a list file, or several")
    reader = _Reader(names, problems)
    with ProgressBar("reading labels", sum(map(len, listed.values()))) as bar:
        splits: dict[str, list[ImportedImage]] = {}
        for split, paths in listed.items():
            splits[split] = []
            for path in paths:
                if image := reader.image(path):
                    splits[split].append(image)
                bar.advance()
    problems.refuse()
    if not reader.used:
        folder = labels_of(next(path for paths in listed.values() for path in paths)).parent
        raise DataError(f"no image has a label file; the first would be in {folder}")
    return Imported(base, splits, {name: number for number, name in names.items()}, reader.remarks())


def labels_of(image: Path) -> Path:
    """Where the labels of an image lie: ``images`` in its path becomes ``labels``, the last one if there are two."""
    parts = list(image.parts)
    for at in range(len(parts) - 2, -1, -1):
        if parts[at] == "images":
            parts[at] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


# -- the YAML file ----------------------------------------------------------------------------------------------------


def _yaml_file(root: Path) -> Path:
    if root.is_file():
        return root
    found = sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    preferred = [path for path in found if path.stem == "data"]
    chosen = preferred or found
    if len(chosen) != 1:
        what = f"has several: {', '.join(path.name for path in found)}" if found else "has none"
        raise DataError(f"YOLO's layout has a YAML file with names, train and val; {root} {what}. Give it as root=...")
    return chosen[0]


def _read_yaml(file: Path) -> dict[str, Any]:
    problems = Problems()
    text = read_text(file, problems)
    problems.refuse()
    try:
        content = yaml.safe_load(text or "")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise DataError(f"{file}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}; expected names, train and val")
    return content


def _names(settings: Mapping[str, Any], file: Path) -> dict[int, str]:
    """Class number -> name, from a list or a map."""
    given = settings.get("names")
    pairs: list[tuple[Any, Any]] = list(enumerate(given)) if isinstance(given, list) else []
    pairs += given.items() if isinstance(given, dict) else []
    if not pairs:
        raise DataError(f"{file} has no class names: 'names' must be a list, or a map from numbers to names")
    names: dict[int, str] = {}
    for number, name in pairs:
        if isinstance(number, str) and number.isdigit():
            number = int(number)
        if type(number) is not int or number < 0:
            raise DataError(f"{file}: the class number {number!r} in 'names' is not a whole number of 0 or more")
        if name is None or isinstance(name, (dict, list)) or not str(name).strip():
            raise DataError(f"{file}: class {number} has the name {name!r}, expected text")
        if str(name) in names.values():
            raise DataError(f"{file}: the class name {str(name)!r} occurs twice")
        names[number] = str(name)
    count = settings.get("nc")
    if isinstance(count, int) and count != len(names):
        raise DataError(f"{file}: nc is {count}, but there are {len(names)} names")
    return names


def _base(settings: Mapping[str, Any], file: Path) -> Path:
    """The folder that the places in the YAML file start from: its ``path`` where that exists, else its own folder.

    These files travel with a ``path`` of the machine that wrote them.
    """
    own = file.absolute().parent
    given = settings.get("path")
    named = own / str(given) if given else own
    return Path(named.resolve()) if named.is_dir() else own


def _images(entry: Any, split: str, base: Path, file: Path, problems: Problems) -> list[Path]:
    """The images of a split: those of a folder, of a list file, or of several of them."""
    paths: list[Path] = []
    for place in entry if isinstance(entry, list) else [entry]:
        found = _existing(str(place), base, file.absolute().parent)
        if found is None:
            problems.add(file, None, f"{split} names {str(place)!r}, which is not in {base}")
        elif found.is_dir():
            images = files_below(found, SUFFIXES)
            paths += images
            if not images:
                problems.add(found, None, "has no images")
        else:
            paths += _listed(found, base, problems)
    return paths


def _existing(place: str, *folders: Path) -> Path | None:
    """A place in the first folder that has it; also without a leading ``../``, which some exporters write too much."""
    tries = [place, *([place[3:]] if place.startswith("../") else [])]
    found = (folder / one for one in tries for folder in folders)
    existing = next((path for path in found if path.exists()), None)
    return None if existing is None else Path(existing.resolve()) if ".." in existing.parts else existing


def _listed(path: Path, base: Path, problems: Problems) -> list[Path]:
    images = []
    for number, line in enumerate((read_text(path, problems) or "").splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        image = _existing(name, *((path.parent, base) if name.startswith("./") else (base, path.parent)))
        if image is None:
            problems.add(path, number, f"{name} does not exist")
        else:
            images.append(image)
    if not images:
        problems.add(path, None, "names no images")
    return images


# -- labels -----------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads the labels of one image after the other, and remembers what is worth a remark."""

    def __init__(self, names: Mapping[int, str], problems: Problems) -> None:
        self.names, self.problems = names, problems
        self.used: set[Path] = set()
        self.without: list[Path] = []
        self.polygons: list[Path] = []
        self.rotated: list[Path] = []

    def remarks(self) -> list[str]:
        found = []
        if self.without:
            found.append(f"{len(self.without)} images have no label file (first: {self.without[0]}): no objects")
        if self.polygons:
            found.append(f"{len(self.polygons)} polygons became the boxes around them (first: {self.polygons[0]})")
        folders = {path.parent for path in self.used}
        others = sorted({path for folder in folders for path in folder.glob("*.txt")} - self.used)
        others = [path for path in others if path.name != "classes.txt"]
        if others:
            found.append(f"{len(others)} label files have no image (first: {others[0]})")
        return found + rotated_remark(self.rotated)

    def image(self, path: Path) -> ImportedImage | None:
        """An image with its objects; None if it has a problem."""
        stored = image_size(path, self.problems)
        if stored is None:
            return None
        width, height, rotated = stored
        if rotated:
            self.rotated.append(path)
        labels = labels_of(path)
        if not labels.is_file():
            self.without.append(path)
            return ImportedImage(path, width, height, ())
        self.used.add(labels)
        objects = []
        for number, line in enumerate((read_text(labels, self.problems) or "").splitlines(), start=1):
            words = line.split()
            one = self._object(words, labels, number, width, height) if words else None
            objects += [one] if one else []
        return ImportedImage(path, width, height, tuple(objects))

    def _object(self, words: list[str], path: Path, line: int, width: int, height: int) -> ImportedObject | None:
        try:
            number, *values = (float(word) for word in words)
        except ValueError:
            self.problems.add(path, line, f"expected numbers, not {' '.join(words)!r}")
            return None
        if number not in self.names:
            known = f"{min(self.names)} .. {max(self.names)}"
            self.problems.add(path, line, f"the class {words[0]} has no name; known are {known}")
            return None
        polygon = len(values) >= 6 and len(values) % 2 == 0
        if len(values) != 4 and not polygon:
            expected = "expected class cx cy w h, or a class and the corners of a polygon"
            self.problems.add(path, line, f"{len(words)} numbers; {expected}")
            return None
        wrong = [value for value in values if not -SLACK <= value <= 1 + SLACK]
        if wrong:
            self.problems.add(path, line, f"{wrong[0]:g} is not between 0 and 1: coordinates are relative to the image")
            return None
        if polygon:
            self.polygons.append(path)
            x1, x2, y1, y2 = min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2])
        else:
            cx, cy, w, h = values
            if w < 0 or h < 0:
                self.problems.add(path, line, f"the box has a negative width or height: {w:g} x {h:g}")
                return None
            x1, x2, y1, y2 = cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2
        xywh = (x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height)
        return ImportedObject(self.names[int(number)], tuple(round(one, 3) for one in xywh))  # type: ignore[arg-type]
