"""``detfamily predict``: drawn images and one json of what a checkpoint finds in image files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from detfamily import __version__
from detfamily.engine.checkpoint import require
from detfamily.engine.evaluate import split_overrides
from detfamily.engine.run import label_words, listing
from detfamily.errors import ConfigError, DetfamilyError
from detfamily.evaluation.results import write_results
from detfamily.files import write_atomically, write_text_atomically
from detfamily.predict.predictor import Prediction, Predictor, load
from detfamily.predict.sources import Source, find_images
from detfamily.tracking.console import ProgressBar
from detfamily.visualize.boxes import draw_boxes

DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "source": None,
    "output_dir": None,
    "threshold": 0.5,
    "max_detections": None,
    "batch_size": 1,
    "device": "auto",
    "draw": True,
    "coco": False,
}
"""The command's own fields; all other words are overrides of the checkpoint's config."""

BROKEN = 1
_JSON, _COCO, _PICTURES = "predictions.json", "results.json", "images"


@dataclass
class _Report:
    """What has been done so far."""

    images: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    objects: int = 0
    best: tuple[float, str] = (0.0, "")


def predict(overrides: Sequence[str]) -> None:
    """``detfamily predict``: detect objects in an image, a folder or a pattern of files.

    ``checkpoint`` and ``source`` say with what and in what; ``output_dir`` is where ``predictions.json`` and the drawn
    ``images/`` go, by default a new folder beside the checkpoint. ``threshold`` and ``max_detections`` say what is
    given at all, ``batch_size`` how many images of one size are computed at once, ``device`` where, ``draw=false``
    leaves out the drawn images, and ``coco=true`` writes COCO's results form, too. Every further override is one of
    ``detfamily train``, applied on top of the checkpoint's config (``augmentation.test_short_side=640``).

    Raises:
        ConfigError: no checkpoint or source, a value or an override that cannot be applied, or a result that would
            overwrite an input.
        CheckpointError: the checkpoint is missing or broken.
        DataError: the source is empty or not there.
        OutputError: a result cannot be written.
        SystemExit: with status 1, if some images are broken; the results of all others are written.
    """
    own, others = own_fields(overrides)
    if own["checkpoint"] is None or own["source"] is None:
        raise ConfigError("say with what and in what: checkpoint=runs/NAME/best.pt source=IMAGE, FOLDER or 'PATTERN'")
    for name in ("draw", "coco"):
        if not isinstance(own[name], bool):
            raise ConfigError(f"{name}={own[name]!r}: expected true or false")
    checkpoint = require(str(own["checkpoint"]))
    given = None if own["output_dir"] is None else Path(str(own["output_dir"])).expanduser()
    source = find_images(str(own["source"]), leave_out=given)
    folder = given or new_folder(checkpoint, "predict")
    _check_nothing_is_overwritten(source, folder)
    predictor = load(
        checkpoint,
        device=str(own["device"]),
        threshold=own["threshold"],
        max_detections=own["max_detections"],
        batch_size=own["batch_size"],
        overrides=others,
    )
    predictor.runtime.apply()
    print(_introduction(predictor, checkpoint, source), flush=True)
    report = _Report()
    try:
        _run(predictor, source, folder, own["draw"], report)
    finally:  # also of a run that was interrupted
        if report.images or report.failed:
            _write(folder, report, predictor, checkpoint, source, own["coco"])
    print(_conclusion(report, predictor, folder, own["coco"]))
    if report.failed:
        print(
            f"{len(report.failed)} of {len(source.names)} images are broken and were left out (named above)",
            file=sys.stderr,
        )
        raise SystemExit(BROKEN)


def own_fields(overrides: Sequence[str], defaults: Mapping[str, Any] = DEFAULTS) -> tuple[dict[str, Any], list[str]]:
    """A command's own fields with their defaults, and the overrides of the checkpoint's config.

    The source is taken as it is written: a pattern is full of signs that mean something else in an override.
    """
    sources = [one.partition("=")[2] for one in overrides if one.partition("=")[0] == "source"]
    if len(sources) > 1:
        raise ConfigError(f"source is given {len(sources)} times; name a folder or a pattern in quotes")
    rest = [one for one in overrides if one.partition("=")[0] != "source"]
    given, others = split_overrides(rest, [name for name in defaults if name != "source"])
    named = {one.partition("=")[0] for one in rest}
    own = {**defaults, **{name: value for name, value in given.items() if name in named}}
    return {**own, "source": _unquoted(sources[0]) if sources else None}, others


def picture_names(names: Sequence[Path]) -> list[Path]:
    """Where images are drawn, inside the folder of results: under their own names, with .jpg added to other formats.

    No two are drawn to one file, also where capital letters do not count.
    """
    taken: set[str] = set()
    pictures: dict[Path, Path] = {}
    for name in sorted(names, key=lambda name: not _is_jpeg(name)):  # those that keep their names come first
        picture = Path(_PICTURES) / name
        while not _is_jpeg(picture) or picture.as_posix().casefold() in taken:
            picture = picture.with_name(f"{picture.name}.jpg")
        taken.add(picture.as_posix().casefold())
        pictures[name] = picture
    return [pictures[name] for name in names]


def _is_jpeg(name: Path) -> bool:
    return name.suffix.lower() in (".jpg", ".jpeg")


def image_ids(names: Sequence[Path]) -> list[int]:
    """The numbers that the files are named by, as COCO's are; where they are not, the images are counted from 1."""
    numbers = [int(name.stem) for name in names if name.stem.isascii() and name.stem.isdigit()]
    return numbers if len(set(numbers)) == len(names) else list(range(1, len(names) + 1))


