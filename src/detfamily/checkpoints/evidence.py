"""A foreign state dict and the settings stored beside it, asked with clear errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detfamily.errors import CheckpointError


class Evidence:
    """The tensors of a state dict and the settings stored beside them, asked with clear errors.

    Args:
        state: official names.
        args: the official settings; empty where the file has none.
        source: the file, for messages.
        num_heads: of the attentions, where the user says it; otherwise the settings tell.
    """

    def __init__(
        self, state: Mapping[str, Tensor], args: Mapping[str, Any], source: str, num_heads: int | None = None
    ) -> None:
        self.state, self.source = state, source
        self.args = dict(args) if num_heads is None else {**args, "nheads": num_heads}
        self.assumed: dict[str, str] = {}
        self.doubts: list[str] = []

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that every file of its kind has.

        Raises:
            CheckpointError: it is missing, or has another number of axes.
        """
        if name not in self.state:
            raise CheckpointError(f"{self.source} is incomplete: {name} is missing, which tells what model it is")
        shape = tuple(self.state[name].shape)
        if len(shape) != dims or 0 in shape:
            raise CheckpointError(f"{self.source}: {name} has the shape {list(shape)}, expected {dims} axes")
        return shape

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name starts so."""
        return any(name.startswith(prefix) for name in self.state)

    def count(self, prefix: str) -> int:
        """How many numbered parts follow a prefix: the largest number + 1."""
        numbers = [name.removeprefix(prefix).partition(".")[0] for name in self.state if name.startswith(prefix)]
        return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)

    def same(self, prefix: str, other: str) -> bool:
        """Whether the tensors under two prefixes are equal, as far as both are there: copies may be left out."""
        pairs = ((name, other + name.removeprefix(prefix)) for name in self.state if name.startswith(prefix))
        return all(torch.equal(self.state[one], self.state[two]) for one, two in pairs if two in self.state)

    def told(self, key: str, official: str, default: Any, why: str) -> Any:
        """A setting that no tensor tells: the stored one, else a default that is reported under ``key``.

        Raises:
            CheckpointError: the stored one is of another kind than the default.
        """
        if official not in self.args:
            self.assumed[key] = why
            return default
        value = self.args[official]
        wrong = type(value) is not type(default) and not (isinstance(default, float) and type(value) is int)
        if wrong or (not isinstance(default, (bool, str)) and not value >= 0) or (type(value) is int and value > 10**6):
            raise CheckpointError(
                f"{self.source}: its stored setting {official} is {value!r}, expected something like {default!r}"
            )
        return value

    def doubt(self, official: str, value: Any) -> None:
        """Note where a stored setting says something else than the tensors."""
        stored = self.args.get(official, value)
        if stored != value:
            self.doubts.append(f"its stored setting {official} is {stored!r}, its tensors are of {value!r}")
