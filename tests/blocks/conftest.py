"""What tests of blocks share: memory, heads, queries, objects, draws from lists, and a watch over operations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detfamily.blocks.heads import BoxHead, Heads, SigmoidClassHead
from detfamily.blocks.tokens import flatten_maps, resize_mask
from detfamily.structures import Given, Predictions, Queries, Targets, Tokens

WIDTH, CLASSES, OTHERS, EPS = 8, 5, 3, 1e-3
SHAPES = [(6, 8), (3, 4)]


def memory_tokens(padded: bool = True) -> Tokens:
    """Of two images, the second smaller than the first, on two levels."""
    torch.manual_seed(0)
    mask = torch.zeros(2, 24, 32, dtype=torch.bool)
    if padded:
        mask[1, 18:] = mask[1, :, 20:] = True
    maps = [torch.randn(2, WIDTH, *shape) for shape in SHAPES]
    return flatten_maps(maps, [resize_mask(mask, shape) for shape in SHAPES], padded)


def decoder_heads(shared: bool = True) -> Heads:
    """Of three layers, away from their start."""
    torch.manual_seed(7)
    return Heads(partial(SigmoidClassHead, WIDTH, CLASSES), partial(BoxHead, WIDTH, zero_init=False), 3, shared)


def object_queries(batch: int, reference_dim: int | None = 4, pos: bool = False) -> Queries:
    torch.manual_seed(1)
    content = torch.cat([torch.randn(batch, OTHERS, WIDTH - 1), torch.zeros(batch, OTHERS, 1)], -1)
    references = None if reference_dim is None else torch.rand(batch, OTHERS, reference_dim)
    where = torch.randn(batch, OTHERS, WIDTH) if pos else None
    return Queries(content, where, references, groups={"match": slice(0, OTHERS)})


def objects(counts: Sequence[int], seed: int = 2) -> Targets:
    """Boxes that reach over the image's border here and there, as crops may leave them."""
    rng = np.random.default_rng(seed)
    labels = [torch.from_numpy(rng.integers(0, CLASSES, count)) for count in counts]
    boxes = [torch.from_numpy(rng.uniform(0.02, 0.98, (count, 4)).astype(np.float32)) for count in counts]
    return Targets.from_lists(labels, boxes, image_ids=[10 + i for i in range(len(counts))])


def many(count: int = 20000) -> Targets:
    boxes = torch.tensor([0.5, 0.4, 0.2, 0.3]).expand(count, 4)
    return Targets.from_lists([torch.full((count,), 2)], [boxes])


class Listed:
    """Draws from lists in the official order: copy by copy, image by image, object by object.

    Where they do not matter there are numbers that would be seen, were they used.
    """

    def __init__(self, chances: Tensor, labels: Tensor, boxes: Tensor, signs: Tensor | None = None) -> None:
        self.chances, self.labels, self.boxes, self.signs = chances, labels, boxes, signs
        self.asked: list[str] = []

    def uniform(self, wanted: Tensor, *more: int) -> Tensor:
        self.asked.append("boxes" if more else "chances")
        stored = self.boxes if more else self.chances
        placed = torch.full((*wanted.shape, *more), 0.0 if not more else 1e3)
        placed[wanted] = stored
        return placed

    def integers(self, wanted: Tensor, end: int, *more: int) -> Tensor:
        self.asked.append("signs" if more else "labels")
        stored = self.signs if more else self.labels
        assert stored is not None and (not more or end == 2)
        placed = torch.full((*wanted.shape, *more), 1000 if more else CLASSES - 1)
        placed[wanted] = stored
        return placed


def naive_hidden(groups: int, most: int, others: int) -> Tensor:
    """Whether a query (row) may not look at another: group by group, then the queries that are matched."""
    total = groups * most + others

    def group(n: int) -> int:
        return n // most if n < groups * most else -1

    return torch.tensor(
        [[group(j) >= 0 and group(i) != group(j) for j in range(total)] for i in range(total)], dtype=torch.bool
    ).view(total, total)


def said_of(known: Given, batch: int, layers: int = 2) -> Predictions:
    torch.manual_seed(4)
    count = known.matched.shape[1]
    boxes = torch.rand(layers, batch, count, 4).double()
    return Predictions(torch.randn(layers, batch, count, CLASSES).double(), boxes, known)


def naive_focal(logits: list[float], label: int | None) -> float:
    """Of one query; None is nothing."""
    total = 0.0
    for column, logit in enumerate(logits):
        p = 1 / (1 + math.exp(-logit))
        hit = column == label
        total += -0.25 * (1 - p) ** 2 * math.log(p) if hit else -0.75 * p**2 * math.log(1 - p)
    return total


class Operations(TorchDispatchMode):
    """Counts all operations, and notes those that would wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.seen[name] += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1] if one is not None
        )
        if by_mask or name in self.WAITING:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))
