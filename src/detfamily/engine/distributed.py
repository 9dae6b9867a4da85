"""Several processes on one task, started by ``torchrun``: who am I, and what do the others have.

What travels between the processes here are small things of the host (counts, wishes, results); gradients are averaged
by ``DistributedDataParallel``. With one process every call is free of communication.
"""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detfamily.errors import ConfigError, DetfamilyError, ElsewhereError

Value = TypeVar("Value")

_RUNS = itertools.count()

# What gloo, NCCL and the store say when a process at the other end is gone; they have no type for it.
_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)

# Long enough for the main process to score a large validation set while the others wait.
TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this process, from 0; 0 is the main one, which prints and writes files.
        size: number of processes.
        local_rank: number of this process on its machine, which is its accelerator's number.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str = "") -> None:
        """Print, in the main process only."""
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process do something (download, generate, cache) before the others find it done."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up the tensors of all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def minimum(self, tensor: Tensor) -> Tensor:
        """The least of all processes' tensors, element by element, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Everyone's row of host numbers; all rows have one length. The device takes no part."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return [mine.tolist()]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return [row.tolist() for row in rows]

    def gather_objects(self, value: Value) -> list[Value]:
        """Everyone's object, in the main process; the others get an empty list."""
        if self.size == 1:
            return [value]
        received: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, received, dst=0)
        return received or []

    def from_main(self, value: Value) -> Value:
        """The main process' object, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def end_together(self, error: DetfamilyError | None) -> None:
        """End all processes, since one at least has met an error; a call of all, once all know that there is one.

        Args:
            error: of this process, if it is one of those.

        Raises:
            DetfamilyError: the first process' error in the main one, which reports it; ElsewhereError in the others.
        """
        errors = [one for one in self.gather_objects(error) if one is not None]
        raise errors[0] if self.is_main else ElsewhereError("another process has met an error")

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the main one's buffers (running statistics drift apart, as each sees other images)."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


@contextmanager
def join(device_type: str) -> Iterator[World]:
    """Meet the other processes that ``torchrun`` started, and part from them at the end.

    Args:
        device_type: ``cpu`` (gloo) or ``cuda`` (nccl for what lies on the devices, gloo for the host).

    Raises:
        ConfigError: more processes on this machine than it has accelerators.
        ElsewhereError: another process is gone.
    """
    world = _from_environment()
    if device_type == "cuda":
        wanted = int(os.environ.get("LOCAL_WORLD_SIZE", world.local_rank + 1))
        if wanted > torch.cuda.device_count():  # all processes find this, so that the first one can say it
            raise ConfigError(
                f"{wanted} processes on this machine, but {torch.cuda.device_count()} GPUs: start torchrun with "
                "--nproc-per-node of at most that number"
            )
        torch.cuda.set_device(world.local_rank)
    if world.size == 1 or dist.is_initialized():
        yield world
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        store=_store(),
        rank=world.rank,
        world_size=world.size,
        timeout=TIMEOUT,
    )
    try:
        with warnings.catch_warnings():
            if not world.is_main:
                warnings.simplefilter("ignore")
            yield world
    except RuntimeError as error:
        if isinstance(error, DetfamilyError) or not _LOST.search(str(error)):
            raise
        raise ElsewhereError("the connection to another process is gone: it has ended, or was killed") from error
    finally:
        dist.destroy_process_group()


def _from_environment() -> World:
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return World(rank=rank, size=size, local_rank=int(os.environ.get("LOCAL_RANK", rank)))


def _store() -> Any:
    """The key-value store to meet at.

    An elastic restart finds the store of the attempt before it, and a second run in one process that of the first; a
    prefix for each keeps stale keys out of the way.
    """
    environment = os.environ
    agent_has_it = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _server(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        int(environment["WORLD_SIZE"]),
        not agent_has_it and environment["RANK"] == "0",
    )
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}_run_{next(_RUNS)}", store)  # type: ignore[attr-defined]


@cache
def _server(address: str, port: int, world_size: int, is_master: bool) -> Any:
    """One connection for all runs of a process: a new server on the old port could take over half of the processes."""
    return dist.TCPStore(address, port, world_size, is_master=is_master, timeout=TIMEOUT)  # type: ignore[attr-defined]
