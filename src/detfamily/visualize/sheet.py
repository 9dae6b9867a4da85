"""One picture of several, to see them at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from detfamily.files import write_atomically

_WIDTH = 900
_GAP = 12


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Put pictures into columns, each as soon as one is free; wide ones are made smaller.

    Args:
        pictures: at least one.
        columns: of at most 900 pixels.

    Raises:
        ValueError: there are no pictures.
    """
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    small = [_at_most(picture, _WIDTH) for picture in pictures]
    width = max(picture.width for picture in small)
    columns = min(columns, len(small))
    heights = [0] * columns
    places = []
    for picture in small:
        column = heights.index(min(heights))
        places.append((column * (width + _GAP), heights[column]))
        heights[column] += picture.height + _GAP
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, max(heights) - _GAP), (255, 255, 255))
    for picture, place in zip(small, places, strict=True):
        sheet.paste(picture, place)
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG or a JPEG, as the name says, whole or not at all."""
    kind = "JPEG" if path.suffix == ".jpg" else "PNG"
    write_atomically(path, lambda file: picture.save(file, format=kind, quality=90))


def _at_most(picture: Image.Image, width: int) -> Image.Image:
    if picture.width <= width:
        return picture
    size = (width, max(1, round(picture.height * width / picture.width)))
    return picture.resize(size, Image.Resampling.LANCZOS)
