from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from detfamily.data.masks import Outlines, boxes_around, rectangles

SIZE = (30, 40)


def disc(cy: float, cx: float, radius: float) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    return (rows - cy) ** 2 + (columns - cx) ** 2 <= radius**2


def text_runs(mask: Tensor) -> dict[str, Any]:
    runs = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": runs["size"], "counts": runs["counts"].decode()}


def plain_runs(mask: Tensor) -> dict[str, Any]:
    """Run lengths as the format says: down the columns, beginning with the zeros."""
    flat = mask.T.flatten().tolist()
    counts, value = [0], False
    for one in flat:
        if one != value:
            counts.append(0)
            value = one
        counts[-1] += 1
    return {"size": list(SIZE), "counts": counts}


def test_boxes_around_masks() -> None:
    masks = torch.stack([disc(10, 20, 6), disc(0, 39, 5), disc(29, 0, 0), torch.zeros(SIZE, dtype=torch.bool)])
    expected = []
    for mask in masks[:3]:
        rows, columns = np.nonzero(mask.numpy())
        expected.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert boxes_around(masks).tolist() == [*expected, [0, 0, 0, 0]]
    assert boxes_around(masks.transpose(1, 2))[:, [1, 0, 3, 2]].tolist() == [*expected, [0, 0, 0, 0]]
    assert boxes_around(masks[:0]).shape == (0, 4)


def test_rectangles_are_the_pixels_that_a_box_touches() -> None:
    boxes = torch.tensor([[2.0, 3, 7, 5], [2.5, 3.9, 7.1, 5.0], [-4, 28, 2, 99], [1, 1, 1, 1]])
    masks = rectangles(boxes, SIZE)
    assert boxes_around(masks).tolist() == [[2, 3, 7, 5], [2, 3, 8, 5], [0, 28, 2, 30], [0, 0, 0, 0]]
    assert masks.flatten(1).sum(1).tolist() == [10, 12, 4, 0]


def test_outlines_give_the_pixels_of_pycocotools() -> None:
    corners = [4.0, 3.0, 20.5, 3.0, 25.0, 17.25, 9.0, 28.0]
    other = [30.0, 2.0, 38.0, 2.0, 38.0, 9.0]
    masks = [disc(12, 22, 9), disc(20, 8, 7)]
    segmentations = [[corners], text_runs(masks[0]), None, [corners, other], plain_runs(masks[1]), [[1, 2, 3, 4]]]
    boxes = torch.tensor([[0.0, 0, 9, 9]] * 6)
    outlines = Outlines.pack(segmentations, [SIZE] * 6)
    assert outlines.known == 4
    found = outlines.masks(range(6), boxes, SIZE)
    polygon, two = (
        torch.from_numpy(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *SIZE)))).bool()
        for polygons in ([corners], [corners, other])
    )
    rectangle = rectangles(boxes[:1], SIZE)[0]
    assert torch.equal(found, torch.stack([polygon, masks[0], rectangle, two, masks[1], rectangle]))
    assert polygon.sum() > 300 and two.sum() > polygon.sum()
    assert torch.equal(outlines.masks(range(3, 5), boxes[3:5], SIZE), found[3:5])
    assert outlines.masks(range(0), boxes[:0], SIZE).shape == (0, *SIZE)


@pytest.mark.parametrize(
    ("segmentation", "word"),
    [
        ("17", "expected polygons"),
        ([1, 2, 3, 4, 5, 6], "expected polygons"),
        ([[1, 2, 3, 4, 5, 6, 7]], "expected x, y, x, y"),
        ([[1, 2, 3, 4, 5, float("nan")]], "expected x, y, x, y"),
        ([[1, 2, 3, 4, 5, "6"]], "number|supported|string|isfinite"),
        ({"size": [40, 30], "counts": [1200]}, r"the image's 'size' \[30, 40\]"),
        ({"size": [30, 40], "counts": [7, 8]}, "all 1200 pixels"),
        ({"size": [30, 40]}, "all 1200 pixels"),
    ],
)
def test_what_is_no_segmentation_is_named(segmentation: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        Outlines.pack([None, segmentation], [SIZE, SIZE])
    assert caught.value.args[1] == 1
