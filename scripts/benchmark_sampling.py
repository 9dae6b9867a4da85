"""Measure what deformable attention of DAT samples: its maps, and its table of biases, by grid_sample and by the op.

The op is multi-scale deformable attention with one level and one point of weight 1. Candidates run by turns in one
process, and medians over the rounds are printed: forward, and forward with backward.

    python scripts/benchmark_sampling.py
    python scripts/benchmark_sampling.py --threads 2 --rounds 9
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detfamily.attention.deformable import sample
from detfamily.attention.deformable_position import Layout, TableBias, displacements
from detfamily.ops import ms_deform_attn


@dataclass(frozen=True)
class Case:
    """One map, and the attention that reads it."""

    name: str
    size: tuple[int, int]
    width: int
    heads: int
    groups: int
    stride: int


CASES = (
    Case("DAT++ T at 224, stage 1", (56, 56), 64, 2, 1, 8),
    Case("DAT++ T at 224, stage 3", (14, 14), 256, 8, 4, 2),
    Case("DAT++ T at 800 x 1333, stage 3", (50, 84), 256, 8, 4, 2),
    Case("encoder, C4 of 608 x 848", (38, 53), 256, 8, 2, 4),
)


def sample_by_grid(x: Tensor, places: Tensor) -> Tensor:
    """The map as in ``sample``, by grid_sample."""
    groups = places.shape[1]
    maps = x.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    sampled = F.grid_sample(maps, places.flip(-1).flatten(0, 1), align_corners=True)
    return sampled.unflatten(0, (-1, groups)).flatten(3).permute(0, 3, 1, 2).flatten(2)


def bias_by_op(table: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """(B, M, Nq, Nk) as in ``TableBias``, by the op: heads of a group are the channels, the batch is more queries."""
    groups = keys.shape[1]
    heads, h, w = table.shape
    scale = keys.new_tensor([(w - 1) / (4 * w), (h - 1) / (4 * h)])
    locations = (displacements(queries, keys).flip(-1) * scale + 0.5).permute(0, 2, 3, 1, 4)
    flat = locations.reshape(1, -1, groups, 1, 1, 2)
    value = table.view(groups, -1, h * w).permute(2, 0, 1)[None].contiguous()
    found = ms_deform_attn(value, ((h, w),), flat, flat.new_ones(flat.shape[:-1]))
    return found.view(*locations.shape[:3], heads).permute(0, 3, 1, 2)


def measure(candidates: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median milliseconds of each, by turns."""
    times: list[list[float]] = [[] for _ in candidates]
    for index in range(rounds + 1):  # the first warms up
        for candidate, found in zip(candidates, times, strict=True):
            start = time.perf_counter()
            candidate()
            if index:
                found.append(1000 * (time.perf_counter() - start))
    return [statistics.median(one) for one in times]


def compare(title: str, forms: Sequence[Callable[[], Tensor]], leaves: Sequence[Tensor], rounds: int) -> str:
    """A row: grid_sample, the op."""
    cotangent = torch.randn_like(forms[0]())

    def both(form: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form(), leaves, cotangent)

    grid, op = measure(forms, rounds)
    grid_all, op_all = measure([both(form) for form in forms], rounds)
    ratios = f"{grid / op:.2f} | {grid_all / op_all:.2f}"
    return f"| {title} | {grid:.2f} | {op:.2f} | {grid_all:.2f} | {op_all:.2f} | {ratios} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| case | grid_sample | op | grid_sample, with backward | op | times as fast | with backward |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        h, w = case.size
        x = torch.randn(1, h, w, case.width, requires_grad=True)
        rows, columns = (-(-side // case.stride) for side in case.size)
        places = (2 * torch.rand(1, case.groups, rows, columns, 2) - 1).requires_grad_()
        forms = [lambda: sample_by_grid(x, places), lambda: sample(x, places)]  # noqa: B023
        print(compare(f"map: {case.name}", forms, (x, places), args.rounds), flush=True)
        bias = TableBias(Layout(case.width, case.heads, case.groups, case.stride), case.size)
        axes = (torch.linspace(-1, 1, side) for side in case.size)
        queries = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        keys = places.detach().flatten(2, 3).requires_grad_()
        forms = [lambda: bias.to_logits(queries, keys), lambda: bias_by_op(bias.table, queries, keys)]  # noqa: B023
        print(compare(f"biases: {case.name}", forms, (bias.table, keys), args.rounds), flush=True)


if __name__ == "__main__":
    main()
