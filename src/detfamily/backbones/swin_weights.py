"""ImageNet weights of Swin Transformers, from the files of their authors (microsoft/Swin-Transformer)."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.errors import CheckpointError, nearest

logger = logging.getLogger(__name__)

_RELEASES = "https://github.com/SwinTransformer/storage/releases/download"
_BASE, _LARGE = "swin_base_patch4", "swin_large_patch4"
_FILES = {
    "v1.0.0": (
        "swin_tiny_patch4_window7_224",
        "swin_small_patch4_window7_224",
        *(f"{_BASE}_window7_224", f"{_BASE}_window7_224_22k", f"{_BASE}_window7_224_22kto1k"),
        *(f"{_BASE}_window12_384", f"{_BASE}_window12_384_22k", f"{_BASE}_window12_384_22kto1k"),
        *(f"{_LARGE}_window7_224_22k", f"{_LARGE}_window7_224_22kto1k"),
        *(f"{_LARGE}_window12_384_22k", f"{_LARGE}_window12_384_22kto1k"),
    ),
    "v1.0.8": (
        *("swin_tiny_patch4_window7_224_22k", "swin_tiny_patch4_window7_224_22kto1k_finetune"),
        *("swin_small_patch4_window7_224_22k", "swin_small_patch4_window7_224_22kto1k_finetune"),
    ),
}
URLS = {name: f"{_RELEASES}/{release}/{name}.pth" for release, names in _FILES.items() for name in names}
"""Official name -> where the file lies; 384 is the image's side, 22k and 1k the number of classes."""

_OUTPUT_NORM = re.compile(r"stages\.\d+\.norm\.")


def load_weights(swin: nn.Module, weights: str) -> None:
    """Fill a Swin; the norms of its outputs, which no classifier has, stay as they are.

    Args:
        swin: whose last stage may be any; what the file has beyond it is left out.
        weights: an official name, or the path of a file with official names, as a state dict or as its "model". Biases
            for windows of another size are interpolated.

    Raises:
        CheckpointError: the file cannot be downloaded or read, or is of another network.
    """
    # here, because adapters know detectors, which know backbones
    from detfamily.checkpoints.adapter import Adapter, listed
    from detfamily.checkpoints.swin import CLASSIFIER, rules

    adapter, own = Adapter(rules("", ""), CLASSIFIER), swin.state_dict()
    try:
        ours = adapter.to_ours(_read(weights))
    except CheckpointError as error:
        raise CheckpointError(f"backbone.weights={weights!r} cannot be used: {error}") from None
    last = max(int(name.split(".")[1]) for name in own if name.startswith("stages."))
    ours = {name: value for name, value in ours.items() if not is_beyond(name, last)}
    ours |= _resized_tables(ours, own, weights)
    missing = [name for name in own if name not in ours and not _OUTPUT_NORM.match(name)]
    unknown = [name for name in ours if name not in own]
    wrong = [name for name in ours if name in own and ours[name].shape != own[name].shape]
    for words, names in (("misses", missing), ("has also", unknown), ("has in another shape", wrong)):
        if names:
            raise CheckpointError(
                f"backbone.weights={weights!r} is of another network than backbone: it {words} "
                f"{listed([adapter.official_name(name) for name in names], 4)}"
            )
    swin.load_state_dict(ours, strict=False)


def _read(weights: str) -> Mapping[str, Tensor]:
    from detfamily.checkpoints.read import read_file

    if weights in URLS:
        content = _download(weights)
    elif Path(weights).is_file():
        content = read_file(Path(weights))
    else:
        raise CheckpointError(
            f"there is no such file, and no official weights have this name; {nearest(weights, URLS)}, or null for "
            "random weights"
        )
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError("it holds no state dict, neither by itself nor as its 'model'")
    return state


def _download(name: str) -> Any:
    try:
        return torch.hub.load_state_dict_from_url(URLS[name], map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # no network; a file that came damaged
        raise CheckpointError(
            f"downloading {URLS[name]} failed ({error}); pass backbone.weights=PATH, a copy of that file, or "
            "backbone.weights=null to start from random weights"
        ) from error


def is_beyond(name: str, last: int) -> bool:
    """Whether a tensor is only needed behind the last stage that was built."""
    _, stage, part, *_ = (*name.split("."), "", "", "")
    return stage.isdigit() and (int(stage) > last or (int(stage) == last and part == "merge"))


def _resized_tables(ours: Mapping[str, Tensor], own: Mapping[str, Tensor], weights: str) -> dict[str, Tensor]:
    """The tables of biases that are for windows of another size, interpolated as by the authors."""
    from detfamily.checkpoints.swin import window_of

    tables = {name: table for name, table in ours.items() if name in own and name.endswith(".position_bias")}
    found, sizes = {}, (0, 0)
    for name, table in tables.items():
        if table.ndim == 2 and len(table) != len(own[name]):
            try:
                sizes = window_of(len(table)), window_of(len(own[name]))
            except ValueError as error:
                raise CheckpointError(f"backbone.weights={weights!r}: {error}") from None
            before, after = (2 * size - 1 for size in sizes)
            grid = table.t().unflatten(1, (before, before))[None]
            found[name] = F.interpolate(grid, size=(after, after), mode="bicubic")[0].flatten(1).t()
    if found:
        logger.warning("%s is for windows of %d tokens: its position biases are interpolated to %d", weights, *sizes)
    return found
