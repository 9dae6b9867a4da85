"""Reading files of weights for backbones, and filling backbones of stages from what they hold under official names."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.errors import CheckpointError, nearest

if TYPE_CHECKING:  # adapters know detectors, which know backbones
    from detfamily.checkpoints.adapter import Adapter

logger = logging.getLogger(__name__)

_OUTPUT_NORM = re.compile(r"stages\.\d+\.norm\.")


def read_state(
    weights: str,
    urls: Mapping[str, str],
    pages: Mapping[str, str] | None = None,
    otherwise: str = "expected a path, or",
) -> dict[str, Tensor]:
    """The tensors of a file.

    Args:
        weights: a name, or a path of a file that holds a state dict, by itself or as its "model" or "state_dict".
        urls: names that can be downloaded, and from where.
        pages: names that can only be downloaded by hand, and the pages from which.
        otherwise: what is expected where there are no names, for the message.

    Raises:
        CheckpointError: the file cannot be downloaded or read, or holds no tensors.
    """
    from detfamily.checkpoints.read import read_file

    pages = pages or {}
    if weights in urls:
        content = _download(urls[weights])
    elif Path(weights).is_file():
        content = read_file(Path(weights))
    elif weights in pages:
        raise CheckpointError(
            f"its authors have it behind a page, from which only a browser can download it: {pages[weights]}; pass "
            "backbone.weights=PATH, the file from there, or backbone.weights=null to start from random weights"
        )
    else:
        names = [*urls, *pages]
        named = (
            f", and no official weights have this name; {nearest(weights, names)}, or" if names else f"; {otherwise}"
        )
        raise CheckpointError(f"there is no such file{named} null for random weights")
    if isinstance(content, Mapping):
        content = next((content[key] for key in ("model", "state_dict") if key in content), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError("it holds no state dict, neither by itself nor as its 'model' or 'state_dict'")
    return dict(content)


def _download(url: str) -> Any:
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # no network; a file that came damaged
        raise CheckpointError(
            f"downloading {url} failed ({error}); pass backbone.weights=PATH, a copy of that file, or "
            "backbone.weights=null to start from random weights"
        ) from error


@contextmanager
def naming(weights: str) -> Iterator[None]:
    """Say in every CheckpointError from within that it is about ``backbone.weights``."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"backbone.weights={weights!r} cannot be used: {error}") from None


def fill(
    backbone: nn.Module, official: Mapping[str, Tensor], adapter: Adapter, tables: Collection[str], weights: str
) -> None:
    """Fill a backbone of stages.

    Norms of outputs, which no classifier has, stay as they are where there are none, and what is needed only behind the
    last stage that was built is left out.

    Args:
        backbone: whose last stage may be any.
        official: the tensors of the file; those of a checkpoint of ours, which has other names, are taken, too.
        adapter: from their names to ours.
        tables: our names of position biases that are interpolated where they have another size, which is said.
        weights: what the user gave, to say it.

    Raises:
        CheckpointError: they are of another network.
    """
    own = backbone.state_dict()
    ours = _of_ours(official) or adapter.to_ours(official)
    last = max(int(name.split(".")[1]) for name in own if name.startswith("stages."))
    ours = {name: value for name, value in ours.items() if not is_beyond(name, last)}
    ours |= _resized_tables({name: ours[name] for name in tables if name in ours}, own, weights)
    _check_names(ours, own, adapter)
    backbone.load_state_dict(ours, strict=False)


def _of_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a classifier or a detector of ours; empty if the names are official."""
    found = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    mine = any(name.startswith("patches.") for name in found)
    return {name: one for name, one in found.items() if name.startswith(("patches.", "stages."))} if mine else {}


def is_beyond(name: str, last: int) -> bool:
    """Whether a tensor is only needed behind the last stage that was built."""
    _, stage, part, *_ = (*name.split("."), "", "", "")
    return stage.isdigit() and (int(stage) > last or (int(stage) == last and part == "merge"))


def _check_names(ours: Mapping[str, Tensor], own: Mapping[str, Tensor], adapter: Adapter) -> None:
    from detfamily.checkpoints.adapter import listed

    missing = [name for name in own if name not in ours and not _OUTPUT_NORM.match(name)]
    unknown = [name for name in ours if name not in own]
    wrong = [name for name in ours if name in own and ours[name].shape != own[name].shape]
    for words, names in (("misses", missing), ("has also", unknown), ("has in another shape", wrong)):
        if names:
            raise CheckpointError(
                f"it is of another network than backbone: it {words} "
                f"{listed([adapter.official_name(name) for name in names], 4)}"
            )


def _resized_tables(tables: Mapping[str, Tensor], own: Mapping[str, Tensor], weights: str) -> dict[str, Tensor]:
    found = {
        name: resized_table(table, own[name])
        for name, table in tables.items()
        if name in own and table.ndim == own[name].ndim and table.shape != own[name].shape
    }
    if found:
        sizes = {f"{_size(tables[name])} to {_size(table)}": None for name, table in found.items()}
        logger.warning("%s: position biases are interpolated to other sizes (%s)", weights, ", ".join(sizes))
    return found


def resized_table(table: Tensor, like: Tensor) -> Tensor:
    """A table of position biases, interpolated bicubically to the size of another, as by the authors of Swin and DAT.

    Args:
        table: (rows, M) of a square window in raster order, or (M, h, w).
        like: of the size that is wanted.

    Raises:
        CheckpointError: the rows are of no window.
    """
    if table.ndim == 3:
        return F.interpolate(table[None], size=like.shape[1:], mode="bicubic")[0]
    before, after = _side(table), _side(like)
    grid = table.t().unflatten(1, (before, before))[None]
    return F.interpolate(grid, size=(after, after), mode="bicubic")[0].flatten(1).t()


def _side(table: Tensor) -> int:
    from detfamily.checkpoints.swin import window_of

    try:
        return 2 * window_of(len(table)) - 1
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _size(table: Tensor) -> str:
    h, w = table.shape[1:] if table.ndim == 3 else (_side(table),) * 2
    return f"{h} x {w}"
