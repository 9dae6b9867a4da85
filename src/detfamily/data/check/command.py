"""``detfamily check-data``: every bad image and box of a data set by name, and what the set is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from detfamily.config import build
from detfamily.data.check.annotations import Tables, scan
from detfamily.data.check.files import decode_files, look_for_files
from detfamily.data.check.findings import Findings
from detfamily.data.check.report import Report
from detfamily.data.check.splits import Split, look_between, look_within
from detfamily.data.check.statistics import statistics
from detfamily.data.coco import COCO_AREA_RANGES, CocoData
from detfamily.errors import ConfigError, DataError
from detfamily.files import read_json, write_text_atomically

WRONG = 1
"""Exit status if there are errors."""


def check_data(cfg: DictConfig) -> None:
    """Check the data set that a training with this config would use, print what was found, write it if asked to.

    Args:
        cfg: composed from ``train.yaml``: ``data``, ``check`` and ``model.num_queries`` count.

    Raises:
        ConfigError: a setting of ``check`` that makes no sense, or a data set that does not lie in COCO's format.
        DataError: the folder of the data set is not there.
        OutputError: the report cannot be written.
        SystemExit: with status 1, if there is an error in the data set.
    """
    settings = cfg.check
    limit = _number("check.limit", settings.limit) or None
    workers = None if settings.workers is None else _number("check.workers", settings.workers)
    target = None if settings.report is None else Path(str(settings.report)).expanduser()
    if target is not None and target.is_dir():
        raise ConfigError(f"check.report={target} is a folder; name a json file")
    data = build(cfg.data)
    if not isinstance(data, CocoData):
        raise ConfigError(f"check-data knows data sets in COCO's format, not {cfg.data._target_}")
    report = check(
        data.sources,
        area_ranges=data.area_ranges,
        num_queries=int(cfg.model.num_queries),
        decode=settings.decode,
        workers=workers,
        most=limit if target is None else None,
    )
    print(report.text(limit))
    if target is not None:
        write_text_atomically(target, report.json())
        print(f"\nreport in {target}")
    if report.errors:
        raise SystemExit(WRONG)


def check(
    sources: Mapping[str, tuple[Path, Path]],
    area_ranges: Mapping[str, Sequence[float]] | None = None,
    num_queries: int | None = None,
    decode: bool = True,
    workers: int | None = None,
    most: int | None = None,
) -> Report:
    """Check annotation files and images.

    Args:
        sources: split ("train", "val" or both) -> annotation file and image folder.
        area_ranges: name -> (low, high) square pixels, for the statistics; COCO's when None.
        num_queries: of the detector; None leaves out whether they suffice.
        decode: whether to decode every image; else they are only looked for.
        workers: processes that decode; 0 decodes in this one, None takes as many as there are cores.
        most: findings of each kind to keep; None keeps all. All are counted.

    Raises:
        DataError: a process that decodes died.
    """
    collected = {name: Findings(name, most) for name in sources}
    splits = {}
    for name, (path, folder) in sources.items():
        findings = collected[name]
        tables = _read(path, findings)
        if tables is None:
            continue
        rows = look_for_files(tables, folder, findings)
        facts = decode_files(tables, folder, rows, findings, workers, f"decoding {name}") if decode else {}
        splits[name] = Split(name, path, folder, tables, facts)
        look_within(splits[name], num_queries, findings)
    everything = Findings(None, most)
    look_between(splits, everything)
    for findings in collected.values():
        everything.extend(findings)
    ranges = COCO_AREA_RANGES if area_ranges is None else area_ranges
    numbers = {name: statistics(split.tables, ranges) for name, split in splits.items()}
    return Report(sources, everything, numbers, decode)


def _read(path: Path, findings: Findings) -> Tables | None:
    """The tables of an annotation file; None if there are none."""
    if not path.exists():
        findings.add("json-missing", f"{path} does not exist", file=path)
        return None
    try:
        content: Any = read_json(path)
    except DataError as error:
        findings.add("json-broken", str(error), file=path)
        return None
    if not isinstance(content, dict):
        words = f"{path} holds a {type(content).__name__}; a COCO json is an object with 'images', ..."
        findings.add("json-layout", words, file=path)
        return None
    return scan(content, findings)


def _number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} is {value!r}, expected a whole number of 0 or more")
    return value
