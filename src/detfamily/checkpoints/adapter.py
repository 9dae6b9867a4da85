"""Renaming tensors between another repository's names and ours, in both directions.

A rule pairs one of our names with one or several official ones (some official code lists a shared tensor under several
names). Names are templates: ``{n}`` and ``{m}`` stand for numbers, ``{rest}`` for the rest of the name, and each means
the same on both sides. The first rule that fits decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from detfamily.errors import CheckpointError

_PLACES = {"{n}": r"(?P<n>\d+)", "{m}": r"(?P<m>\d+)", "{rest}": r"(?P<rest>.+)"}


@dataclass(frozen=True)
class Form:
    """The same numbers in another shape or order.

    Attributes:
        to_ours: from an official tensor.
        to_official: the way back.
    """

    to_ours: Callable[[Tensor], Tensor]
    to_official: Callable[[Tensor], Tensor]


SAME = Form(lambda tensor: tensor, lambda tensor: tensor)

CONVOLUTION = Form(lambda tensor: tensor[..., 0, 0], lambda tensor: tensor[..., None, None])
"""Of weights that are a 1 x 1 convolution's officially, and a linear layer's here."""


@dataclass(frozen=True)
class Rename:
    """One of our tensors, under the official names; the official tensors are equal.

    Attributes:
        ours: our name.
        official: their names.
        form: of the official tensors.
        computed: official tensors that hold nothing new, each with how it follows from this one: files have them, but
            nobody needs to read them.
    """

    ours: str
    official: tuple[str, ...]
    form: Form = SAME
    computed: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = ()


@dataclass(frozen=True)
class Join:
    """Several of our tensors make up one official tensor, one after another along ``dim``, in some form."""

    ours: tuple[str, ...]
    official: str
    dim: int
    form: Form = SAME


Rule = Rename | Join


class Adapter:
    """Renames whole state dicts, and whatever else goes by parameter names (gradients).

    Args:
        rules: in order of precedence.
        ignored: official names that may be left unused (regular expressions).
    """

    def __init__(self, rules: Sequence[Rule], ignored: Sequence[str] = ()) -> None:
        self.rules = tuple(rules)
        self.ignored = tuple(re.compile(pattern) for pattern in ignored)

    def to_ours(self, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official tensors under our names.

        Raises:
            CheckpointError: names that no rule knows; or tensors that must be one and differ.
        """
        ours: dict[str, Tensor] = {}
        unknown = []
        for name, tensor in official.items():
            if self._is_computed(name):
                continue
            found = self._rule_and_names(name)
            if found is None:
                if not self.ignores(name):
                    unknown.append(name)
                continue
            rule, targets = found
            tensor = rule.form.to_ours(tensor)
            parts = tensor.chunk(len(targets), dim=rule.dim) if isinstance(rule, Join) else [tensor]
            for target, part in zip(targets, parts, strict=True):
                if target in ours and not torch.equal(ours[target], part):
                    raise CheckpointError(f"{name} should be a copy of what {target} has already, and differs from it")
                ours[target] = part
        if unknown:
            raise CheckpointError(f"official names without a counterpart: {listed(unknown)}")
        return ours

    def to_official(self, ours: Mapping[str, Tensor], computed: bool = False) -> dict[str, Tensor]:
        """Our tensors under the official names, every copy included.

        Args:
            ours: a state dict, or whatever else goes by its names.
            computed: add the official tensors that follow from others; only for weights.

        Raises:
            CheckpointError: names that no rule knows; or parts of a joined tensor are missing.
        """
        official: dict[str, Tensor] = {}
        unknown = []
        for name, tensor in ours.items():
            rule = self._rule_for(name)
            if rule is None:
                unknown.append(name)
            elif isinstance(rule, Join):
                fitting = _fitting(rule.ours, name)
                parts, whole = [_fill(fitting, part, name) for part in rule.ours], _fill(fitting, rule.official, name)
                missing = [part for part in parts if part not in ours]
                if missing:
                    raise CheckpointError(f"{whole} is made of {parts}, and {missing} is missing")
                official[whole] = rule.form.to_official(torch.cat([ours[part] for part in parts], rule.dim))
            else:
                formed = rule.form.to_official(tensor)
                official |= {_fill(rule.ours, template, name): formed for template in rule.official}
                if computed:
                    official |= {_fill(rule.ours, template, name): of(tensor) for template, of in rule.computed}
        if unknown:
            raise CheckpointError(f"our names without an official counterpart: {listed(unknown)}")
        return official

    def official_name(self, ours: str) -> str:
        """The (first) official name of one of our tensors; our own where there is none."""
        rule = self._rule_for(ours)
        if rule is None:
            return ours
        if isinstance(rule, Join):
            return _fill(_fitting(rule.ours, ours), rule.official, ours)
        return _fill(rule.ours, rule.official[0], ours)

    def our_names(self, official: str) -> tuple[str, ...]:
        """Our tensors that an official one becomes or follows from; none if no rule fits."""
        found = self._rule_and_names(official)
        return () if found is None else found[1]

    def ignores(self, official: str) -> bool:
        """Whether an official tensor may be left unused."""
        return any(pattern.search(official) for pattern in self.ignored)

    def _rule_and_names(self, official: str) -> tuple[Rule, tuple[str, ...]] | None:
        """The rule for an official tensor, and our names for it."""
        for rule in self.rules:
            if isinstance(rule, Join):
                if _fits(rule.official, official):
                    return rule, tuple(_fill(rule.official, one, official) for one in rule.ours)
                continue
            for template in (*rule.official, *(one for one, _ in rule.computed)):
                if _fits(template, official):
                    return rule, (_fill(template, rule.ours, official),)
        return None

    def _is_computed(self, official: str) -> bool:
        renames = (rule for rule in self.rules if isinstance(rule, Rename))
        return any(_fits(template, official) for rule in renames for template, _ in rule.computed)

    def _rule_for(self, ours: str) -> Rule | None:
        for rule in self.rules:
            names = rule.ours if isinstance(rule, Join) else (rule.ours,)
            if any(_fits(name, ours) for name in names):
                return rule
        return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    for place, pattern in _PLACES.items():
        escaped = escaped.replace(re.escape(place), pattern)
    return re.compile(escaped)


def _fits(template: str, name: str) -> bool:
    return _pattern(template).fullmatch(name) is not None


def _fitting(templates: Sequence[str], name: str) -> str:
    """The template that fits."""
    return next(template for template in templates if _fits(template, name))


def _fill(source: str, target: str, name: str) -> str:
    """Put into the target template what stands at the places of the source template in the name."""
    found = _pattern(source).fullmatch(name)
    assert found is not None
    return target.format(**found.groupdict())


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
