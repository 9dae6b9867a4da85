from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from torch import Tensor

from detfamily.data.coco import SampleKey
from detfamily.data.loader import TrainLoader, naming_lost_workers, train_loader, validation_loader
from detfamily.data.transforms import Sample
from detfamily.errors import DataError, LostWorkerError
from detfamily.structures import Batch


class Numbers:
    """A data set whose pixels say which image, which seed and how many threads they were made with."""

    def __init__(self, length: int, broken: int | None = None) -> None:
        self.length = length
        self.broken = broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int | SampleKey) -> Sample:
        index, seed = (key.index, key.seed) if isinstance(key, SampleKey) else (key, 0)
        if index == self.broken:
            raise DataError(f"image {index}: is damaged")
        draw = torch.randint(0, 256, (3, 4, 4 + index % 3), generator=torch.Generator().manual_seed(seed))
        image = draw.to(torch.uint8)
        image[0, 0, 0] = torch.get_num_threads()
        none = torch.zeros(0)
        return Sample(image, torch.zeros(0, 4), none.long(), none, none.long(), index, (4, 4))


class GlobalDraws(Numbers):
    """A data set that draws from the global generators, against our rules."""

    def __getitem__(self, key: int | SampleKey) -> Sample:
        sample = super().__getitem__(key)
        drawn = (random.randrange(256), int(np.random.randint(256)), int(torch.randint(256, ())))
        sample.image[:, 1, 1] = torch.tensor(drawn, dtype=torch.uint8)
        return sample


def ids(batches: Iterable[Batch]) -> list[int]:
    return list(chain.from_iterable(batch.images.image_ids for batch in batches))


def pixels(batches: Iterable[Batch]) -> list[Tensor]:
    found = [batch.images.pixels.clone() for batch in batches]
    for one in found:
        one[:, 0, 0, 0] = 0
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def epochs(loader: TrainLoader, count: int) -> list[int]:
    seen: list[int] = []
    for epoch in range(count):
        loader.set_position(epoch)
        seen += ids(loader)
    return seen


