"""Measure neighborhood attention: forward, and forward with backward, its backends against unfolded windows.

All candidates of a case run by turns in one process; medians over the rounds, and the medians of the rounds' ratios.
Before that every candidate's results and gradients are compared with the first one's: if they differ, that is said and
the exit status is 1. What is measured goes from queries, keys and values to the heads' output, without projections.

    python scripts/benchmark_neighborhood.py                            56 x 56 and others, all backends that apply
    python scripts/benchmark_neighborhood.py --sizes 100x167 --batch 2 --heads 8 --kernel-size 13
    python scripts/benchmark_neighborhood.py --candidates pytorch --sizes 14x14 28x28 56x56 112x112

"gather" and "unfold" are the usual ways in plain PyTorch: a copy of its own window's keys and values for each query, by
an index or by F.unfold. "natten" and "flex" have gradients on GPUs only; natten has no biases (--no-bias).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_op import DTYPES, graph_timer, memory_here, wall_timer
from torch import Tensor

from detfamily.errors import ConfigError
from detfamily.ops.neighborhood import neighborhood_attn
from detfamily.ops.neighborhood.windows import axis_windows
from detfamily.structures import Size

BACKENDS = ("pytorch", "flex", "natten")
LIMITS = {torch.float64: 1e-10, torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far results may part, relative to the largest; on GPUs that of bfloat16 for float32 too, if TF32 is allowed."""


@dataclass(frozen=True)
class Inputs:
    """Of one case; everything that is differentiated is a leaf."""

    qkv: Tensor
    bias: Tensor | None
    kernel_size: int
    dilation: int
    grad_output: Tensor


