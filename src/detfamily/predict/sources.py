"""Which image files a source means: an image, a folder, or a pattern."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from detfamily.errors import DataError, nearest

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .avif .bmp .dib .gif .tif .tiff .jp2 .j2k .ppm .pgm .pbm .pnm .tga".split()
)
"""What counts as an image in a folder; a file that is named, or matches a pattern, is tried whatever its suffix."""


@dataclass(frozen=True)
class Source:
    """The image files that were found.

    Attributes:
        root: the folder that their names start in.
        names: their paths inside the root, in order.
    """

    root: Path
    names: tuple[Path, ...]

    @property
    def paths(self) -> list[Path]:
        return [self.root / name for name in self.names]


def find_images(source: str | Path, leave_out: Path | None = None) -> Source:
    """Find the images of a source.

    Args:
        source: an image file, whatever its name; a folder, whose images are taken by the suffixes of their names, with
            those of its subfolders and without hidden ones; or a pattern with ``*``, ``?``, ``[...]`` and ``**``.
        leave_out: a folder whose files do not count: where the results go.

    Raises:
        DataError: nothing is there; names what is nearby.
    """
    text = str(source)
    if not text.strip():
        raise DataError("the source is empty: give an image, a folder of images, or a pattern as in 'photos/*.jpg'")
    path = Path(text).expanduser()
    try:
        if path.is_file():
            return Source(path.parent, (Path(path.name),))
        root, found = _in_folder(path) if path.is_dir() else _matching(path)
        away = None if leave_out is None else leave_out.resolve()
        files = {one for one in found if one.is_file() and not (away and one.resolve().is_relative_to(away))}
        if not files:
            raise DataError(f"{text} holds no image: {_listing(root)}")
    except OSError as error:
        raise DataError(f"cannot look for {text}: {error.strerror}") from None
    return Source(root, tuple(one.relative_to(root) for one in sorted(files)))


def _in_folder(folder: Path) -> tuple[Path, list[Path]]:
    names = [one.relative_to(folder) for one in folder.rglob("*") if one.suffix.lower() in SUFFIXES]
    return folder, [folder / name for name in names if not any(part.startswith(".") for part in name.parts)]


def _matching(pattern: Path) -> tuple[Path, list[Path]]:
    """The folder above the first part that has signs in it, and what matches."""
    parts = pattern.parts
    signs = [index for index, part in enumerate(parts) if any(sign in part for sign in "*?[")]
    if not signs:
        raise DataError(f"there is no image or folder {pattern}; {_nearby(pattern)}")
    found = [Path(one) for one in glob.glob(str(pattern), recursive=True)]
    if not found:
        raise DataError(f"nothing matches {pattern}; {_nearby(Path(*parts[: signs[0] + 1]))}")
    return Path(*parts[: signs[0]]), found


def _nearby(path: Path) -> str:
    """What lies where a path leads, as far as it exists."""
    folder = next(one for one in (path.parent, *path.parent.parents) if one.is_dir())
    return _listing(folder, path.relative_to(folder).parts[0])


def _listing(folder: Path, wanted: str = "") -> str:
    there = [one.name for one in folder.iterdir() if not one.name.startswith(".")]
    return f"in {folder.resolve()}: {nearest(wanted, there)}" if there else f"{folder.resolve()} is empty"
