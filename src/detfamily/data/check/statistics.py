"""What a set is made of, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detfamily.data.check.annotations import Tables
from detfamily.data.check.splits import class_counts


def statistics(tables: Tables, area_ranges: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Numbers of images, objects and classes, and how large they are.

    Args:
        tables: the annotation file.
        area_ranges: name -> (low, high) square pixels, as for the AP by size.

    Returns:
        Plain values, for json. Objects are without crowd regions.
    """
    counts, sizes = tables.counts, tables.images.sizes
    area = tables.boxes.area[~tables.boxes.crowd]
    fullest = int(counts.argmax()) if len(counts) else None
    return {
        "images": len(counts),
        "images_without_objects": int((counts == 0).sum()),
        "objects": int(counts.sum()),
        "crowd_regions": int(tables.boxes.crowd.sum()),
        "objects_per_image": {
            "mean": float(counts.mean()) if len(counts) else 0.0,
            "median": float(np.median(counts)) if len(counts) else 0.0,
            "most": int(counts.max(initial=0)),
            "image_with_most": None if fullest is None else tables.images.ids[fullest],
        },
        "objects_by_size": {
            name: int(((area >= low) & (area < high)).sum()) for name, (low, high) in area_ranges.items()
        },
        "image_sizes": _image_sizes(tables) if len(sizes) else {},
        "objects_by_class": class_counts(tables),
    }


def _image_sizes(tables: Tables) -> dict[str, Any]:
    """Smallest, median and largest width and height, and how many different sizes there are."""
    sizes = tables.images.sizes
    order = np.argsort(sizes.prod(axis=1), kind="stable")
    ranked = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
    found: dict[str, Any] = {
        name: {"width": int(sizes[at, 1]), "height": int(sizes[at, 0]), "image_id": tables.images.ids[at]}
        for name, at in ranked.items()
    }
    return {**found, "different": len(np.unique(sizes, axis=0))}
