"""``detfamily visualize``: pictures of what a trained detector looks at, beside the untrained one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from detfamily.build import build_detector
from detfamily.data.batches import collate
from detfamily.data.images import read_image
from detfamily.data.large_scale_jitter import on_canvas
from detfamily.detector import Detector
from detfamily.engine.checkpoint import require
from detfamily.errors import ConfigError, DetfamilyError
from detfamily.predict.command import BROKEN, new_folder, own_fields
from detfamily.predict.restore import Restored, as_sample, restore
from detfamily.predict.sources import Source, find_images
from detfamily.tracking.console import ProgressBar
from detfamily.visualize.explain import Request, explain
from detfamily.visualize.look import look_at
from detfamily.visualize.sheet import contact_sheet, save

DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "source": None,
    "output_dir": None,
    "what": None,
    "layer": "ends",
    "query": None,
    "queries": 2,
    "place": None,
    "level": 0,
    "untrained": True,
    "device": "auto",
}
"""The command's own fields; all other words are overrides of the checkpoint's config."""

TRAINED, UNTRAINED = "trained", "at initialisation"
SHEET = "sheet.jpg"


def visualize(overrides: Sequence[str]) -> None:
    """``detfamily visualize``: draw what a detector looks at in images.

    ``checkpoint`` and ``source`` say what looks at what, as for ``detfamily predict``; ``output_dir`` gets a folder of
    pictures for each image, by default in a new folder beside the checkpoint. ``what`` lists some of boxes,
    cross_attention, self_attention, encoder_attention and backbone; ``layer`` is a number, a list, "ends" or "all";
    ``query`` a number or a list of object queries, by default the ``queries`` best ones; ``place=[x,y]`` the pixel
    whose tokens are asked in encoder and backbone, by default the centres of the queries' boxes; ``level`` whose token
    that is. ``untrained=false`` leaves out the detector of the same config at its initialisation.

    Raises:
        ConfigError: a value that cannot be applied, or a query, layer, level or kind that the detector does not have.
        CheckpointError: the checkpoint is missing or broken.
        DataError: the source is empty or not there.
        OutputError: a picture cannot be written.
        SystemExit: with status 1, if some images are broken; the pictures of all others are written.
    """
    own, others = own_fields(overrides, DEFAULTS)
    if own["checkpoint"] is None or own["source"] is None:
        raise ConfigError("say what looks at what: checkpoint=runs/NAME/best.pt source=IMAGE, FOLDER or 'PATTERN'")
    if not isinstance(own["untrained"], bool):
        raise ConfigError(f"untrained={own['untrained']!r}: expected true or false")
    request = request_of(own)
    checkpoint = require(str(own["checkpoint"]))
    given = None if own["output_dir"] is None else Path(str(own["output_dir"])).expanduser()
    source = find_images(str(own["source"]), leave_out=given)
    folder = given or new_folder(checkpoint, "visualize")
    restored = restore(checkpoint, str(own["device"]), others)
    restored.runtime.apply()
    detectors = {TRAINED: restored.detector}
    if own["untrained"]:
        detectors[UNTRAINED] = untrained(restored)
    for detector in detectors.values():
        detector.to(restored.device).eval()
    failed = _draw_all(restored, detectors, request, own["place"], source, folder)
    print(f"pictures of {len(source.names) - failed} images in {folder}")
    if failed:
        print(f"{failed} of {len(source.names)} images are broken and were left out (named above)", file=sys.stderr)
        raise SystemExit(BROKEN)


def request_of(own: dict[str, Any]) -> Request:
    """What the fields of the command ask for, but for the place, which needs an image.

    Raises:
        ConfigError: a value of the wrong kind.
    """
    what = own["what"]
    if what is not None:
        what = [str(one) for one in (what if isinstance(what, list) else [what])]
    layer = own["layer"]
    if layer not in ("ends", "all"):
        layer = _numbers("layer", layer, "a number, a list of numbers, ends or all")
    query = None if own["query"] is None else _numbers("query", own["query"], "a number or a list of numbers")
    (level,) = _numbers("level", own["level"], "a number", most=1)
    (count,) = _numbers("queries", own["queries"], "a number", most=1)
    if count < 1:
        raise ConfigError(f"queries={count}: expected 1 or more")
    return Request(what, layer, query, count, level=level)


def untrained(restored: Restored) -> Detector:
    """The detector of the same config at its initialisation, as its seed draws it, but for pretrained backbones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(restored.cfg.seed))
        return build_detector(restored.cfg, restored.label_map.num_classes, pretrained=False)


def _draw_all(
    restored: Restored,
    detectors: dict[str, Detector],
    request: Request,
    place: Any,
    source: Source,
    folder: Path,
) -> int:
    """Draw image by image; returns how many are broken."""
    failed = 0
    with ProgressBar("drawing", len(source.names)) as bar:
        for name, path in zip(_folders(source.names), source.paths, strict=True):
            try:
                pixels = read_image(path, upright=True)
            except DetfamilyError as error:
                print(f"broken: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
            _draw_image(restored, detectors, request, place, pixels, folder / name)
            bar.advance()
    return failed


def _folders(names: Sequence[Path]) -> list[Path]:
    """A folder for each image, called after it; with its suffix where two would be called alike."""
    stems = Counter(name.with_suffix("").as_posix().casefold() for name in names)
    alone = [stems[name.with_suffix("").as_posix().casefold()] == 1 for name in names]
    return [name.with_suffix("") if one else name for name, one in zip(names, alone, strict=True)]


def _draw_image(
    restored: Restored, detectors: dict[str, Detector], request: Request, place: Any, pixels: Tensor, folder: Path
) -> None:
    images = collate([as_sample(pixels, restored.transform)]).images.to(restored.device)
    (canvas_size,) = images.canvas_sizes
    request, shown = _at_place(request, place, pixels, canvas_size), on_canvas(pixels, canvas_size)
    looks = {state: look_at(detector, images) for state, detector in detectors.items()}
    names = restored.label_map.by_label()
    drawn = []
    for name, picture in explain(shown, looks, request, cast("nn.Module", restored.postprocess.scores), names):
        save(picture, folder / f"{name}.png")
        drawn.append(picture)
    save(contact_sheet(drawn), folder / SHEET)


def _at_place(request: Request, place: Any, pixels: Tensor, canvas_size: tuple[float, float]) -> Request:
    if place is None:
        return request
    height, width = pixels.shape[1:]
    numbers = place if isinstance(place, list) else [place]
    right = len(numbers) == 2 and all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers)
    if not right or not (0 <= numbers[0] < width and 0 <= numbers[1] < height):
        raise ConfigError(
            f"place={place}: expected [x,y] in pixels of the image, which has {width}x{height} (width x height)"
        )
    return replace(request, place=((numbers[0] + 0.5) / canvas_size[1], (numbers[1] + 0.5) / canvas_size[0]))


def _numbers(name: str, value: Any, expected: str, most: int | None = None) -> list[int]:
    found = value if isinstance(value, list) else [value]
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in found)
    if not found or not whole or (most is not None and len(found) > most):
        raise ConfigError(f"{name}={value!r}: expected {expected}")
    return found
