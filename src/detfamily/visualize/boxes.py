"""Pictures of boxes: one image with its boxes, and predictions beside ground truth. No display is needed."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detfamily.files import write_atomically
from detfamily.structures import Detections

Names = Sequence[str | None] | Mapping[int, str]
"""Class name of each label; a label without one is shown by its number."""

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PAPER: Color = (255, 255, 255)
_INK: Color = (0, 0, 0)
_GAP = 8
_GAP_OF_PAIRS = 32
_PANEL_SIDES = (384, 800)


def label_color(label: int) -> Color:
    """The color of a class: always the same, and far from those of the labels around it."""
    hue = label * 0.618034 % 1.0  # the golden ratio spreads any number of hues evenly
    saturation, value = ((0.95, 1.0), (0.6, 1.0), (0.9, 0.8))[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: Tensor,
    boxes_xyxy: Tensor,
    labels: Tensor,
    names: Names,
    scores: Tensor | None = None,
    sides: tuple[int, int] = (384, 4096),
) -> Image.Image:
    """Draw boxes with class names, and scores where there are any, on a copy of one image.

    Args:
        image: (3, H, W) uint8 RGB.
        boxes_xyxy: (N, 4) pixels of this image.
        labels: (N,) integers.
        names: class name of each label.
        scores: (N,) or None. Boxes of higher scores are drawn over those of lower ones.
        sides: least and greatest longer side of the picture; the image is scaled when it lies outside.

    Raises:
        ValueError: the image is not uint8 of three channels, the numbers of boxes, labels and scores differ, or a box
            is not finite.
    """
    _check(image, boxes_xyxy, labels, scores)
    picture = Image.fromarray(image.detach().cpu().permute(1, 2, 0).contiguous().numpy())
    longer = max(picture.size)
    scale = min(max(longer, sides[0]), sides[1]) / longer
    if scale != 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    _draw_all(picture, _marks(boxes_xyxy.detach().cpu().double() * scale, labels, names, scores, picture.size))
    return picture


def _check(image: Tensor, boxes_xyxy: Tensor, labels: Tensor, scores: Tensor | None) -> None:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be (3, H, W) uint8, got {tuple(image.shape)} {image.dtype}")
    count = labels.shape[0]
    if tuple(boxes_xyxy.shape) != (count, 4) or (scores is not None and scores.shape[0] != count):
        also = "" if scores is None else f" and {scores.shape[0]} scores"
        raise ValueError(f"{count} labels with boxes of shape {tuple(boxes_xyxy.shape)}{also}: the numbers differ")
    if not torch.isfinite(boxes_xyxy).all():
        raise ValueError("boxes_xyxy holds NaN or infinity")


@dataclass(frozen=True)
class _Mark:
    corners: Rectangle
    color: Color
    text: str


def _marks(
    boxes_xyxy: Tensor, labels: Tensor, names: Names, scores: Tensor | None, size: tuple[int, int]
) -> list[_Mark]:
    """Best first; corners inside the picture and in order, as the drawing needs them."""
    limits = torch.tensor([size[0] - 1, size[1] - 1], dtype=torch.float64)
    first = torch.minimum(boxes_xyxy[:, :2].clamp(min=0), limits)
    last = torch.maximum(torch.minimum(boxes_xyxy[:, 2:], limits), first)
    corners = torch.cat([first, last], dim=1).tolist()
    values = None if scores is None else scores.detach().cpu().tolist()
    order = range(len(corners)) if values is None else sorted(range(len(corners)), key=lambda row: -values[row])
    marks = []
    for row in order:
        label = int(labels[row])
        text = _name(names, label) if values is None else f"{_name(names, label)} {values[row]:.2f}"
        marks.append(_Mark(tuple(corners[row]), label_color(label), text))
    return marks


def _name(names: Names, label: int) -> str:
    named = names if isinstance(names, Mapping) else dict(enumerate(names))
    return named.get(label) or str(label)


def _draw_all(picture: Image.Image, marks: Sequence[_Mark]) -> None:
    draw = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 300))
    font = _font(max(picture.size))
    for mark in reversed(marks):
        x1, y1, x2, y2 = mark.corners
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_INK, width=width + 2)  # seen on any background
        draw.rectangle(mark.corners, outline=mark.color, width=width)
    taken: list[Rectangle] = []
    for mark in marks:
        text = _fitted(draw, mark.text, font, picture.width - 4)
        place = _free_place(mark.corners, _text_size(draw, text, font), picture.size, taken)
        taken.append(place)
        draw.rectangle(place, fill=mark.color)
        draw.text(((place[0] + place[2]) / 2, (place[1] + place[3]) / 2), text, _on(mark.color), font, anchor="mm")


def _font(longer_side: int) -> _Font:
    return ImageFont.load_default(max(11, round(longer_side / 50)))


def _on(color: Color) -> Color:
    """Black or white, whichever reads better on the color."""
    red, green, blue = color
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else _PAPER


def _text_size(draw: ImageDraw.ImageDraw, text: str, font: _Font) -> tuple[float, float]:
    _, top, _, bottom = draw.textbbox((0, 0), "Ag" + text, font=font)  # all labels equally high
    return draw.textlength(text, font=font) + 4, bottom - top + 2


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: float) -> str:
    """The text, or as much of its beginning as fits."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def _free_place(
    corners: Rectangle, size: tuple[float, float], picture: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Where a label of this size goes: at its box, inside the picture, and off the other labels if there is room."""
    x1, y1, x2, y2 = corners
    width, height = size
    wanted = [(x1, y1 - height), (x1, y1), (x2 - width, y1 - height), (x1, y2), (x1, y2 - height), (x2 - width, y2)]
    places = []
    for x, y in wanted:
        x = max(0.0, min(x, picture[0] - 1 - width))
        y = max(0.0, min(y, picture[1] - 1 - height))
        places.append((x, y, x + width, y + height))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(one: Rectangle, other: Rectangle) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def draw_comparison(
    images: Sequence[Tensor],
    truths: Sequence[tuple[Tensor, Tensor]],
    detections: Sequence[Detections],
    names: Names,
    path: Path,
    score_threshold: float = 0.3,
    columns: int = 2,
) -> None:
    """Write a PNG of several images, each twice: ground truth on the left, predictions on the right.

    Small images are enlarged and large ones reduced, so that names and scores can be read.

    Args:
        images: (3, H, W) uint8 each, of any size.
        truths: boxes_xyxy (n, 4) in pixels of the image, and labels (n,), for each image.
        detections: what was found in each image, in its pixels.
        names: class name of each label.
        path: the file to write; it appears whole or not at all.
        score_threshold: predictions below are left out.
        columns: pairs side by side.

    Raises:
        ValueError: no images, not as many truths or detections as images, columns below 1, or see ``draw_boxes``.
    """
    if not images or not len(images) == len(truths) == len(detections):
        raise ValueError(
            f"need as many truths and detections as images, and at least one: got {len(images)} images, "
            f"{len(truths)} truths, detections of {len(detections)}"
        )
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    pairs = [
        _pair(image, truth, found, names, score_threshold)
        for image, truth, found in zip(images, truths, detections, strict=True)
    ]
    picture = _tile(pairs, columns, _GAP_OF_PAIRS)
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


def _pair(
    image: Tensor, truth: tuple[Tensor, Tensor], found: Detections, names: Names, score_threshold: float
) -> Image.Image:
    shown = found.scores >= score_threshold
    count = int(shown.sum())
    title = f"{count} predictions, score >= {score_threshold:g}"
    if count == 0:
        best = f", best {float(found.scores.max()):.2f}" if found.scores.numel() else ""
        title = f"no prediction with score >= {score_threshold:g}{best}"
    left = draw_boxes(image, truth[0], truth[1], names, sides=_PANEL_SIDES)
    right = draw_boxes(
        image, found.boxes_xyxy[shown], found.labels[shown], names, found.scores[shown], sides=_PANEL_SIDES
    )
    return _tile([_titled(left, f"ground truth: {truth[1].shape[0]}"), _titled(right, title)], 2, _GAP)


def _titled(picture: Image.Image, title: str) -> Image.Image:
    font = _font(_PANEL_SIDES[1])
    height = 24
    whole = Image.new("RGB", (picture.width, picture.height + height), _PAPER)
    whole.paste(picture, (0, height))
    draw = ImageDraw.Draw(whole)
    draw.text((2, height / 2), _fitted(draw, title, font, picture.width - 4), _INK, font, anchor="lm")
    return whole


def _tile(pictures: Sequence[Image.Image], columns: int, gap: int) -> Image.Image:
    """Side by side, row after row; columns as wide and rows as high as the largest picture in them."""
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    widths = [max(one.width for one in pictures[column::columns]) for column in range(min(columns, len(pictures)))]
    heights = [max(one.height for one in row) for row in rows]
    size = (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1))
    whole = Image.new("RGB", size, _PAPER)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        whole.paste(picture, (sum(widths[:column]) + gap * column, sum(heights[:row]) + gap * row))
    return whole