def _run(predictor: Predictor, source: Source, folder: Path, draw: bool, report: _Report) -> None:
    outcomes = predictor.stream(source.paths)
    ids, pictures = image_ids(source.names), picture_names(source.names)
    with ProgressBar("predicting", len(source.names)) as bar:
        for image_id, name, target, outcome in zip(ids, source.names, pictures, outcomes, strict=True):
            if outcome.prediction is None or outcome.pixels is None:
                _note_failure(report, name, outcome.error)
            else:
                picture = target if draw else None
                if picture is not None:
                    _draw(outcome.pixels, outcome.prediction, predictor.names, folder / picture)
                _note(report, image_id, name, outcome.prediction, picture, predictor)
            bar.advance()


def _note_failure(report: _Report, name: Path, error: DetfamilyError | None) -> None:
    print(f"broken: {error}", file=sys.stderr, flush=True)
    report.failed.append({"image": name.as_posix(), "error": str(error)})


def _note(
    report: _Report, image_id: int, name: Path, found: Prediction, picture: Path | None, predictor: Predictor
) -> None:
    objects = list(_objects(found, predictor))
    height, width = found.size
    entry = {"image": name.as_posix(), "image_id": image_id, "width": width, "height": height}
    report.images.append({**entry, "picture": picture and picture.as_posix(), "objects": objects})
    for one in objects:
        x1, y1, x2, y2 = one["box"]
        result = {"image_id": image_id, "category_id": one["category_id"], "bbox": [x1, y1, x2 - x1, y2 - y1]}
        report.results.append({**result, "score": one["score"]})
    report.objects += len(found)
    report.best = max(report.best, (found.best_score, name.as_posix()))


def _objects(found: Prediction, predictor: Predictor) -> Iterator[dict[str, Any]]:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.names, strict=True)
    for box, score, label, name in rows:
        category = predictor.label_map.category_id(label)
        yield {"box": box, "score": score, "label": label, "name": name, "category_id": category}


def _draw(pixels: Tensor, found: Prediction, names: dict[int, str], path: Path) -> None:
    picture = draw_boxes(pixels, found.boxes, found.labels, names, found.scores)
    write_atomically(path, lambda file: picture.save(file, format="JPEG", quality=92))


def _write(folder: Path, report: _Report, predictor: Predictor, checkpoint: Path, source: Source, coco: bool) -> None:
    content = {
        "detfamily": __version__,
        "checkpoint": str(checkpoint),
        "source": str(source.root),
        "threshold": predictor.threshold,
        "names": predictor.names,
        "images": report.images,
        "failed": report.failed,
        "complete": len(report.images) + len(report.failed) == len(source.names),
    }
    write_text_atomically(folder / _JSON, _json(content))
    if coco:
        write_results(folder / _COCO, report.results)


def _json(content: dict[str, Any]) -> str:
    """An object with a line for each key, and for each element of a list."""

    def dumped(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    rows = []
    for key, value in content.items():
        if isinstance(value, list) and value:
            rows.append(f"{dumped(key)}: [\n  " + ",\n  ".join(map(dumped, value)) + "\n ]")
        else:
            rows.append(f"{dumped(key)}: {dumped(value)}")
    return "{\n " + ",\n ".join(rows) + "\n}\n"


def new_folder(checkpoint: Path, command: str) -> Path:
    """A folder beside the checkpoint, called after a command, that is not there yet."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    path = checkpoint.parent / f"{command}-{checkpoint.stem}-{stamp}"
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{command}-{checkpoint.stem}-{stamp}-{number}")
    return path


def _check_nothing_is_overwritten(source: Source, folder: Path) -> None:
    inputs = {path.resolve() for path in source.paths}
    outputs = [folder / _JSON, folder / _COCO, *(folder / name for name in picture_names(source.names))]
    for path in outputs:
        if path.resolve() in inputs:
            raise ConfigError(f"the result {path} would overwrite an image of the source: choose another output_dir")


def _introduction(predictor: Predictor, checkpoint: Path, source: Source) -> str:
    assert predictor.preparation is not None
    parameters = sum(one.numel() for one in predictor.detector.parameters())
    most = "" if predictor.max_detections is None else f", at most {predictor.max_detections} of an image"
    rows = [
        ("checkpoint", str(checkpoint)),
        ("source", f"{source.root}: {len(source.names)} images"),
        ("labels", label_words(predictor.label_map.names)),
        ("model", f"{parameters / 1e6:.2f} M parameters; {predictor.preparation.describe()}"),
        ("device", f"{predictor.device}, {predictor.runtime.precision}"),
        ("shown", f"score >= {predictor.threshold:g}{most}"),
    ]
    return "predicting\n" + listing(rows)


def _conclusion(report: _Report, predictor: Predictor, folder: Path, coco: bool) -> str:
    lines = [f"{report.objects} objects in {len(report.images)} images; results in {folder}"]
    if report.images and not report.objects and predictor.threshold > 0:
        score, name = report.best
        lines.append(f"no score reaches threshold={predictor.threshold:g}; the best is {score:.3f}, in {name}")
    if coco and predictor.threshold > 0:
        lines.append(f"{_COCO} lacks what is below the threshold; AP needs all detections: threshold=0")
    return "\n".join(lines)


def _unquoted(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text
