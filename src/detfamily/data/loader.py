"""The loaders: which image comes when, and the worker processes that prepare it.

Training images come from one endless sequence, a permutation of the data set after another, that the seed alone
decides. An epoch is a window of this sequence. The augmentation of an image is decided by the seed and its position in
the sequence. So the number of workers, of processes and the point of resumption change nothing about the data.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from detfamily.data.batches import collate
from detfamily.data.coco import SampleKey
from detfamily.data.transforms import Sample
from detfamily.errors import DataError, LostWorkerError
from detfamily.structures import Batch


class SampleSource(Protocol):
    """What a loader needs of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: int | SampleKey) -> Sample: ...


class Stream:
    """The endless sequence of training images of one seed.

    Args:
        length: images in the data set.
        seed: decides the order and the augmentation.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self._round = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> SampleKey:
        round_, within = divmod(position, self.length)
        if round_ != self._round:
            self._order = np.random.default_rng((self.seed, 0, round_)).permutation(self.length)
            self._round = round_
        seed = int(np.random.SeedSequence((self.seed, 1, position)).generate_state(1)[0])
        return SampleKey(int(self._order[within]), seed)


class WindowSampler:
    """One rank's share of the stream, batch by batch, from the position that was set to the end of the epoch.

    A step takes ``world_size * batch_size`` successive images; each rank takes its own run of them. An epoch is a whole
    number of steps (as with the official ``drop_last``), and the next epoch goes on exactly where it ended, so that no
    image is left out for good.

    Args:
        stream: the images in order.
        batch_size: images of one rank in one step.
        images_per_epoch: rounded down to whole steps, at least one.
        rank: which share.
        world_size: number of shares.
    """

    def __init__(self, stream: Stream, batch_size: int, images_per_epoch: int, rank: int, world_size: int) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.rank = rank
        self.images_per_step = batch_size * world_size
        self.steps_per_epoch = max(images_per_epoch // self.images_per_step, 1)
        self.set_position(0)

    def set_position(self, epoch: int, images_done: int = 0) -> None:
        """Go to an epoch, after its first ``images_done`` images (of all ranks together)."""
        if epoch < 0 or not 0 <= images_done <= self.steps_per_epoch * self.images_per_step:
            raise ValueError(f"there is no position {images_done} in epoch {epoch}")
        self.epoch, self.images_done = epoch, images_done

    def __len__(self) -> int:
        return self.steps_per_epoch - -(-self.images_done // self.images_per_step)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        start = self.epoch * self.steps_per_epoch * self.images_per_step + self.images_done
        for step in range(len(self)):
            first = start + step * self.images_per_step + self.rank * self.batch_size
            yield [self.stream[position] for position in range(first, first + self.batch_size)]


class ShareSampler:
    """Every image once over all ranks, in order: the batches are dealt out, so that they do not depend on their number.

    Args:
        length: images in the data set.
        batch_size: images in a batch; the last may have fewer.
        rank: which share; it may be empty, or a batch shorter than that of another rank.
        world_size: number of shares.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int) -> None:
        self.batches = [
            list(range(start, min(start + batch_size, length)))
            for start in range(rank * batch_size, length, world_size * batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Say what a user can do when a reading process was killed.

    torch notices it in a signal handler, so that its error may come out of any line, not only out of the loader's.

    Raises:
        LostWorkerError: a worker is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise LostWorkerError(
            f"a reading process is gone ({str(error).strip()}): most often memory ran out, the machine's or that of "
            "/dev/shm. Lower runtime.num_workers; 0 reads in the training process"
        ) from error


class Loader:
    """Batches prepared ahead by worker processes; a DataError of a worker arrives as such, without the worker's trace.

    Args:
        dataset: gives samples by key.
        sampler: gives lists of keys.
        num_workers: processes beside this one; 0 prepares the batches here.
        seed: of the workers' global generators, for transforms that use them against our rules.
    """

    def __init__(
        self, dataset: SampleSource, sampler: WindowSampler | ShareSampler, num_workers: int, seed: int
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        # Its own generator: drawing the workers' seed must not move the generator that dropout uses.
        self._batches: Iterable[Any] = DataLoader(
            _Fetcher(dataset),
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=_as_fetched,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_Initializer(seed) if num_workers else None,
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(seed % 2**63),
        )

    def __len__(self) -> int:
        """Batches that the next iteration yields."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        with naming_lost_workers():
            for batch in self._batches:
                if isinstance(batch, _Failure):
                    raise DataError(batch.message)
                yield batch

    def close(self) -> None:
        """End the worker processes; there are no more batches.

        Those that live until the interpreter's exit are terminated there, and take half a minute for it.
        """
        self._batches = ()


class TrainLoader(Loader):
    """The training batches of one rank, one epoch at a time; see ``train_loader``."""

    sampler: WindowSampler

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank in a whole epoch."""
        return self.sampler.steps_per_epoch

    @property
    def images_per_epoch(self) -> int:
        """Images of all ranks in a whole epoch."""
        return self.sampler.steps_per_epoch * self.sampler.images_per_step

    def set_position(self, epoch: int, images_done: int = 0) -> None:
        """Let the next iteration yield an epoch, without its first ``images_done`` images (of all ranks).

        Raises:
            ValueError: there is no such position.
        """
        self.sampler.set_position(epoch, images_done)


def train_loader(
    dataset: SampleSource,
    batch_size: int,
    num_workers: int,
    seed: int,
    images_per_epoch: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    """The loader of the training set; ``set_position`` chooses the epoch, 0 at first.

    Args:
        dataset: the training set.
        batch_size: images of this rank in one batch.
        num_workers: processes beside this one.
        seed: decides the order of the images and their augmentation.
        images_per_epoch: length of an epoch over all ranks, rounded down to whole steps; None takes the data set's.
        rank: this process.
        world_size: number of processes.

    Raises:
        DataError: a number that makes no sense, or a data set without images.
    """
    _check_numbers(dataset, batch_size, num_workers, rank, world_size)
    if images_per_epoch is not None and images_per_epoch < 1:
        raise DataError(f"images_per_epoch={images_per_epoch} must be 1 or more, or null for the whole data set")
    if seed < 0:
        raise DataError(f"seed={seed} must be 0 or more")
    length = len(dataset)
    sampler = WindowSampler(Stream(length, seed), batch_size, images_per_epoch or length, rank, world_size)
    return TrainLoader(dataset, sampler, num_workers, seed)


def validation_loader(
    dataset: SampleSource, batch_size: int, num_workers: int, rank: int = 0, world_size: int = 1
) -> Loader:
    """The loader of the validation set: each image exactly once over all ranks, so that ranks may differ by a batch.

    Args:
        dataset: the validation set.
        batch_size: images in a batch.
        num_workers: processes beside this one.
        rank: this process.
        world_size: number of processes.

    Raises:
        DataError: a number that makes no sense, or a data set without images.
    """
    _check_numbers(dataset, batch_size, num_workers, rank, world_size)
    return Loader(dataset, ShareSampler(len(dataset), batch_size, rank, world_size), num_workers, seed=0)


def _check_numbers(dataset: SampleSource, batch_size: int, num_workers: int, rank: int, world_size: int) -> None:
    if len(dataset) == 0:
        raise DataError("the data set has no images")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} must be 1 or more")
    if num_workers < 0:
        raise DataError(f"num_workers={num_workers} must be 0 (prepare batches in the main process) or more")
    if not 0 <= rank < world_size:
        raise DataError(f"rank={rank} must lie in 0 .. world_size - 1 = {world_size - 1}")


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way from a worker; an exception would arrive wrapped in the worker's trace."""

    message: str


class _Fetcher(Dataset[Batch]):
    """Gives whole batches, so that what goes wrong in a sample can travel in place of the batch."""

    def __init__(self, dataset: SampleSource) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: Sequence[int | SampleKey]) -> Batch | _Failure:
        try:
            return collate([self.dataset[key] for key in keys])
        except DataError as error:
            return _Failure(str(error))


def _as_fetched(batch: Any) -> Any:
    """The batch as ``_Fetcher`` made it; where a loader usually collates."""
    return batch


@dataclass(frozen=True)
class _Initializer:
    """Prepares a worker: one thread, as the workers share the cores; seeded global generators; patience with signals.

    A signal to the whole process group must not take the workers away while the training process saves its state: they
    leave Ctrl-C to it, and outlive SIGTERM by half a minute at most.
    """

    seed: int

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))
        torch.set_num_threads(1)
        state = np.random.SeedSequence((self.seed, worker)).generate_state(2)
        random.seed(int(state[0]))
        np.random.seed(int(state[0]))
        torch.manual_seed(int(state[1]))
