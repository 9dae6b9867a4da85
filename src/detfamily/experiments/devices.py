"""What a run computes on, and what it costs: hours of GPUs, or of the CPU's cores."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detfamily.experiments.launchers.base import Order

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Devices:
    """Of a run.

    Attributes:
        words: for people: "1 x NVIDIA H200", "2 threads of CPU".
        gpus: that it pays for, in parts where runs share one; 0: it runs on the CPU.
        cores: of the CPU that it pays for; 0: it runs on GPUs.
    """

    words: str
    gpus: float
    cores: int

    def spent(self, before: Mapping[str, Any], seconds: float) -> dict[str, float | None]:
        """What a run has taken after some more seconds.

        Args:
            before: ``seconds``, ``gpu_hours`` and ``core_hours`` up to then; those that are missing count as nothing.
            seconds: that came to it.

        Returns:
            The same fields; hours are None where nothing of the kind was used.
        """
        hours = seconds / 3600
        return {
            "seconds": round(float(before.get("seconds") or 0) + seconds, 2),
            "gpu_hours": _sum(before.get("gpu_hours"), hours * self.gpus),
            "core_hours": _sum(before.get("core_hours"), hours * self.cores),
        }


def spent_until_now(before: Mapping[str, Any], unseen: float) -> dict[str, float | None]:
    """What a run has taken up to its next start, at the price of its last part.

    Args:
        before: what ``run.json`` says.
        unseen: seconds of a part whose end nobody noted.
    """
    return Devices("", float(before.get("gpus") or 0), int(before.get("cores") or 0)).spent(before, unseen)


def devices_for(order: Order, environment: Mapping[str, str]) -> Devices:
    """The devices of a run on this machine, in its environment."""
    names = [] if order.device == "cpu" else visible(environment)
    if not names:
        cores = order.threads or _cores(environment)
        return Devices(f"{cores} thread{'s' * (cores > 1)} of CPU", 0.0, cores)
    count = max(1, round(order.gpus))
    return Devices(f"{count} x {names[0]}", order.gpus, 0)


def visible(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that a process with this environment may use."""
    names = _names()
    given = environment.get(VISIBLE)
    if given is None or not names:
        return list(names)
    chosen = [one.strip() for one in given.split(",") if one.strip()]
    return [names[int(one)] if one.isdigit() and int(one) < len(names) else names[0] for one in chosen if one != "-1"]


def places(environment: Mapping[str, str]) -> list[str]:
    """What a process of this environment may put into ``CUDA_VISIBLE_DEVICES``, one for each GPU."""
    given = environment.get(VISIBLE)
    if not _names():
        return []
    if given is None:
        return [str(index) for index in range(len(_names()))]
    return [one.strip() for one in given.split(",") if one.strip() not in ("", "-1")]


@functools.cache
def _names() -> tuple[str, ...]:
    """The GPUs of this machine, in the order of the bus; asked of the driver, without taking a context."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def _cores(environment: Mapping[str, str]) -> int:
    """Threads that torch takes where nobody says."""
    given = environment.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sum(before: float | None, more: float) -> float | None:
    return round(float(before or 0) + more, 6) or None
