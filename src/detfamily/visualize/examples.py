"""What a detector looks at while it is trained: the same few images, every so many epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from detfamily.data.batches import collate
from detfamily.data.large_scale_jitter import on_canvas
from detfamily.detector import Detector
from detfamily.visualize.explain import Request, explain
from detfamily.visualize.look import look_at
from detfamily.visualize.sheet import contact_sheet, save


def draw_attention(
    detector: Detector,
    dataset: Any,
    scores: torch.nn.Module,
    names: Mapping[int, str],
    device: torch.device,
    request: Request,
    folder: Path,
    count: int,
) -> Iterator[tuple[int, Path]]:
    """Draw what a detector looks at in the first images of a data set; it and all random states stay as they are.

    Args:
        detector: on its device.
        dataset: gives samples by index, and by ``load`` as they are on disk.
        scores: logits -> probabilities.
        names: label -> class name.
        device: of the detector.
        request: what is drawn.
        folder: gets a PNG for each image.
        count: number of images.

    Yields:
        The id of each image and its picture.
    """
    for index in range(min(count, len(dataset))):
        stored = dataset.load(index)
        images = collate([dataset[index]]).images.to(device)
        look, shown = look_at(detector, images), on_canvas(stored.image, images.canvas_sizes[0])
        sheet = contact_sheet([picture for _, picture in explain(shown, {"": look}, request, scores, names)])
        path = folder / f"{stored.image_id}.png"
        save(sheet, path)
        yield stored.image_id, path