@dataclass(frozen=True)
class Candidate:
    """Something that computes neighborhood attention, (B, h, w, M * D)."""

    name: str
    call: Callable[[Inputs], Tensor]

    def arguments(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return (inputs.qkv,) if inputs.bias is None else (inputs.qkv, inputs.bias)


def make_inputs(args: argparse.Namespace, size: Size) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    dtype, side = DTYPES[args.dtype], 2 * args.kernel_size - 1

    def put(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(args.device, dtype).requires_grad_()

    qkv = put(args.batch, *size, 3, args.heads, args.depth)
    bias = put(args.heads, side, side) if args.bias else None
    grad = put(args.batch, *size, args.heads * args.depth).detach()
    return Inputs(qkv, bias, args.kernel_size, args.dilation, grad)


# -- the usual ways ---------------------------------------------------------------------------------------------------


def window_tokens(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(N, K * K): the tokens of each window, and the places of its biases in the flat table."""
    h, w = inputs.qkv.shape[1:3]
    size, step = inputs.kernel_size, inputs.dilation
    axes = []
    for length in (h, w):
        seen = axis_windows(length, size, step)[0][:, None] + step * torch.arange(size)
        axes.append((seen, (seen - torch.arange(length)[:, None]) // step + size - 1))
    (rows, dy), (columns, dx) = axes
    tokens = rows[:, None, :, None] * w + columns[:, None]
    places = dy[:, None, :, None] * (2 * size - 1) + dx[:, None]
    return tokens.reshape(h * w, -1).to(inputs.qkv.device), places.reshape(h * w, -1).to(inputs.qkv.device)


def gather(inputs: Inputs, known: dict[Any, Any] = {}) -> Tensor:  # noqa: B006
    batch, h, w, _, heads, depth = inputs.qkv.shape
    key = h, w, inputs.kernel_size, inputs.dilation
    if key not in known:
        known[key] = window_tokens(inputs)
    tokens, places = known[key]
    q, k, v = inputs.qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q * depth**-0.5)[..., None, :] @ k[:, :, tokens].mT
    if inputs.bias is not None:
        logits = logits + inputs.bias.flatten(1)[:, places][:, :, None]
    out = logits.softmax(-1) @ v[:, :, tokens]
    return out.squeeze(3).transpose(1, 2).reshape(batch, h, w, heads * depth)


def unfold(inputs: Inputs, known: dict[Any, Any] = {}) -> Tensor:  # noqa: B006
    """F.unfold has no windows that are shifted at the borders: these are copied from the nearest whole one."""
    batch, h, w, _, heads, depth = inputs.qkv.shape
    size, step = inputs.kernel_size, inputs.dilation
    key = h, w, size, step
    if key not in known:
        first = window_tokens(inputs)[0][:, 0]
        columns = w - step * (size - 1)
        known[key] = first // w * columns + first % w, window_tokens(inputs)[1].t()
    nearest, places = known[key]
    q, k, v = inputs.qkv.permute(3, 0, 4, 5, 1, 2).flatten(1, 2).unbind(0)

    def windows(x: Tensor) -> Tensor:
        return F.unfold(x, size, step).view(batch * heads, depth, size**2, -1)[..., nearest]

    logits = ((q * depth**-0.5).flatten(2)[:, :, None] * windows(k)).sum(1).view(batch, heads, size**2, -1)
    if inputs.bias is not None:
        logits = logits + inputs.bias.flatten(1)[:, places]
    weights = logits.softmax(2).flatten(0, 1)
    out = (weights[:, None] * windows(v)).sum(2)
    return out.view(batch, heads * depth, h, w).permute(0, 2, 3, 1)


def candidates(names: list[str]) -> list[Candidate]:
    def ours(name: Any) -> Callable[[Inputs], Tensor]:
        return lambda x: neighborhood_attn(x.qkv, x.kernel_size, x.dilation, x.bias, backend=name)

    known = {"gather": gather, "unfold": unfold, **{name: ours(name) for name in BACKENDS}}
    return [Candidate(name, known[name]) for name in names]


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Median milliseconds, how many times as fast as the first candidate, MiB at the peak."""

    size: str
    candidate: str
    forward_ms: float
    both_ms: float
    forward_ratio: float
    both_ratio: float
    peak_mib: float


def forward_of(candidate: Candidate, inputs: Inputs) -> Callable[[], Any]:
    def run() -> Tensor:
        with torch.no_grad():
            return candidate.call(inputs)

    return run


def both_of(candidate: Candidate, inputs: Inputs) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(candidate.call(inputs), candidate.arguments(inputs), inputs.grad_output)


def able(candidate: Candidate, inputs: Inputs) -> bool:
    """Whether a candidate can compute the case; if not, why is said."""
    try:
        candidate.call(inputs)
    except ConfigError as error:
        print(f"no {candidate.name}: {error}")
        return False
    return True


def differences(first: Candidate, other: Candidate, inputs: Inputs) -> list[float]:
    """Of the results and the gradients, relative to the largest."""
    results = []
    for one in (first, other):
        out = one.call(inputs)
        results.append([out, *torch.autograd.grad(out, one.arguments(inputs), inputs.grad_output)])
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(*results, strict=True)]
    return [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]


def measure(args: argparse.Namespace, size: Size, those: list[Candidate]) -> list[Row]:
    inputs = make_inputs(args, size)
    timer = graph_timer if args.device == "cuda" else processor_timer if args.clock == "processor" else wall_timer
    forward, both = (
        by_turns({one.name: timer(make(one, inputs)) for one in those}, args.rounds) for make in (forward_of, both_of)
    )
    rows, first = [], those[0].name
    for one in those:
        medians = (statistics.median(times[one.name]) for times in (forward, both))
        ratios = (
            statistics.median(a / b for a, b in zip(times[first], times[one.name], strict=True))
            for times in (forward, both)
        )
        peak = memory_here(one, inputs, "cuda") if args.device == "cuda" else memory_apart(args, size, one.name)
        rows.append(Row("x".join(map(str, size)), one.name, *medians, *ratios, peak))
    return rows


def processor_timer(run: Callable[[], Any]) -> Callable[[], float]:
    """Of one thread it is what other work on the machine disturbs least; several also count while they wait."""
    run()

    def measure() -> float:
        start = time.process_time()
        run()
        return 1000 * (time.process_time() - start)

    return measure


def by_turns(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each in every round."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    return times


def memory_apart(args: argparse.Namespace, size: Size, candidate: str) -> float:
    """The peak in a process of its own, which no other candidate has raised."""
    numbers = {"batch": args.batch, "heads": args.heads, "depth": args.depth, "dilation": args.dilation}
    numbers |= {"kernel-size": args.kernel_size, "dtype": args.dtype, "sizes": "x".join(map(str, size))}
    command = [sys.executable, __file__, "--device", "cpu", "--memory-of", candidate]
    command += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command + ([] if args.bias else ["--no-bias"]), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"measuring the memory of {candidate} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


HEADER = "| map | candidate | forward ms | forward + backward ms | x forward | x both | peak MiB |"


def as_markdown(row: Row) -> str:
    numbers = f"{row.forward_ms:.2f} | {row.both_ms:.2f} | {row.forward_ratio:.2f} | {row.both_ratio:.2f}"
    return f"| {row.size} | {row.candidate} | {numbers} | {row.peak_mib:.0f} |"


def size_of(text: str) -> Size:
    try:
        h, w = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected height x width, as 56x56") from None
    return h, w


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[(56, 56)], metavar="HxW")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--depth", type=int, default=32, help="width of a head")
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--dilation", type=int, default=1)
    parser.add_argument("--no-bias", dest="bias", action="store_false", help="no biases by relative position")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--candidates", nargs="+", choices=["gather", "unfold", *BACKENDS], help="default: all")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="on the CPU")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.candidates = args.candidates or ["gather", "unfold", *(BACKENDS if args.device == "cuda" else BACKENDS[:1])]
    return args


def main() -> int:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        (one,) = candidates([args.memory_of])
        memory_here(one, make_inputs(args, (2 * args.kernel_size * args.dilation,) * 2), "cpu")  # what the first loads
        inputs = make_inputs(args, args.sizes[0])
        one.call(inputs)  # so that indices of a map, which are kept, are no part of it
        print(memory_here(one, inputs, "cpu"))
        return 0
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}; {args.dtype}, batch {args.batch}, {args.heads} heads of {args.depth}")
    print(f"windows of {args.kernel_size} x {args.kernel_size}, dilation {args.dilation}, bias: {args.bias}\n")
    rows: list[Row] = []
    parted = False
    limit = LIMITS[torch.bfloat16 if args.device == "cuda" and args.dtype == "float32" else DTYPES[args.dtype]]
    for size in args.sizes:
        inputs = make_inputs(args, size)
        those = [one for one in candidates(args.candidates) if able(one, inputs)]
        for one in those[1:]:
            found = differences(those[0], one, inputs)
            print(f"{size}: {one.name} parts from {those[0].name} by " + ", ".join(f"{x:.1e}" for x in found))
            parted = parted or not all(x <= limit for x in found)
        rows += measure(args, size, those)
    print("\n" + HEADER + "\n" + "|---" * (HEADER.count("|") - 1) + "|")
    print("\n".join(map(as_markdown, rows)))
    if args.json:
        args.json.write_text(
            json.dumps({"device": where, "torch": torch.__version__, "rows": [*map(asdict, rows)]}) + "\n"
        )
    if parted:
        print(f"results part by more than {limit:.0e} of the largest", file=sys.stderr)
    return int(parted)


if __name__ == "__main__":
    sys.exit(main())
