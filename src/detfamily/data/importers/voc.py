"""Pascal VOC: ``Annotations/NAME.xml``, ``JPEGImages/NAME.jpg``, and lists of names in ``ImageSets/Main``.

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", 2010, and its development kit. Boxes there are
the first and the last pixel of an object, both inside it, counted from 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.parsers import expat

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
from detfamily.errors import DataError, nearest
from detfamily.tracking.console import ProgressBar

LISTS = ("train", "val", "trainval", "test")
ALL = "all"
"""Name of the only split where there are no lists."""

Corners = Literal["pixels", "edges"]
Difficult = Literal["ignore", "keep", "drop"]


@dataclass(frozen=True)
class VocSettings:
    """How to read the layout.

    Attributes:
        splits: lists of ``ImageSets/Main``; None takes those of train, val, trainval and test that are there, and all
            annotations where there are no lists.
        names: classes in the order of their category ids; None takes all that occur, sorted.
        boxes: "pixels", as VOC says: the first and the last pixel, counted from 1. "edges": coordinates of the
            borders, counted from 0, as some tools write them.
        difficult: what becomes of objects that are marked difficult: "ignore" (as VOC's evaluation does: neither
            learned nor counted), "keep" (as any other), or "drop".
    """

    splits: Sequence[str] | None = None
    names: Sequence[str] | None = None
    boxes: Corners = "pixels"
    difficult: Difficult = "ignore"


Listed = tuple[str, Path, int | None]
"""Name of an image, and the file and line that name it."""


@dataclass
class Element:
    """An element of an XML file: its name, line, text and inner elements. Attributes are of no use here."""

    name: str
    line: int
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, name: str) -> list[Element]:
        """The inner elements of a name, one level down."""
        return [child for child in self.children if child.name == name]

    def first(self, name: str) -> Element | None:
        """The first inner element of a name."""
        return next(iter(self.all(name)), None)


def read_voc(root: Path, settings: VocSettings) -> Imported:
    """Read a data set in VOC's layout.

    Raises:
        DataError: a folder is missing, or something in the files is wrong; names files and lines.
    """
    for name in ("Annotations", "JPEGImages"):
        if not (root / name).is_dir():
            raise DataError(
                f"{root} has no folder {name}: VOC's layout is Annotations/*.xml, JPEGImages/*.jpg and "
                "ImageSets/Main/*.txt"
            )
    problems = Problems()
    listed = _lists(root, settings.splits, problems)
    reader = _Reader(root, settings, problems)
    with ProgressBar("reading annotations", sum(len(names) for names in listed.values())) as bar:
        splits: dict[str, list[ImportedImage]] = {}
        for split, names in listed.items():
            splits[split] = []
            for name, source, line in names:
                if image := reader.image(name, source, line):
                    splits[split].append(image)
                bar.advance()
    problems.refuse()
    found = sorted({one.category for images in splits.values() for image in images for one in image.objects})
    names_in_order = found if settings.names is None else list(settings.names)
    if not names_in_order:
        raise DataError(f"{root / 'Annotations'} has no objects, so there are no classes")
    categories = {name: number for number, name in enumerate(names_in_order, start=1)}
    return Imported(root, splits, categories, reader.remarks())


def parse_xml(path: Path) -> Element:
    """The outermost element of an XML file.

    A document type is refused, and with it every entity: nothing outside the file is read, nothing grows.

    Raises:
        DataError: the file cannot be read or is not XML; names the line.
    """
    parser = expat.ParserCreate()
    parser.buffer_text = True
    outside = Element("", 0)
    stack = [outside]

    def start(name: str, attributes: dict[str, str]) -> None:
        element = Element(name, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def end(name: str) -> None:
        stack.pop()

    def text(words: str) -> None:
        stack[-1].text += words

    def refuse(*declaration: object) -> None:
        raise DataError(f"{path}:{parser.CurrentLineNumber}: a document type (<!DOCTYPE ...>) is refused; take it out")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = text, refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except expat.ExpatError as error:
        raise DataError(f"{path}:{error.lineno}: not XML: {expat.ErrorString(error.code)}") from None
    except (ValueError, LookupError) as error:
        raise DataError(f"{path}: an encoding that cannot be read: {error}") from None
    return outside.children[0]


def _lists(root: Path, splits: Sequence[str] | None, problems: Problems) -> dict[str, list[Listed]]:
    """The names of the images of each split."""
    folder = root / "ImageSets" / "Main"
    there = {path.stem for path in folder.glob("*.txt")}
    chosen = [name for name in LISTS if name in there] if splits is None else list(splits)
    for name in chosen:
        if name not in there:
            raise DataError(f"{folder / name}.txt does not exist; {nearest(name, there)}")
    if not chosen:
        if there:
            raise DataError(f"{folder} has none of {', '.join(LISTS)}: set voc.splits; {nearest('', there)}")
        files = files_below(root / "Annotations", [".xml"])
        return {ALL: [(_stem(path.relative_to(root / "Annotations")), path, None) for path in files]}
    return {name: list(_list(folder / f"{name}.txt", problems)) for name in chosen}


def _list(path: Path, problems: Problems) -> list[Listed]:
    """The lines of a list: a name, in lists of one class with -1, 0 or 1 behind it."""
    names: list[Listed] = []
    for number, line in enumerate((read_text(path, problems) or "").splitlines(), start=1):
        name = re.sub(r"\s+(-1|0|1)$", "", line.strip())
        if name:
            names.append((_stem(Path(name)) if Path(name).suffix.lower() in SUFFIXES else name, path, number))
    if not names:
        problems.add(path, None, "names no images")
    return names


def _stem(path: Path) -> str:
    return path.with_suffix("").as_posix()


class _Reader:
    """Reads one annotation after the other, and remembers what is worth a remark."""

    def __init__(self, root: Path, settings: VocSettings, problems: Problems) -> None:
        self.root, self.settings, self.problems = root, settings, problems
        folder = root / "JPEGImages"
        self.files = {_stem(path.relative_to(folder)): path for path in files_below(folder, SUFFIXES)}
        self.difficult = 0
        self.rotated: list[Path] = []
        self.at_zero: list[Path] = []

    def remarks(self) -> list[str]:
        becomes = {
            "ignore": "are ignored in evaluation and left out of training (iscrowd 1; voc.difficult=keep for ordinary)",
            "keep": "are kept as ordinary ones",
            "drop": "are left out",
        }
        found = [f"{self.difficult} difficult objects {becomes[self.settings.difficult]}"] * (self.difficult > 0)
        if self.at_zero:
            found.append(
                f"{len(self.at_zero)} boxes begin at 0 (first: {self.at_zero[0]}), though VOC counts pixels from 1: if "
                "the tool wrote the borders of objects, import with voc.boxes=edges"
            )
        return found + rotated_remark(self.rotated)

    def image(self, name: str, source: Path, line: int | None) -> ImportedImage | None:
        """An image with its objects; None if it has a problem."""
        path = self.root / "Annotations" / f"{name}.xml"
        if not path.is_file():
            self.problems.add(source, line, f"{path} does not exist")
            return None
        try:
            annotation = parse_xml(path)
        except DataError as error:
            self.problems.add_words(str(error))
            return None
        if annotation.name != "annotation":
            self.problems.add(path, annotation.line, f"is not <annotation>, but <{annotation.name}>")
            return None
        file = self._file(name, annotation)
        if file is None:
            self.problems.add(path, annotation.line, f"JPEGImages has no image of the name {name}")
            return None
        size = self._size(annotation, path, file)
        objects = [self._object(one, path) for one in annotation.all("object")]
        if size is None:
            return None
        return ImportedImage(file, *size, tuple(one for one in objects if one is not None))

    def _file(self, name: str, annotation: Element) -> Path | None:
        """The image of the same name, else the one that the annotation names."""
        named = annotation.first("filename")
        inside = self.root / "JPEGImages" / Path(named.text.strip()).name if named and named.text.strip() else None
        return self.files.get(name) or (inside if inside and inside.is_file() else None)

    def _size(self, annotation: Element, path: Path, file: Path) -> tuple[int, int] | None:
        """Width and height: from the annotation, or from the image where it has none (some tools write 0)."""
        size = annotation.first("size")
        sides = [self._number(size, key, path) if size and size.first(key) else 0 for key in ("width", "height")]
        if None in sides:
            return None
        width, height = (int(side or 0) for side in sides)
        if width > 0 and height > 0:
            return width, height
        stored = image_size(file, self.problems)
        if stored is None:
            return None
        if stored[2]:
            self.rotated.append(file)
        return stored[0], stored[1]

    def _object(self, element: Element, path: Path) -> ImportedObject | None:
        """An object; None if it has a problem or is not wanted."""
        name = element.first("name")
        category = name.text.strip() if name else ""
        if not category:
            self.problems.add(path, element.line, "an object without a name")
            return None
        known = self.settings.names
        if known is not None and category not in known:
            line = name.line if name else element.line
            self.problems.add(path, line, f"the class {category!r} is not in voc.names; {nearest(category, known)}")
            return None
        xywh = self._box(element, path)
        flags = {key: self._flag(element, key, path) for key in ("difficult", "truncated")}
        if xywh is None or None in flags.values():
            return None
        self.difficult += bool(flags["difficult"])
        if flags["difficult"] and self.settings.difficult == "drop":
            return None
        ignored = bool(flags["difficult"]) and self.settings.difficult == "ignore"
        return ImportedObject(category, xywh, ignored, {key: int(value or 0) for key, value in flags.items()})

    def _box(self, element: Element, path: Path) -> tuple[float, float, float, float] | None:
        box = element.first("bndbox")
        if box is None:
            self.problems.add(path, element.line, "an object without <bndbox>")
            return None
        corners = [self._number(box, key, path) for key in ("xmin", "ymin", "xmax", "ymax")]
        if None in corners:
            return None
        x1, y1, x2, y2 = (float(one or 0) for one in corners)
        if x1 > x2 or y1 > y2:
            words = f"the box has its ends the wrong way round: x from {x1:g} to {x2:g}, y from {y1:g} to {y2:g}"
            self.problems.add(path, box.line, words)
            return None
        if self.settings.boxes == "edges":
            return x1, y1, x2 - x1, y2 - y1
        if min(x1, y1) < 1:
            self.at_zero.append(path)
        return x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1

    def _number(self, element: Element, key: str, path: Path) -> float | None:
        child = element.first(key)
        if child is None:
            self.problems.add(path, element.line, f"<{element.name}> has no <{key}>")
            return None
        try:
            value = float(child.text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            self.problems.add(path, child.line, f"<{key}> is {child.text.strip()!r}, expected a number")
            return None
        return value

    def _flag(self, element: Element, key: str, path: Path) -> bool | None:
        """A mark of an object; VOC leaves it away or writes "Unspecified" where nobody looked."""
        child = element.first(key)
        word = child.text.strip().lower() if child else ""
        if word in ("", "0", "false", "unspecified"):
            return False
        if word in ("1", "true"):
            return True
        assert child is not None
        self.problems.add(path, child.line, f"<{key}> is {child.text.strip()!r}, expected 0 or 1")
        return None
