"""``launcher=local``: processes of this machine, each on one of its GPUs where it has some."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from detfamily.errors import require_at_least
from detfamily.experiments.devices import VISIBLE, places
from detfamily.experiments.hold import Hold
from detfamily.experiments.launchers.base import Job, Launcher, Order
from detfamily.experiments.launchers.child import Child


@dataclass(frozen=True)
class LocalOptions:
    """Words that begin with ``local.``.

    Attributes:
        gpus: of each run; more than 1: its processes are started by ``torchrun``.
    """

    gpus: int = 1

    def __post_init__(self) -> None:
        require_at_least(1, "local.gpus", self.gpus, "runs on the CPU: runtime.device=cpu")


class LocalLauncher(Launcher):
    """Processes of this machine.

    GPUs are given to the run that starts in turn, those first that have the fewest runs; where
    ``CUDA_VISIBLE_DEVICES`` is set, only those that it names.

    Args:
        options: what was typed.
        jobs: runs at once, which share the GPUs or the threads of the CPU.
        device: ``runtime.device`` of the runs.
        environment: of this process; ``os.environ`` by default.
    """

    name = "local"

    def __init__(
        self, options: LocalOptions, jobs: int = 1, device: str = "auto", environment: Mapping[str, str] | None = None
    ) -> None:
        self.places = [] if device == "cpu" else places(os.environ if environment is None else environment)
        self.wanted = options.gpus
        if self.wanted > 1:
            require_at_least(self.wanted, "the number of GPUs here", len(self.places), f"local.gpus={self.wanted}")
        self.processes = self.wanted
        self.threads = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
        # Of the runs at once, so many share a GPU, and its cost.
        self.share = max(1, math.ceil(jobs * self.wanted / len(self.places))) if self.places else 1
        self.load: Counter[str] = Counter()

    def start(self, order: Order, hold: Hold) -> Job:
        chosen = sorted(self.places, key=lambda place: (self.load[place], self.places.index(place)))[: self.wanted]
        variables = {VISIBLE: ",".join(chosen), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if chosen else {}
        order = replace(order, environment={**order.environment, **variables}, gpus=self.wanted / self.share)
        child = _Placed(order, hold, self.load, chosen)
        self.load.update(chosen)
        return child


class _Placed(Child):
    """A process that gives its GPUs back when it ends."""

    def __init__(self, order: Order, hold: Hold, load: Counter[str], places: list[str]) -> None:
        super().__init__(order, hold)
        self.load, self.places = load, places

    def poll(self) -> bool:
        ended = super().poll()
        if ended:
            self.load.subtract(self.places)
            self.places = []
        return ended
