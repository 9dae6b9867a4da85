"""``detfamily import-data``: writes COCO json files for a data set of another layout."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig

from detfamily.config import to_container
from detfamily.data.importers.imported import Imported
from detfamily.data.importers.voc import ALL, Corners, Difficult, VocSettings, read_voc
from detfamily.data.importers.yolo import read_yolo
from detfamily.errors import ConfigError, DataError, nearest
from detfamily.files import write_text_atomically

FORMATS = ("voc", "yolo")
TRAINING, VALIDATION = ("train", "trainval", ALL), ("val", "test")
"""Splits that serve for it, the best first."""


def import_data(cfg: DictConfig) -> dict[str, Path]:
    """Read a data set, write one json file for each of its splits, and say how to use them.

    Args:
        cfg: composed from ``import-data.yaml``.

    Returns:
        split -> the file.

    Raises:
        ConfigError: a setting that makes no sense.
        DataError: the data set is not there, or something in it is wrong; or a file would be overwritten.
        OutputError: a file cannot be written.
    """
    root = Path(str(cfg.root)).expanduser().absolute()
    if not root.exists():
        raise DataError(f"root={cfg.root} does not exist")
    if cfg.format not in FORMATS:
        raise ConfigError(f"format={cfg.format} does not exist; {nearest(str(cfg.format), FORMATS)}")
    settings = _voc_settings(to_container(cfg)["voc"])
    imported = read_voc(root, settings) if cfg.format == "voc" else read_yolo(root)
    folder = imported.root / "annotations" if cfg.output is None else Path(str(cfg.output)).expanduser().absolute()
    files = {split: folder / f"instances_{split}.json" for split in imported.splits}
    for path in files.values():
        if path.exists() and not cfg.overwrite:
            raise DataError(f"{path} exists already; overwrite=true replaces it, output=... writes elsewhere")
    for split, path in files.items():
        content = imported.coco(split)
        write_text_atomically(path, json.dumps(content))
        ignored = sum(one["iscrowd"] for one in content["annotations"])
        objects = f"{len(content['annotations']) - ignored} objects" + f" and {ignored} ignored" * (ignored > 0)
        print(f"{path}: {len(content['images'])} images, {objects}, {len(content['categories'])} classes")
    for remark in imported.remarks:
        print(f"remark: {remark}")
    if not any(name in files for name in VALIDATION):
        print("remark: nothing to validate on; until there is, the command below names the training images for it")
    print(f"now check it, and train with the same words:\n  {' '.join(_next_command(imported, files))}")
    return files


def _next_command(imported: Imported, files: dict[str, Path]) -> list[str]:
    """The command that checks what was imported."""
    words = ["detfamily", "check-data", "data=coco", f"data.root={imported.root}"]
    for split, names in (("train", TRAINING), ("val", VALIDATION)):
        path = next((files[name] for name in names if name in files), next(iter(files.values())))
        place = os.path.relpath(path, imported.root) if path.is_relative_to(imported.root) else str(path)
        words += [f"data.{split}_images=.", f"data.{split}_annotations={place}"]
    return [shlex.quote(word) for word in words]


def _voc_settings(given: dict[str, Any]) -> VocSettings:
    for key, choices in (("boxes", get_args(Corners)), ("difficult", get_args(Difficult))):
        if given[key] not in choices:
            raise ConfigError(f"voc.{key}={given[key]} does not exist; {nearest(str(given[key]), choices)}")
    return VocSettings(
        _texts("voc.splits", given["splits"]), _texts("voc.names", given["names"]), given["boxes"], given["difficult"]
    )


def _texts(name: str, value: Any) -> Sequence[str] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{name} is {value!r}, expected a list of names, as in [one,two]")
    if len(set(value)) < len(value):
        raise ConfigError(f"{name}: a name occurs twice in {value!r}")
    return value
