"""Where and how a run computes: device, precision, threads, workers; and how a batch is spread over the processes."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from detfamily.engine.schedule import Schedule
from detfamily.errors import ConfigError, nearest, require_at_least

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Parameters of glibc's mallopt, as in its malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how a run computes. Nothing here changes what is computed, up to rounding.

    Attributes:
        device: ``auto`` takes the accelerator where there is one.
        precision: what matrix products and convolutions run in; parameters, losses and the update stay in float32.
        batch_size_per_device: images that one process computes at once; None: its whole share of the total batch.
            Smaller than the share: gradients are accumulated.
        num_workers: processes that read images, for each process that trains; 0 reads in the training process.
        threads: threads of the CPU's operators; None leaves torch's own choice.
        sharding: what several processes keep of the network: ``none``: all of it, each; ``full``: a share of every
            parameter, gradient and moment (FSDP2), for networks that are too large for one device.
        compile: run the model through ``torch.compile`` (each new image size is compiled once more).
        deterministic: prefer operators that give the same bits again; torch warns by name of those that have no such
            form on the device.
        tf32: let float32 products on NVIDIA tensor cores use 10 bits of mantissa.
        malloc: on Linux's CPU, keep freed memory in the process (see ``keep_freed_memory``).
        on_non_finite: what to do when a loss or a gradient is not finite: the update is left out in any case; ``stop``
            ends the run with an error, ``skip`` says so and goes on.

    Raises:
        ConfigError: a value that does not exist here.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size_per_device: int | None = None
    num_workers: int = 2
    threads: int | None = None
    sharding: Literal["none", "full"] = "none"
    compile: bool = False
    deterministic: bool = False
    tf32: bool = True
    malloc: bool = True
    on_non_finite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        for name, options in (
            ("device", ("auto", "cpu", "cuda")),
            ("precision", tuple(DTYPES)),
            ("sharding", ("none", "full")),
            ("on_non_finite", ("stop", "skip")),
        ):
            value = getattr(self, name)
            if value not in options:
                raise ConfigError(f"runtime.{name}={value!r} does not exist; {nearest(str(value), options)}")
        for name, least in (("batch_size_per_device", 1), ("num_workers", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None:
                require_at_least(least, f"runtime.{name}", value)

    @property
    def device_type(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def torch_device(self, local_rank: int = 0) -> torch.device:
        """The device of a process."""
        return torch.device("cuda", local_rank) if self.device_type == "cuda" else torch.device("cpu")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context to run a model's forward in."""
        return torch.autocast(self.device_type, DTYPES[self.precision], enabled=self.precision != "fp32")

    def apply(self) -> None:
        """Set torch's global switches for this process.

        Raises:
            ConfigError: the device is not there.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("runtime.device=cuda, but torch finds no CUDA device here; try runtime.device=auto")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.device_type == "cpu" and self.malloc:
            keep_freed_memory()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32
        if self.deterministic:
            # cuBLAS reads this when its first handle is made; without it its products may differ between runs.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)

    def describe(self, world_size: int = 1) -> str:
        """A few words for the recipe."""
        if self.device_type == "cuda":
            words = [torch.cuda.get_device_name()]
        else:
            words = [f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"]
        words += [f"{world_size} processes"] * (world_size > 1) + ["parameters shared out"] * (self.sharding == "full")
        words += [self.precision, f"{self.num_workers} reading worker{'s' * (self.num_workers != 1)}"]
        words += ["compiled"] * self.compile + ["deterministic"] * self.deterministic
        return ", ".join(words)


@dataclass(frozen=True)
class Plan:
    """How many images, steps and epochs a run has, and how a step's batch is spread.

    Attributes:
        world_size: number of processes.
        batch_size_per_device: images that a process computes at once.
        accumulation: micro-batches of that size per optimiser step and process.
        steps_per_epoch: optimiser steps of an epoch.
        epochs: number of epochs.
    """

    world_size: int
    batch_size_per_device: int
    accumulation: int
    steps_per_epoch: int
    epochs: int

    @property
    def total_batch_size(self) -> int:
        return self.world_size * self.batch_size_per_device * self.accumulation

    @property
    def images_per_epoch(self) -> int:
        return self.steps_per_epoch * self.total_batch_size

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def total_images(self) -> int:
        return self.epochs * self.images_per_epoch

    def describe_batch(self) -> str:
        words = [f"{self.batch_size_per_device} images at once"]
        words += [f"{self.world_size} processes"] * (self.world_size > 1)
        words += [f"{self.accumulation} micro-batches"] * (self.accumulation > 1)
        return f"{self.total_batch_size} = " + " x ".join(words) if len(words) > 1 else str(self.total_batch_size)


def plan(schedule: Schedule, runtime: Runtime, world_size: int, dataset_size: int) -> Plan:
    """Spread the declared total batch over processes and accumulated micro-batches.

    Raises:
        ConfigError: the total batch does not divide (with values that do), the data set has fewer images than a step
            needs, or the warm-up is as long as the run.
    """
    total = schedule.total_batch_size
    share, rest = divmod(total, world_size)
    if rest:
        raise ConfigError(
            f"schedule.total_batch_size={total} cannot be shared by {world_size} processes; take a multiple of "
            f"{world_size} (the next is {(share + 1) * world_size}), or a number of processes that divides {total}: "
            f"{_divisors(total)}"
        )
    per_device = runtime.batch_size_per_device or share
    if share % per_device:
        raise ConfigError(
            f"runtime.batch_size_per_device={per_device} does not divide the {share} images that each of "
            f"{world_size} process(es) has of schedule.total_batch_size={total}; valid values: {_divisors(share)}"
        )
    images = dataset_size if schedule.images_per_epoch is None else schedule.images_per_epoch
    if images < total:
        raise ConfigError(
            f"the training set has {images} images, fewer than one step of schedule.total_batch_size={total} needs; "
            "lower the total batch size, or set schedule.images_per_epoch to go through the set several times"
        )
    made = Plan(world_size, per_device, share // per_device, images // total, schedule.epochs)
    warmup = schedule.warmup_length(made.total_steps)
    if warmup >= made.total_steps:
        raise ConfigError(
            f"the warm-up of {warmup} steps is as long as the whole run of {made.total_steps} steps; shorten "
            "schedule.warmup_steps, or train longer (schedule.epochs, schedule.images_per_epoch)"
        )
    return made


def keep_freed_memory() -> bool:
    """Tell glibc not to hand large freed blocks back to the system; return whether it took that.

    A step frees and asks for the same hundreds of megabytes again. By default glibc returns blocks above 32 MiB (and
    the top of its heap) to the kernel each time, which then clears every page anew: 5 to 6 % of the CPU time of a step,
    measured on the miniature at widths 64 and 256, for some more resident memory.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    large = 1 << 30
    settings = ((_M_MMAP_THRESHOLD, large), (_M_TRIM_THRESHOLD, large), (_M_TOP_PAD, 64 << 20))
    return all([libc.mallopt(parameter, value) == 1 for parameter, value in settings])


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The states of all generators of this process, as tensors and plain containers."""
    version, numbers, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": {
            "bit_generator": legacy["bit_generator"],
            "key": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put all generators back where ``rng_state`` found them."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    saved = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": saved["bit_generator"],
            "state": {"key": saved["key"].numpy().astype(np.uint32), "pos": saved["pos"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    elif state["cuda"] is not None or torch.cuda.is_initialized():
        warnings.warn("the checkpoint comes from another kind of device; its random numbers go on anew", stacklevel=2)


def _divisors(number: int) -> str:
    return ", ".join(str(one) for one in range(1, number + 1) if number % one == 0)
