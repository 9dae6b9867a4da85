"""Runs golden cases, and judges every stored result: equal, different, or not compared."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from detfamily.errors import DataError, nearest
from detfamily.parity import families
from detfamily.parity.case import MUST_COMPARE, Case, find_cases, role_of
from detfamily.parity.compare import detections_ratio, error_ratio


@dataclass
class Verdict:
    """What became of one case.

    Attributes:
        name: family/case.
        compared: results held against ours.
        missing: results that our side did not compute: a failure.
        ignored: number of stored tensors by the role for which they need no comparison.
        worst: the largest error as a multiple of its limit, and its key.
        failed: keys beyond their limit.
        in_double: gradients beyond their limit in float32, and within it when all is computed in float64.
        error: why the case could not be run at all.
    """

    name: str
    compared: int = 0
    missing: list[str] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    worst: tuple[float, str] = (0.0, "")
    failed: list[str] = field(default_factory=list)
    in_double: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def passed(self) -> bool:
        """Everything that must be compared was, at least one thing, and nothing is beyond its limit."""
        return not (self.error or self.missing or self.failed) and self.compared > 0

    def take(self, key: str, ratio: float) -> None:
        self.compared += 1
        if not ratio <= self.worst[0]:
            self.worst = (ratio, key)
        if not ratio <= 1:
            self.failed.append(key)


def check(folders: Sequence[Path], device: str = "cpu") -> list[Verdict]:
    """Run every case at or below the folders, on one thread, where the official code is reproducible.

    Attention is computed step by step, as the official code does it: PyTorch's fused kernel for CPUs gives gradients of
    queries and keys that are dozens of times less exact, near the limits in some cases.

    Args:
        folders: cases, families, or folders of families.
        device: where to compute; only some families can do so elsewhere than on the CPU.

    Raises:
        DataError: a folder holds no case.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return [_judge(path, device) for folder in folders for path in find_cases(folder)]
    finally:
        torch.set_num_threads(threads)


def report(verdicts: Sequence[Verdict], console: Console) -> bool:
    """Print the table; whether all cases passed."""
    table = Table(title="golden cases", caption="errors are multiples of their limit: up to 1 passes")
    for column in ("case", "compared", "not compared, and why", "worst error", "where", ""):
        table.add_column(column, overflow="fold")
    for one in verdicts:
        why = ", ".join(f"{count} {role}" for role, count in sorted(one.ignored.items()))
        table.add_row(
            one.name, str(one.compared), why, f"{one.worst[0]:.3f}", one.worst[1], "ok" if one.passed else "FAILED"
        )
    console.print(table)
    for one in verdicts:
        if one.error:
            console.print(f"{one.name}: {one.error}", markup=False)
        if one.in_double:
            where = f"{len(one.in_double)} gradients compared in float64, at a kink: {_few(one.in_double)}"
            console.print(f"{one.name}: {where}", markup=False)
        if one.missing:
            console.print(f"{one.name}: {len(one.missing)} results not computed: {_few(one.missing)}", markup=False)
        if one.failed:
            console.print(f"{one.name}: {len(one.failed)} beyond the limit: {_few(one.failed)}", markup=False)
        if not one.compared and not one.error:
            console.print(f"{one.name}: nothing to compare", markup=False)
    return bool(verdicts) and all(one.passed for one in verdicts)


def _few(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _judge(folder: Path, device: str) -> Verdict:
    folder = folder.resolve()
    verdict = Verdict(f"{folder.parent.name}/{folder.name}")
    try:
        family = _family(folder.parent.name)
        if device != "cpu" and not getattr(family, "ANY_DEVICE", False):
            raise DataError(f"this family is computed on the CPU only, not on {device}")
        case = Case.load(folder, device)
        ours = {key: value.cpu() for key, value in family.results(case).items()}
        roles = {key: (value, role_of(key, case.folder)) for key, value in case.io.items()}
        roles |= family.expected(case) if hasattr(family, "expected") else {}
    except Exception as error:  # whatever is wrong with one case must not hide the verdicts on the others
        verdict.error = f"{type(error).__name__}: {error}"
        return verdict
    stored = {key: value.cpu() for key, (value, _) in roles.items()}
    ours |= _gradients_at_kinks(verdict, family, case, roles, ours)
    for key, (_, role) in roles.items():
        _compare(verdict, key, role, stored, ours)
    return verdict


def _gradients_at_kinks(
    verdict: Verdict, family: ModuleType, case: Case, roles: dict[str, tuple[Tensor, str]], ours: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients from float64, where float32 is beyond the limit and float64 is not.

    A bilinear sample that falls between two pixels to the last bit has one gradient on this side and another on that
    one. There are tens of thousands of samples in a case, so in some cases rounding decides on one of them; float64
    tells whether that is all there is to a difference.
    """
    beyond = [
        key
        for key, (value, role) in roles.items()
        if role == "gradient" and key in ours and not error_ratio(role, value.cpu(), ours[key], key) <= 1
    ]
    if not beyond or case.dtype != torch.float32:
        return {}
    try:
        exact = {key: value.cpu() for key, value in family.results(case.to(torch.float64)).items()}
    except Exception:  # the family cannot do it, so float32 is judged
        return {}
    found = {key: exact[key].float() for key in beyond if key in exact}
    verdict.in_double = [k for k, one in found.items() if error_ratio("gradient", roles[k][0].cpu(), one, k) <= 1]
    return {key: found[key] for key in verdict.in_double}


def _compare(verdict: Verdict, key: str, role: str, stored: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    if role not in MUST_COMPARE:
        verdict.ignored[role] = verdict.ignored.get(role, 0) + 1
    elif key not in ours:
        verdict.missing.append(key)
    elif role == "detections":
        image, _, part = key.rpartition(".")
        names = ("scores", "labels", "boxes")
        if not all(f"{image}.{name}" in side for name in names for side in (stored, ours)):
            verdict.missing.append(key)
            return
        ratio, where = detections_ratio(
            {name: stored[f"{image}.{name}"] for name in names}, {name: ours[f"{image}.{name}"] for name in names}
        )
        verdict.take(key, ratio if part == where or ratio == float("inf") else 0.0)
    else:
        verdict.take(key, error_ratio(role, stored[key], ours[key], key))


def _family(name: str) -> ModuleType:
    known = [module.name for module in pkgutil.iter_modules(families.__path__)]
    if name not in known:
        raise DataError(f"unknown family {name!r} (the name of the folder above the case); {nearest(name, known)}")
    return importlib.import_module(f"{families.__name__}.{name}")
