"""``launcher=`` and the words of each launcher, such as ``slurm.time=720``."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from detfamily.config.containers import raise_all
from detfamily.config.type_hints import value_problems
from detfamily.errors import ConfigError, nearest
from detfamily.experiments.launchers.base import Launcher
from detfamily.experiments.launchers.local import LocalLauncher, LocalOptions
from detfamily.experiments.launchers.ray import RayLauncher, RayOptions
from detfamily.experiments.launchers.slurm import SlurmLauncher, SlurmOptions

Options = LocalOptions | SlurmOptions | RayOptions
OPTIONS: Mapping[str, type[Options]] = {"local": LocalOptions, "slurm": SlurmOptions, "ray": RayOptions}


def is_option(word: str) -> bool:
    """Whether a word is one of a launcher's: ``slurm.time=720``."""
    return word.partition(".")[0] in OPTIONS and "." in word.partition("=")[0]


def read_options(name: str, words: Mapping[str, str]) -> Options:
    """Understand the words of a launcher.

    Args:
        name: of the launcher.
        words: ``slurm.time`` -> ``720``.

    Raises:
        ConfigError: there is no such launcher or word, or a value does not fit.
    """
    if name not in OPTIONS:
        raise ConfigError(f"launcher={name}: {nearest(name, OPTIONS)}")
    hints = typing.get_type_hints(OPTIONS[name])
    known = [f"{name}.{one.name}" for one in fields(OPTIONS[name])]
    given: dict[str, Any] = {}
    for word, text in words.items():
        if (owner := word.partition(".")[0]) != name:
            raise ConfigError(f"{word}={text} is a word of launcher={owner}, and this is launcher={name}")
        if word not in known:
            raise ConfigError(f"there is no {word}: {nearest(word, known)}")
        field = word.partition(".")[2]
        given[field] = _value(word, text, hints[field])
    raise_all(
        problem for field, value in given.items() for problem in value_problems(value, hints[field], (name, field))
    )
    return OPTIONS[name](**given)


def make_launcher(options: Options, jobs: int, device: str = "auto") -> Launcher:
    """The launcher that the options are of.

    Args:
        options: of ``read_options``.
        jobs: runs at once, at the most.
        device: ``runtime.device`` of the runs.

    Raises:
        ConfigError: what it needs is not installed, or not there.
    """
    if isinstance(options, SlurmOptions):
        return SlurmLauncher(options)
    return RayLauncher(options) if isinstance(options, RayOptions) else LocalLauncher(options, jobs, device)


def default_jobs(name: str) -> int | None:
    """Runs at once where the user does not say; None: all, since a cluster has a queue of its own."""
    return 1 if name == LocalLauncher.name else None


def _value(word: str, text: str, hint: Any) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{word}={text} cannot be read: {str(error).splitlines()[0]}") from None
    # The shell takes quotes away: a partition or an account may be a number by its looks.
    return text if hint == (str | None) and value is not None else value