def test_an_epoch_has_every_image_once_and_the_next_another_order() -> None:
    loader = train_loader(Numbers(12), 4, 0, seed=3)
    assert len(loader) == loader.steps_per_epoch == 3
    seen = epochs(loader, 3)
    rounds = [seen[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(one) == list(range(12)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_augmentation_differs_between_epochs_and_seeds() -> None:
    loader = train_loader(Numbers(8), 4, 0, seed=3)
    first, again = pixels(loader), pixels(loader)
    assert same(first, again)
    loader.set_position(1)
    assert not same(first, pixels(loader))
    assert not same(first, pixels(train_loader(Numbers(8), 4, 0, seed=4)))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    alone, helped = (train_loader(Numbers(20), 4, number, seed=1) for number in (0, workers))
    for epoch in range(2):
        alone.set_position(epoch)
        helped.set_position(epoch)
        assert same(pixels(alone), pixels(helped))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 4, 6, 8, 12])
def test_resuming_gives_what_was_to_come(workers: int, done: int) -> None:
    whole = train_loader(Numbers(14), 2, 0, seed=5, images_per_epoch=12)
    whole.set_position(2)
    expected = pixels(whole)[done // 2 :]
    resumed = train_loader(Numbers(14), 2, workers, seed=5, images_per_epoch=12)
    resumed.set_position(2, done)
    assert len(resumed) == len(expected)
    assert same(pixels(resumed), expected)


def test_an_epoch_can_be_given_up_and_the_next_begun() -> None:
    loader = train_loader(Numbers(40), 2, 2, seed=5)
    next(iter(loader))
    loader.set_position(1)
    fresh = train_loader(Numbers(40), 2, 0, seed=5)
    fresh.set_position(1)
    assert ids(loader) == ids(fresh)


def test_the_remainder_of_an_epoch_opens_the_next() -> None:
    loader = train_loader(Numbers(10), 4, 0, seed=0)
    assert loader.images_per_epoch == 8
    counts = Counter(epochs(loader, 5))
    assert set(counts.values()) == {4}
    assert len(counts) == 10


@pytest.mark.parametrize("images", [6, 25])
def test_an_epoch_can_be_shorter_or_longer_than_the_data_set(images: int) -> None:
    loader = train_loader(Numbers(10), 2, 0, seed=0, images_per_epoch=images)
    assert loader.images_per_epoch == images // 2 * 2
    counts = Counter(epochs(loader, 5))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_data_set_smaller_than_a_batch_is_repeated() -> None:
    loader = train_loader(Numbers(3), 6, 0, seed=0)
    (batch,) = loader
    assert Counter(batch.images.image_ids) == {0: 2, 1: 2, 2: 2}
    assert len(set(batch.images.pixels[:, 1].flatten(1).sum(1).tolist())) > 3


def test_ranks_share_the_batches_of_one_process() -> None:
    one = [batch.images.image_ids for batch in train_loader(Numbers(17), 6, 0, seed=2)]
    parts = [list(train_loader(Numbers(17), 2, 0, seed=2, rank=rank, world_size=3)) for rank in range(3)]
    joined = [sum((batch.images.image_ids for batch in step), ()) for step in zip(*parts, strict=True)]
    assert joined == one
    middle = train_loader(Numbers(17), 2, 0, seed=2, rank=1, world_size=3)
    middle.set_position(0, 6)
    assert ids(middle) == ids(parts[1][1:])


@pytest.mark.parametrize(("length", "world_size"), [(10, 1), (10, 3), (3, 4), (13, 2)])
def test_validation_has_every_image_once_over_all_ranks(length: int, world_size: int) -> None:
    loaders = [validation_loader(Numbers(length), 2, 0, rank, world_size) for rank in range(world_size)]
    found = [[batch.images.image_ids for batch in loader] for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(one) for one in found]
    assert max(map(len, found)) - min(map(len, found)) <= 1
    together = sorted(chain.from_iterable(found))
    assert together == [tuple(range(start, min(start + 2, length))) for start in range(0, length, 2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_reported_as_it_is(workers: int) -> None:
    for loader in (train_loader(Numbers(9, broken=4), 3, workers, 0), validation_loader(Numbers(9, 4), 3, workers)):
        with pytest.raises(DataError) as caught:
            ids(loader)
        assert str(caught.value) == "image 4: is damaged"


def test_workers_use_one_thread_and_seeded_global_generators() -> None:
    loader = train_loader(GlobalDraws(8), 2, 2, seed=7)
    first = [batch.images.pixels for batch in loader]
    assert all((one[:, 0, 0, 0] == 1).all() for one in first)
    again = [batch.images.pixels for batch in train_loader(GlobalDraws(8), 2, 2, seed=7)]
    assert same(first, again)
    other = [batch.images.pixels for batch in train_loader(GlobalDraws(8), 2, 2, seed=8)]
    assert not same(first, other)


def test_a_closed_loader_leaves_no_process_behind() -> None:
    before = set(active_children())
    loader = train_loader(Numbers(8), 2, 2, seed=0)
    assert len(ids(loader)) == 8
    workers = set(active_children()) - before
    assert len(workers) == 2
    holder = [loader]
    holder.append(holder)  # type: ignore[arg-type]  # as in a trainer, which knows itself: only the collector frees it
    loader.close()
    assert not any(worker.is_alive() for worker in workers) and ids(loader) == []


def test_the_global_generator_of_the_process_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ids(train_loader(Numbers(8), 2, 0, seed=7))
    ids(train_loader(Numbers(8), 2, 1, seed=7))
    ids(validation_loader(Numbers(8), 2, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": Numbers(0)}, "no images"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"images_per_epoch": 0}, "images_per_epoch=0"),
        ({"seed": -1}, "seed=-1"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
    ],
)
def test_numbers_that_make_no_sense_are_named(arguments: dict[str, object], message: str) -> None:
    given = {"dataset": Numbers(4), "batch_size": 2, "num_workers": 0, "seed": 0, **arguments}
    with pytest.raises(DataError, match=message):
        train_loader(**given)  # type: ignore[arg-type]


def test_a_position_outside_the_epoch_is_refused() -> None:
    loader = train_loader(Numbers(8), 2, 0, seed=0)
    for epoch, done in ((-1, 0), (0, 9), (0, -1)):
        with pytest.raises(ValueError, match="no position"):
            loader.set_position(epoch, done)


def test_a_reading_process_that_was_killed_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(LostWorkerError, match="gone .DataLoader worker.*runtime.num_workers"), naming_lost_workers():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


def test_other_errors_are_no_matter_of_workers() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), naming_lost_workers():
        raise RuntimeError("shapes differ")
