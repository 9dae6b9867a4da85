"""Which pixels show an object: masks, and the outlines by which annotation files say it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from detfamily.structures import Size

LEAST_NUMBERS = 6
"""Of a polygon: three corners. COCO has a few shorter ones, which enclose nothing."""


def boxes_around(masks: Tensor) -> Tensor:
    """(n, H, W) bool to (n, 4) float32 x1, y1, x2, y2: the outer edges of the pixels of each mask; 0 around none."""
    bytes_ = masks.view(torch.uint8)  # amax of bytes is many times faster than any of bools
    ends = [_first_and_end(bytes_.amax(dim=axis)) for axis in (1, 2)]
    return torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], dim=1).float()


def _first_and_end(marked: Tensor) -> tuple[Tensor, Tensor]:
    """(n, L) of 0 and 1 to the first 1 of each row, and where the last one ends; 0 and 0 without any."""
    first, from_end = marked.argmax(dim=1), marked.flip(1).argmax(dim=1)
    return first, (marked.shape[1] - from_end) * marked.amax(dim=1)


def rectangles(boxes: Tensor, size: Size) -> Tensor:
    """(n, 4) x1, y1, x2, y2 in pixels to (n, H, W) bool: all pixels that a box touches."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    rows, columns = torch.arange(size[0]), torch.arange(size[1])
    inside_y, inside_x = (rows < y2) & (rows + 1 > y1), (columns < x2) & (columns + 1 > x1)
    return inside_y[:, :, None] & inside_x[:, None]


@dataclass(frozen=True)
class Outlines:
    """The segmentations of M objects, as polygons or run lengths, in a few arrays.

    Lists of lists would be millions of Python objects, which every worker process ends up copying.

    Attributes:
        points: (V,) float32 x, y, x, y, ... of all polygons, in pixels.
        polygon_starts: (P + 1,) polygon p has the points polygon_starts[p] .. polygon_starts[p + 1].
        polygons_of: (M + 1,) object m has the polygons polygons_of[m] .. polygons_of[m + 1].
        runs: (R,) uint8 run lengths in COCO's compressed form.
        runs_of: (M + 1,) object m has the bytes runs_of[m] .. runs_of[m + 1]; only objects without polygons have any.
    """

    points: NDArray[np.float32]
    polygon_starts: NDArray[np.int64]
    polygons_of: NDArray[np.int64]
    runs: NDArray[np.uint8]
    runs_of: NDArray[np.int64]

    @classmethod
    def pack(cls, segmentations: Iterable[Any], sizes: Iterable[Sequence[int]]) -> Outlines:
        """Convert COCO's 'segmentation' of each object.

        Args:
            segmentations: polygons [[x, y, ...], ...], run lengths {"size": [h, w], "counts": list or text}; None or an
                empty list for an object that has none.
            sizes: (height, width) of the image of each object.

        Raises:
            ValueError: what is wrong with one of them; ``args[1]`` says with which.
        """
        points, starts, polygons_of, runs, runs_of = array("f"), [0], [0], bytearray(), [0]
        for at, (one, size) in enumerate(zip(segmentations, sizes, strict=True)):
            try:
                if isinstance(one, Mapping):
                    runs += _compressed(one, tuple(size))
                else:
                    for polygon in _checked_polygons(one):
                        points.extend(polygon)
                        starts.append(len(points))
            except (ValueError, TypeError) as error:
                raise ValueError(str(error), at) from None
            polygons_of.append(len(starts) - 1)
            runs_of.append(len(runs))
        return cls(
            np.array(points, dtype=np.float32),
            np.array(starts, dtype=np.int64),
            np.array(polygons_of, dtype=np.int64),
            np.frombuffer(bytes(runs), dtype=np.uint8),
            np.array(runs_of, dtype=np.int64),
        )

    @property
    def known(self) -> int:
        """Number of objects that have an outline."""
        return int(((np.diff(self.polygons_of) > 0) | (np.diff(self.runs_of) > 0)).sum())

    def masks(self, objects: range, boxes: Tensor, size: Size) -> Tensor:
        """The masks of some objects of one image; an object without an outline is its box.

        Args:
            objects: which.
            boxes: (n, 4) x1, y1, x2, y2 of these.
            size: (height, width) of the image.

        Returns:
            (n, H, W) bool.
        """
        runs = {at: found for at, one in enumerate(objects) if (found := self._runs(one, size)) is not None}
        if not runs:
            return rectangles(boxes, size)
        decoded = torch.from_numpy(coco_mask.decode(list(runs.values()))).permute(2, 0, 1).view(torch.bool)
        if len(runs) == len(boxes):
            return decoded
        masks = rectangles(boxes, size)
        masks[list(runs)] = decoded
        return masks

    def _runs(self, at: int, size: Size) -> dict[str, Any] | None:
        counts = self.runs[self.runs_of[at] : self.runs_of[at + 1]]
        if len(counts):
            return {"size": list(size), "counts": counts.tobytes()}
        first, last = self.polygons_of[at], self.polygons_of[at + 1]
        polygons = [
            self.points[self.polygon_starts[p] : self.polygon_starts[p + 1]].tolist() for p in range(first, last)
        ]
        return coco_mask.merge(coco_mask.frPyObjects(polygons, *size)) if polygons else None


def _checked_polygons(polygons: Any) -> list[list[float]]:
    if polygons is None:
        return []
    if not isinstance(polygons, list) or not all(isinstance(one, list) for one in polygons):
        raise ValueError(f"expected polygons [[x, y, x, y, ...], ...] or run lengths, not {_shortened(polygons)}")
    for one in polygons:
        if len(one) % 2 or not np.isfinite(one).all():
            raise ValueError(f"expected x, y, x, y, ... in pixels for a polygon, not {_shortened(one)}")
    return [one for one in polygons if len(one) >= LEAST_NUMBERS]


def _compressed(runs: Mapping[str, Any], size: tuple[int, ...]) -> bytes:
    """COCO's compressed text of run lengths in either form; they go down the columns of an image of that size."""
    counts, own_size = runs.get("counts"), runs.get("size")
    if not isinstance(own_size, list) or tuple(own_size) != size:
        raise ValueError(f"expected run lengths of the image's 'size' {list(size)} (height, width), not {own_size}")
    if isinstance(counts, str):
        return counts.encode()
    if not isinstance(counts, list) or sum(counts) != size[0] * size[1]:
        raise ValueError(f"expected 'counts' of all {size[0] * size[1]} pixels, not {_shortened(counts)}")
    compressed: bytes = coco_mask.frPyObjects(dict(runs), *size)["counts"]
    return compressed


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
