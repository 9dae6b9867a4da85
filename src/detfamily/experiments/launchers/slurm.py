"""``launcher=slurm``: jobs of SLURM, through submitit."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from detfamily.errors import ConfigError, LaunchError, nearest, require_at_least
from detfamily.experiments.hold import Hold, is_held
from detfamily.experiments.launchers.base import Job, Launcher, Order, Outcome, known_job, outcome_of, submitted
from detfamily.experiments.launchers.work import Work
from detfamily.experiments.notes import forget_job, note, read_state
from detfamily.experiments.results import CUT_OFF, FINISHED, QUEUED, RUNNING

FILES = "slurm"  # folder of submitit's files in a run folder
GRACE = 20.0  # seconds until what a machine wrote last is seen on another one
ASK = 1.0  # seconds between two looks at a job


@dataclass(frozen=True)
class SlurmOptions:
    """Words that begin with ``slurm.``; None leaves it to the cluster.

    Attributes:
        cluster: ``slurm``, or ``local``: the same on this machine, to try it out.
        partition, account, qos, constraint, gres, exclude, nodelist, comment: as of sbatch.
        time: minutes; a job that has not finished by then saves, is queued again, and goes on.
        gpus_per_node: of each run; more than 1: its processes are started by ``torchrun``; 0: a run on the CPU.
        cpus_per_task: cores of each run.
        mem_gb: memory of each run.
        setup: lines of the shell before each run, such as ``module load cuda``.
        signal_delay_s: seconds before the end of the time in which the run saves.
        requeues: how often a run goes on after its time or its machine was taken.
        additional: further options of sbatch, {"reservation": "mine"}.
    """

    cluster: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    comment: str | None = None
    time: int = 1440
    gpus_per_node: int = 1
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    setup: list[str] = field(default_factory=list)
    signal_delay_s: int = 120
    requeues: int = 20
    additional: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cluster not in ("slurm", "local"):
            raise ConfigError(f"slurm.cluster={self.cluster}: {nearest(self.cluster, ('slurm', 'local'))}")
        for name, least in (("time", 1), ("gpus_per_node", 0), ("signal_delay_s", 1), ("requeues", 0)):
            require_at_least(least, f"slurm.{name}", getattr(self, name))

    def parameters(self) -> dict[str, Any]:
        """The same in submitit's words."""
        own = ("partition account qos constraint gres exclude nodelist comment signal_delay_s").split()
        special: dict[str, Any] = {f"slurm_{name}": getattr(self, name) for name in own}
        special |= {"slurm_setup": self.setup or None, "slurm_additional_parameters": self.additional or None}
        return {
            "timeout_min": self.time,
            "gpus_per_node": self.gpus_per_node or None,
            "cpus_per_task": self.cpus_per_task,
            "mem_gb": self.mem_gb,
            **special,
        }


class SlurmLauncher(Launcher):
    """Jobs of SLURM, one for each run; they go on when the caller leaves.

    Args:
        options: what was typed.

    Raises:
        ConfigError: submitit is not installed, or there is no SLURM here.
    """

    name = "slurm"
    detached = True

    def __init__(self, options: SlurmOptions) -> None:
        self.options, self.submitit = options, _submitit()
        if options.cluster == "slurm" and shutil.which("srun") is None:
            raise ConfigError("launcher=slurm: there is no srun here; start it on a login node of the cluster")
        self.threads, self.retries = options.cpus_per_task, options.requeues
        self.processes = max(1, options.gpus_per_node)

    def start(self, order: Order, hold: Hold) -> Job:
        options = self.options
        executor = self.submitit.AutoExecutor(
            order.folder.resolve() / FILES,
            cluster=options.cluster,
            **{f"{options.cluster}_max_num_timeout": options.requeues},
        )
        parameters = {**options.parameters(), "name": f"detfamily-{order.folder.parent.name}"}
        executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        order = replace(
            order,
            folder=order.folder.resolve(),
            device=order.device if options.gpus_per_node else "cpu",
            gpus=float(max(1, options.gpus_per_node)),
        )
        try:
            job = executor.submit(Work(order))
        except (RuntimeError, OSError) as error:  # what sbatch answers
            raise LaunchError(f"SLURM does not take it: {str(error).strip() or type(error).__name__}") from None
        record = {"launcher": self.name, "cluster": options.cluster, "id": str(job.job_id)}
        submitted(order, hold, record)
        return SlurmJob(order.folder, job, record)

    def attach(self, folder: Path) -> Job | None:
        record = known_job(folder, self.name)
        if record is None:
            return None
        made = self.submitit.LocalJob if record["cluster"] == "local" else self.submitit.SlurmJob
        found = SlurmJob(folder, made(folder.resolve() / FILES, record["id"]), record)
        return None if found.has_ended() else found

    def leave(self, jobs: list[Job]) -> str:
        ids = " ".join(one.record["id"] for one in jobs if isinstance(one, SlurmJob))
        command = "scancel" if self.options.cluster == "slurm" else "kill"
        return f"{command} {ids} ends them; they save first"


class SlurmJob(Job):
    """A run that SLURM has.

    Args:
        folder: of the run.
        job: submitit's.
        record: what ``job.json`` says of it.
    """

    def __init__(self, folder: Path, job: Any, record: dict[str, str]) -> None:
        self.folder, self.job, self.record = folder, job, record
        self.words = f"job {record['id']} of {'SLURM' if record['cluster'] == 'slurm' else 'submitit, here'}"
        self._asked = self._ended_at = float("-inf")

    def has_ended(self) -> bool:
        """Whether there is no such job any more, whatever the run's folder says."""
        if self.record["cluster"] == "local" and not self.job.paths.result_pickle.exists():
            # submitit knows such a job only while it lives in the process that has submitted it.
            return self.job.done() and not (_is_alive(int(self.record["id"])) or is_held(self.folder))
        if self.job.done():
            return True
        # An accounting that has forgotten the job, or that there is not: then the run itself has to give signs of life.
        running = read_state(self.folder).get("status") == RUNNING
        return self.job.state == "UNKNOWN" and running and not is_held(self.folder)

    def poll(self) -> bool:
        now = time.monotonic()
        if now - self._asked < ASK:
            return False
        self._asked = now
        if not self.has_ended():
            self._ended_at = float("-inf")
            return False
        if self._ended_at == float("-inf"):
            self._ended_at = now
        # The last words of another machine take a moment to be seen here.
        under_way = read_state(self.folder).get("status") in (QUEUED, RUNNING)
        return not under_way or now - self._ended_at > GRACE

    def stop(self) -> None:
        self.job.cancel(check=False)

    def kill(self) -> None:
        self.job.cancel(check=False)

    def close(self) -> Outcome:
        state = "" if self.record["cluster"] == "local" else str(self.job.get_info(mode="force").get("State", ""))
        forget_job(self.folder)
        outcome = outcome_of(self.folder, f"{self.words} ended without a word ({state or 'its process is gone'})")
        if state.startswith("CANCELLED") and read_state(self.folder).get("status") != FINISHED:
            note(self.folder, status=CUT_OFF)
            return Outcome(f"{self.words} was cancelled")
        return outcome


def _is_alive(pid: int) -> bool:
    """Whether a process of submitit's has that number: it may be another one's by now, or that of a zombie."""
    try:
        os.kill(pid, 0)
        return not Path("/proc/self").exists() or b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except ProcessLookupError:
        return False
    except OSError:
        return not Path("/proc/self").exists()


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise ConfigError("launcher=slurm needs submitit: pip install 'detfamily[launchers]'") from None
    return submitit
