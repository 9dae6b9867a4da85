"""``launcher=ray``: runs on a cluster of Ray, or on one of this machine alone that lives as long as the caller."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detfamily.errors import ConfigError
from detfamily.experiments.hold import Hold
from detfamily.experiments.launchers.base import Job, Launcher, Order, Outcome, known_job, outcome_of, submitted
from detfamily.experiments.launchers.work import Work
from detfamily.experiments.notes import forget_job, read_state
from detfamily.experiments.results import QUEUED, RUNNING

NAMESPACE = "detfamily"
GRACE = 20.0  # seconds until what a machine wrote last is seen on another one
THREADS = 4  # calls that an actor answers at once: waiting, stopping


@dataclass(frozen=True)
class RayOptions:
    """Words that begin with ``ray.``.

    Attributes:
        address: ``auto``, or where the cluster is; None: one of this machine, which ends with the caller.
        num_cpus: that each run takes.
        num_gpus: that each run takes; 0.5 puts two on one GPU. None: 1 where the cluster has GPUs, else 0.
        retries: how often a run is started again whose machine died.
    """

    address: str | None = None
    num_cpus: float = 2
    num_gpus: float | None = None
    retries: int = 20

    def __post_init__(self) -> None:
        for name in ("num_cpus", "num_gpus", "retries"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"ray.{name}={getattr(self, name)}: expected 0 or more")
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ConfigError(f"ray.num_gpus={self.num_gpus}: expected a part of one GPU, or whole ones")


class RayLauncher(Launcher):
    """Actors of Ray, one for each run, which live on without the caller where the cluster does.

    Args:
        options: what was typed.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """

    name = "ray"

    def __init__(self, options: RayOptions) -> None:
        self.ray = _ray()
        self.owned = not self.ray.is_initialized()
        if self.owned:
            self._join(options.address)
        self.detached = options.address is not None or not self.owned
        gpus = options.num_gpus
        if gpus is None:
            gpus = 1.0 if self.ray.cluster_resources().get("GPU") else 0.0
        self.resources = {"num_cpus": options.num_cpus, "num_gpus": gpus}
        self.threads, self.retries = max(1, int(options.num_cpus)), options.retries
        self.processes = max(1, int(gpus))

    def _join(self, address: str | None) -> None:
        # Without an address, init would still take the one of the environment.
        own = {"include_dashboard": False} if address is None else {}
        try:
            self.ray.init(address=address or "local", namespace=NAMESPACE, log_to_driver=False, **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"ray.address={address}: {str(error).splitlines()[0]}; ray.address=null starts a cluster on this "
                "machine, ray start --head one for others to join"
            ) from None

    def start(self, order: Order, hold: Hold) -> Job:
        gpus = self.resources["num_gpus"]
        order = replace(
            order,
            folder=order.folder.resolve(),
            device=order.device if gpus else "cpu",
            gpus=gpus or 1.0,
        )
        record = {"launcher": self.name, "actor": actor_name(order.folder)}
        made = self.ray.remote(Keeper).options(
            name=record["actor"],
            namespace=NAMESPACE,
            lifetime="detached",
            max_concurrency=THREADS,
            max_restarts=0,
            **self.resources,
        )
        actor = made.remote(order)
        submitted(order, hold, record)
        return RayJob(self.ray, order.folder, actor)

    def attach(self, folder: Path) -> Job | None:
        record = known_job(folder, self.name)
        if record is None:
            return None
        try:
            actor = self.ray.get_actor(record["actor"], namespace=NAMESPACE)
        except ValueError:
            return None
        return RayJob(self.ray, folder, actor)

    def leave(self, jobs: list[Job]) -> str:
        return "ray.kill(ray.get_actor(NAME)) ends one, which saves first; NAME is in its job.json"

    def close(self) -> None:
        if self.owned:
            self.ray.shutdown()


class RayJob(Job):
    """A run that Ray has.

    Args:
        ray: the package.
        folder: of the run.
        actor: that runs it.
    """

    def __init__(self, ray: Any, folder: Path, actor: Any) -> None:
        self.ray, self.folder, self.actor = ray, folder, actor
        self.words = f"actor {actor_name(folder.resolve())} of Ray"
        self.end = actor.wait.remote()
        self._ended_at: float | None = None

    def poll(self) -> bool:
        if self._ended_at is None:
            if not self.ray.wait([self.end], timeout=0)[0]:
                return False
            self._ended_at = time.monotonic()
        under_way = read_state(self.folder).get("status") in (QUEUED, RUNNING)
        return not under_way or time.monotonic() - self._ended_at > GRACE

    def stop(self) -> None:
        self.actor.stop.remote()

    def kill(self) -> None:
        with contextlib.suppress(Exception):  # it may be gone already
            self.ray.kill(self.actor)

    def close(self) -> Outcome:
        forget_job(self.folder)
        try:
            self.ray.get(self.end)
            lost = f"{self.words} ended without a word"
        except self.ray.exceptions.RayError as error:
            lost = f"{self.words} is gone ({type(error).__name__})"
        return outcome_of(self.folder, lost)


class Keeper:
    """The actor: runs an order in a thread of its own, and ends itself, so that nobody has to be there for it."""

    def __init__(self, order: Order) -> None:
        import ray

        self.me = ray.get_runtime_context().current_actor
        self.work, self.done = Work(order), threading.Event()
        threading.Thread(target=self._go, daemon=True).start()

    def _go(self) -> None:
        import ray

        try:
            self.work()
        finally:
            self.done.set()
            ray.kill(self.me)

    def wait(self) -> None:
        """Answers when the run has ended."""
        self.done.wait()

    def stop(self) -> None:
        """Let the run save and leave."""
        self.work.stop()


def actor_name(folder: Path) -> str:
    """The name of the actor of a run: the same in every call."""
    return f"{folder.parent.name}-{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("launcher=ray needs Ray: pip install 'detfamily[launchers]'") from None
    return ray
