"""What a matrix consists of: its axes, the overrides of each cell, and the check of all names before any work."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from detfamily.config import compose, configs_dir, groups, groups_of, to_container
from detfamily.config.registry import read_yaml
from detfamily.errors import ConfigError, nearest, require_at_least
from detfamily.structures import Size

FIRST = ("data.root=.",)
"""What must be given, and no cell has a use for."""

_TAKEN = ("family", "backbone", "experiment")
"""Groups that no column can be of: two are the other axes, and an experiment would choose all of them at once."""


@dataclass(frozen=True)
class Entry:
    """One place of an axis.

    Attributes:
        text: as it was typed; the label.
        choice: override that picks from the axis' group; None where the entry is overrides alone.
        overrides: what stands behind it.
    """

    text: str
    choice: str | None
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        size: height and width of the batch, pixels.
        batch_size: images.
        num_classes: columns of the class head.
        repeats: timed steps.
    """

    size: Size
    batch_size: int
    num_classes: int
    repeats: int


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        family: label of its row.
        attention: label of its column.
        backbone: label of its table.
        overrides: of ``detfamily train``.
        settings: how it is measured.
    """

    family: str
    attention: str
    backbone: str
    overrides: tuple[str, ...]
    settings: Settings

    @property
    def name(self) -> str:
        return f"{self.family} | {self.attention} | {self.backbone}"

    @property
    def key(self) -> str:
        """A hash of all that decides what is measured, but for the code."""
        content = [self.overrides, [*self.settings.size], *list(vars(self.settings).values())[1:]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Request:
    """What was typed.

    Attributes:
        families: rows.
        attentions: columns.
        backbones: tables.
        columns: the group that ``attentions`` choose from.
        below: overrides of every cell, below those of its entries.
        above: the same, above them.
        settings: how cells are measured.
        jobs: cells at once.
        folder: of all results.
    """

    families: tuple[Entry, ...]
    attentions: tuple[Entry, ...]
    backbones: tuple[Entry, ...]
    columns: str
    below: tuple[str, ...]
    above: tuple[str, ...]
    settings: Settings
    jobs: int
    folder: Path

    def cells(self) -> list[Cell]:
        """All cells, a backbone at a time."""
        order = itertools.product(self.backbones, self.families, self.attentions)
        return [self.cell(family, attention, backbone) for backbone, family, attention in order]

    def cell(self, family: Entry, attention: Entry, backbone: Entry) -> Cell:
        """The cell of three entries."""
        entries = (family, backbone, attention)
        chosen = [one.choice for one in entries if one.choice is not None]
        own = [word for one in entries for word in one.overrides]
        words = (*FIRST, *chosen, *self.below, *own, *self.above)
        return Cell(family.text, attention.text, backbone.text, words, self.settings)


def read_request(words: Sequence[str]) -> Request:
    """Understand the words after ``detfamily matrix``.

    Args:
        words: settings of configs/matrix.yaml; all else is overrides of every cell.

    Raises:
        ConfigError: a setting, group, choice or field that there is not, with the nearest ones.
    """
    known = list(read_yaml(configs_dir() / "matrix.yaml"))
    own = [word for word in words if _top(word) in known]
    above = tuple(word for word in words if word not in own)
    cfg = compose("matrix", own)
    columns = _column_group(cfg.columns)
    _check_above(above, known, columns)
    return Request(
        families=_entries("families", cfg.families, "family"),
        attentions=_entries("attentions", cfg.attentions, columns),
        backbones=_entries("backbones", cfg.backbones, "backbone"),
        columns=columns,
        below=tuple(map(str, cfg.overrides)),
        above=above,
        settings=_settings(cfg),
        jobs=_whole(cfg, "jobs", 1),
        folder=Path(str(cfg.output_dir)).expanduser(),
    )


def check_names(request: Request) -> None:
    """Compose some cells, so that each entry is in one: what goes for none of the cells tried is a slip.

    What only some cells refuse is no slip, but a result.

    Raises:
        ConfigError: an entry, or an override of all cells, that nothing can be composed with.
    """
    axes = {"families": request.families, "attentions": request.attentions, "backbones": request.backbones}
    fits: set[tuple[str, Entry]] = set()
    first_error: ConfigError | None = None
    for one in _diagonal(axes):
        error = _composition_error(request, one)
        first_error = first_error or error
        fits |= set() if error else set(one.items())
    if not fits and first_error is not None:
        raise first_error
    for axis, entry in ((axis, entry) for axis, entries in axes.items() for entry in entries):
        if (axis, entry) in fits:
            continue
        tried = list(_diagonal({**axes, axis: (entry,)}))
        errors = [_composition_error(request, one) for one in tried]
        if all(errors) and _composition_error(replace(request, below=(), above=()), tried[0]):
            raise ConfigError(f"{axis}: {entry.text!r}: {errors[0]}")


def _diagonal(axes: dict[str, tuple[Entry, ...]]) -> Iterator[dict[str, Entry]]:
    """As few combinations as have every entry once."""
    for index in range(max(map(len, axes.values()))):
        yield {axis: entries[index % len(entries)] for axis, entries in axes.items()}


def _composition_error(request: Request, entries: dict[str, Entry]) -> ConfigError | None:
    cell = request.cell(entries["families"], entries["attentions"], entries["backbones"])
    try:
        compose("train", cell.overrides)
    except ConfigError as error:
        return error
    return None


def _top(word: str) -> str:
    return word.partition("=")[0].lstrip("+~").partition(".")[0]


def _column_group(name: Any) -> str:
    options = [one for one in groups_of("train") if one not in _TAKEN]
    if name not in options:
        raise ConfigError(f"columns={name}: {nearest(str(name), options)}")
    return str(name)


def _check_above(above: Iterable[str], known: Sequence[str], columns: str) -> None:
    axes = {"family": "families", "backbone": "backbones", columns: "attentions"}
    fields = {*groups(), *to_container(compose("train", FIRST))}
    for word in above:
        top = _top(word)
        if top not in fields:
            raise ConfigError(
                f"{word!r}: there is no setting, group or field {top!r}: {nearest(top, [*known, *fields])}"
            )
        group = word.partition("=")[0]
        if group in axes or group == "experiment":
            raise ConfigError(f"{word!r} is what each cell has of its own: pass {axes.get(group, 'families')}=[...]")


def _entries(axis: str, given: Any, group: str) -> tuple[Entry, ...]:
    """The entries of an axis; all choices of its group where none are given."""
    choices = groups()[group]
    if given is None:
        return tuple(_entry(axis, name, group, choices) for name in choices)
    items = [given] if isinstance(given, str) else list(given)
    if not items:
        raise ConfigError(f"{axis} is empty: expected a list out of {', '.join(choices)}, or null for all of them")
    texts = [one if isinstance(one, str) else f"[{','.join(map(str, one))}]" for one in items]
    return tuple(_entry(axis, text, group, choices) for text in dict.fromkeys(texts))


def _entry(axis: str, text: str, group: str, choices: Sequence[str]) -> Entry:
    words = text.split()
    if not words or "=" in words[0]:
        return Entry(text, None, tuple(words))
    for name in words[0].strip("[]").split(","):
        if name not in choices:
            raise ConfigError(f"{axis}: {group} has no choice {name!r}: {nearest(name, choices)}")
    for word in words[1:]:
        if "=" not in word:
            raise ConfigError(f"{axis}: {text!r}: expected a choice, and overrides behind it; {word!r} is none")
    return Entry(text, f"{group}={words[0]}", tuple(words[1:]))


def _settings(cfg: DictConfig) -> Settings:
    size = list(cfg.size)
    if len(size) != 2 or not all(isinstance(one, int) and not isinstance(one, bool) for one in size):
        raise ConfigError(f"size is {size}; expected [height, width] in pixels")
    for one in size:
        require_at_least(64, "size", one, "pixels for some cells of C5")
    numbers = (_whole(cfg, name, 1) for name in ("batch_size", "num_classes", "repeats"))
    return Settings((int(size[0]), int(size[1])), *numbers)


def _whole(cfg: DictConfig, name: str, least: int) -> int:
    require_at_least(least, name, cfg[name])
    return int(cfg[name])
