"""Measure the data pipeline against the official chain of PIL operations: images per second of one core.

Both get the same files and the same random plan (flip, branch, sizes, crop), one process, one thread, by turns, a batch
at a time; medians over the rounds of CPU time, which other work on the machine disturbs less than a clock. Ours ends in
a padded uint8 batch, as the model normalises on its device; the official chain ends in a padded, normalised float
batch. Ours moves the boxes too.

    python scripts/benchmark_data.py DATA_ROOT        a data set in COCO's layout
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as pil_chain

from detfamily.blocks.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from detfamily.config import build, compose
from detfamily.data.batches import collate
from detfamily.data.coco import CocoData, CocoDetection
from detfamily.data.transforms import Sample, Transform, resized_size

BATCH = 4


@dataclass
class Official:
    """The official training chain (facebookresearch/detr, datasets/transforms.py) for pixels, step by step in PIL.

    It draws as our transforms do, so that a generator of the same state gives the same plan.
    """

    short_sides: list[int]
    max_size: int
    crop_short_sides: list[int]
    crop_sizes: list[int]

    def augment(self, image: Image.Image, rng: torch.Generator) -> Tensor:
        if torch.rand((), generator=rng).item() < 0.5:
            image = pil_chain.hflip(image)
        if draw(0, 1, rng):
            image = self.resize(image, self.crop_short_sides, None, rng)
            image = self.crop(image, rng)
        image = self.resize(image, self.short_sides, self.max_size, rng)
        return pil_chain.normalize(pil_chain.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)

    def resize(self, image: Image.Image, sides: list[int], limit: int | None, rng: torch.Generator) -> Image.Image:
        side = sides[draw(0, len(sides) - 1, rng)]
        return pil_chain.resize(image, list(resized_size((image.height, image.width), side, limit)))

    def crop(self, image: Image.Image, rng: torch.Generator) -> Image.Image:
        low, high = self.crop_sizes
        width = draw(min(low, image.width), min(high, image.width), rng)
        height = draw(min(low, image.height), min(high, image.height), rng)
        top = draw(0, image.height - height, rng)
        return pil_chain.crop(image, top, draw(0, image.width - width, rng), height, width)


def draw(low: int, high: int, rng: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=rng).item())


def pad(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A float batch and its mask, as the official code makes them."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels = torch.zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for image, pad_pixels, pad_mask in zip(images, pixels, mask, strict=True):
        pad_pixels[:, : image.shape[1], : image.shape[2]].copy_(image)
        pad_mask[: image.shape[1], : image.shape[2]] = False
    return pixels, mask


@dataclass
class Times:
    """Milliseconds per image of each step, one entry a round."""

    decode: list[float] = field(default_factory=list)
    augment: list[float] = field(default_factory=list)
    batch: list[float] = field(default_factory=list)

    def add(self, seconds: list[float], images: int) -> None:
        for values, one in zip((self.decode, self.augment, self.batch), seconds, strict=True):
            values.append(1000 * one / images)

    def medians(self) -> tuple[float, float, float]:
        return statistics.median(self.decode), statistics.median(self.augment), statistics.median(self.batch)

    def rate(self, with_batch: bool) -> float:
        """Median over the rounds of images per second."""
        rounds = zip(self.decode, self.augment, self.batch, strict=True)
        return statistics.median(1000 / sum(one if with_batch else one[:2]) for one in rounds)


class Clock:
    """Adds up CPU seconds by step."""

    def __init__(self) -> None:
        self.seconds = [0.0, 0.0, 0.0]
        self.last = time.process_time()

    def lap(self, step: int) -> None:
        now = time.process_time()
        self.seconds[step] += now - self.last
        self.last = now


def run_ours(dataset: CocoDetection, transform: Transform, indices: range) -> tuple[Tensor, Tensor, Clock]:
    samples: list[Sample] = []
    clock = Clock()
    for index in indices:
        sample = dataset.load(index)
        clock.lap(0)
        samples.append(transform(sample, torch.Generator().manual_seed(index)))
        clock.lap(1)
    images = collate(samples).images
    clock.lap(2)
    return images.pixels, images.padding_mask, clock


def run_official(dataset: CocoDetection, chain: Official, indices: range) -> tuple[Tensor, Tensor, Clock]:
    images: list[Tensor] = []
    clock = Clock()
    for index in indices:
        with Image.open(dataset.folder / dataset.annotations.file_names[dataset.indices[index]]) as file:
            image = file.convert("RGB")
        clock.lap(0)
        images.append(chain.augment(image, torch.Generator().manual_seed(index)))
        clock.lap(1)
    pixels, mask = pad(images)
    clock.lap(2)
    return pixels, mask, clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--images", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)

    augmentation = compose("train", ["augmentation=detr"]).augmentation
    transform: Transform = build(augmentation.train)
    chain = Official(
        list(augmentation.short_sides),
        augmentation.max_size,
        list(augmentation.crop_short_sides),
        list(augmentation.crop_sizes),
    )
    dataset = CocoData(str(args.root), limit_train=args.images).train(transform)
    batches = [range(start, min(start + BATCH, len(dataset))) for start in range(0, len(dataset), BATCH)]

    times = {"official (PIL)": Times(), "ours": Times()}
    normalize, difference = Normalize(), 0.0
    for round_ in range(args.rounds + 1):
        totals = {name: [0.0, 0.0, 0.0] for name in times}
        for indices in batches:
            theirs, their_mask, their_clock = run_official(dataset, chain, indices)
            ours, our_mask, our_clock = run_ours(dataset, transform, indices)
            for name, clock in zip(times, (their_clock, our_clock), strict=True):
                totals[name] = [sum(pair) for pair in zip(totals[name], clock.seconds, strict=True)]
            if round_ == 0:  # to warm up, and to see that both did the same
                if not torch.equal(our_mask, their_mask):
                    raise SystemExit("the two pipelines made batches of different sizes: they do not follow one plan")
                difference += float((normalize(ours, our_mask) - theirs).abs().mean()) / len(batches)
        if round_ > 0:
            for name, total in totals.items():
                times[name].add(total, len(dataset))

    print(f"{len(dataset)} images, {args.rounds} rounds, one thread; pixels differ by {difference:.1e} on average")
    print(f"{'ms per image':16}{'decode':>9}{'augment':>9}{'batch':>9}    images/s per core, and before the batch")
    for name, one in times.items():
        steps = "".join(f"{value:9.2f}" for value in one.medians())
        print(f"{name:16}{steps}{one.rate(True):12.0f}{one.rate(False):10.0f}")
    official, own = times.values()
    ratios = [own.rate(with_batch) / official.rate(with_batch) for with_batch in (True, False)]
    print(f"{'ratio':43}{ratios[0]:12.2f}{ratios[1]:10.2f}")


if __name__ == "__main__":
    main()
