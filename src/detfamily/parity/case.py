"""A golden case on disk: what the official code was given, and what it gave."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from detfamily.errors import DataError

MUST_COMPARE = frozenset({"output", "loss", "match", "detections", "gradient", "training", "pixels"})


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        folder: where it lies; its parent's name is the family.
        info: ``case.json``.
        io: inputs and results by key; empty where the case stores them otherwise.
        weights: the official state dict; empty where the case has no model.
    """

    folder: Path
    info: dict[str, Any]
    io: dict[str, Tensor]
    weights: dict[str, Tensor]

    @property
    def family(self) -> str:
        return self.folder.parent.name

    @property
    def name(self) -> str:
        return f"{self.family}/{self.folder.name}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: float32, or float64 in exact cases."""
        return next((w.dtype for w in self.weights.values() if w.is_floating_point()), torch.float32)

    @property
    def by_formula(self) -> bool:
        """Whether the weights are computed instead of stored."""
        return not (self.folder / "weights.safetensors").is_file()

    @property
    def loss_settings(self) -> dict[str, Any]:
        """Settings of matcher and losses by their official names, wherever in the json they stand."""
        stated = self.info["matcher_and_loss"]
        return {**self.info["args"], **stated, **stated.get("args", {})}

    def to(self, dtype: torch.dtype) -> Case:
        """The same case with all its numbers in another precision."""
        io, weights = (
            {key: value.to(dtype) if value.is_floating_point() else value for key, value in one.items()}
            for one in (self.io, self.weights)
        )
        return replace(self, io=io, weights=weights)

    def sub_cases(self) -> list[str]:
        """Prefixes under which losses or matches of other targets on the same model are stored; "" is the case."""
        found = {match[1] for key in self.io if (match := re.match(r"(.*?)(loss|match)\.", key))}
        return sorted(found)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Case:
        """Read a case, its tensors onto a device.

        Raises:
            DataError: the folder has no readable ``case.json``.
        """
        try:
            info = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise DataError(f"{folder} is not a golden case: {error}") from error
        io = load_file(folder / "io.safetensors") if (folder / "io.safetensors").is_file() else {}
        io, weights = ({key: value.to(device) for key, value in one.items()} for one in (io, _weights(folder)))
        return cls(folder.resolve(), info, io, weights)


def find_cases(folder: Path) -> list[Path]:
    """The folders of all cases at or below a folder: a case, a family, or a folder of families.

    Raises:
        DataError: there is none.
    """
    # tensors without a case.json are a broken case, which must not go unnoticed
    found = sorted({path.parent for name in ("case.json", "io.safetensors") for path in folder.rglob(name)})
    if not found:
        raise DataError(f"no golden case (a folder with a case.json) at or below {folder}")
    return found


def role_of(key: str, folder: Path) -> str:
    """What a stored tensor is, by the rules of the nearest ``roles.json`` at or above the folder: the first that fits.

    Where there is none, the rules of ``DETFAMILY_GOLDENS`` or of ``shared/goldens`` beside the repository decide.

    Raises:
        DataError: no rule fits, or there are no rules.
    """
    for pattern, role in _rules(folder):
        if re.search(pattern, key):
            return str(role)
    raise DataError(f"roles.json has no rule for {key!r}")


def usual_folders() -> list[Path]:
    """Where golden cases lie, unless they are named."""
    named = os.environ.get("DETFAMILY_GOLDENS")
    beside = Path(__file__).resolve().parents[4] / "shared" / "goldens"
    return [*([Path(named)] if named else []), beside]


@cache
def _rules(folder: Path) -> list[tuple[str, str]]:
    for place in (folder, *folder.parents, *usual_folders()):
        if (place / "roles.json").is_file():
            return [(p, r) for p, r in json.loads((place / "roles.json").read_text(encoding="utf-8"))["rules"]]
    raise DataError(
        f"no roles.json at or above {folder}, nor in DETFAMILY_GOLDENS or shared/goldens beside the repository: "
        "it says which tensors must be compared"
    )


def _weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "weights.safetensors").is_file():
        return load_file(folder / "weights.safetensors")
    formula = folder / "weights_formula.json"
    if not formula.is_file():
        return {}
    tensors = json.loads(formula.read_text(encoding="utf-8"))["tensors"]
    return {name: _from_formula(spec) for name, spec in tensors.items()}


def _from_formula(spec: dict[str, Any]) -> Tensor:
    """Weights that are not stored but hashed from their index; the formula stands in the file."""
    count = int(np.prod(spec["shape"]))
    x = (np.arange(count, dtype=np.uint64) + np.uint64(spec["k"]) * np.uint64(0x9E3779B9)).astype(np.uint32)
    x ^= x >> np.uint32(16)
    x = x * np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x = x * np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    offset = np.asarray(spec["offset"], dtype=np.float64)
    values = offset + float(spec["scale"]) * (x.astype(np.float64) / 2.0**31 - 1)
    return torch.from_numpy(values.astype(np.float32)).reshape(spec["shape"])
