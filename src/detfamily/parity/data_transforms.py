"""Golden cases of the data pipeline: conversion, crop, flip, resize, normalisation, batches, on official values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detfamily.blocks.normalize import Normalize
from detfamily.data.batches import normalized_cxcywh, pad
from detfamily.data.coco import Annotations, CocoDetection
from detfamily.data.labels import LabelMap
from detfamily.data.transforms import Sample, crop, flip_horizontally, resize, resized_size
from detfamily.structures import Size

_PADDED = re.compile(r"pixels\.padded_x(\d+)_y(\d+)$")
_RESIZE = re.compile(r"to size (\d+), max_size (\d+|None)")


def expected(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the case stores beside its tensors: "resize_sizes.N", the (2,) height and width that the rule must give."""
    return {f"resize_sizes.{n}": torch.tensor(row["result_hw"]) for n, row in enumerate(_table(case))}


def results(case: Mapping[str, Any], io: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All results of the case computed by our code, by the case's keys, and the sizes of ``expected``.

    Args:
        case: the content of case.json.
        io: the case's tensors, of which only inputs are used.
    """
    found: dict[str, Tensor] = {}
    for n, row in enumerate(_table(case)):
        width, height = row["image_wh"]
        found[f"resize_sizes.{n}"] = torch.tensor(resized_size((height, width), row["size"], row["max_size"]))
    for n, entry in enumerate(case["data"].get("convert", [])):
        found |= _boxes(case, n, entry)
    if "pixels.image" in io:
        found |= _pixels(case, io["pixels.image"].permute(2, 0, 1))
    return found


def _table(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = case["data"].get("resize_sizes", [])
    return rows


def _boxes(case: Mapping[str, Any], n: int, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    sample = _converted(entry)
    found = _named("convert", n, sample)
    found[f"convert.{n}.image_id"] = torch.tensor([sample.image_id])
    if n < len(case["data"].get("crop_region_top_left_h_w", [])):
        found |= _named("crop", n, crop(sample, *case["data"]["crop_region_top_left_h_w"][n]))
    found |= _named("hflip", n, flip_horizontally(sample))
    resized = resize(sample, resized_size(sample.size, *_resize_arguments(case, n)))
    found |= _named("resize", n, resized)
    found[f"normalize.{n}.boxes"] = normalized_cxcywh(resized.boxes, resized.size)
    return found


def _converted(entry: Mapping[str, Any]) -> Sample:
    """The objects of an image as the data set gives them, with a black image of its size; labels are category ids."""
    image = {"file_name": "none", **entry["image"]}
    category_ids = {annotation["category_id"] for annotation in entry["annotations"]} | {1}
    categories = [{"id": one, "name": str(one)} for one in category_ids]
    content = {"images": [image], "annotations": entry["annotations"], "categories": categories}
    annotations = Annotations.from_json(content, Path("case.json"))
    dataset = CocoDetection(annotations, Path(), LabelMap.by_category_id(categories), lambda sample, _: sample)
    return dataset.sample(0, torch.zeros(3, image["height"], image["width"], dtype=torch.uint8))


def _named(step: str, n: int, sample: Sample) -> dict[str, Tensor]:
    values = {
        "boxes": sample.boxes,
        "labels": sample.labels,
        "area": sample.area,
        "iscrowd": sample.iscrowd,
        "size": torch.tensor(sample.size),
        "orig_size": torch.tensor(sample.original_size),
    }
    return {f"{step}.{n}.{name}": value for name, value in values.items()}


def _resize_arguments(case: Mapping[str, Any], n: int) -> tuple[int, int | None]:
    """The short side and the limit, which the case gives in words only."""
    match = _RESIZE.search(case["keys"].get(f"resize.{n}.boxes", {}).get("meaning", ""))
    if match is None:
        return 480, 640
    return int(match[1]), None if match[2] == "None" else int(match[2])


def _pixels(case: Mapping[str, Any], image: Tensor) -> dict[str, Tensor]:
    """Image operations on (3, H, W) uint8; stored images have the channels last."""
    found: dict[str, Tensor] = {}
    normalize = Normalize()
    resized = []
    for n, (short_side, max_size) in enumerate(case["data"]["pixels_resize_size_max"]):
        size = resized_size((image.shape[1], image.shape[2]), short_side, max_size)
        resized.append(resize(_bare(image), size).image)
        found[f"pixels.resized.{n}"] = resized[-1].permute(1, 2, 0)
        found[f"pixels.normalized.{n}"] = normalize(resized[-1][None], None)[0]
    for key in case["keys"]:
        if match := _PADDED.match(key):
            found[key] = _padded(image, right=int(match[1]), bottom=int(match[2])).permute(1, 2, 0)
    pixels, found["batch.mask"] = pad(resized)
    found["batch.tensors"] = normalize(pixels, found["batch.mask"])
    return found


def _padded(image: Tensor, right: int, bottom: int) -> Tensor:
    """What a batch makes of an image beside one that is larger by so many pixels."""
    larger = torch.zeros(3, image.shape[1] + bottom, image.shape[2] + right, dtype=image.dtype)
    return pad([image, larger])[0][0]


def _bare(image: Tensor) -> Sample:
    size: Size = (image.shape[1], image.shape[2])
    none = torch.zeros(0)
    return Sample(image, torch.zeros(0, 4), none.long(), none, none.long(), 0, size)
