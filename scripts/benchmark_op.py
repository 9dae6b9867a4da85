"""Measure multi-scale deformable attention: forward and backward, ours against the reference and against any other.

All candidates of a case run by turns in one process; medians over the rounds. Encoders sample around a grid of
reference points (the initial offsets plus noise of a cell), as trained models do, and uniformly with --locations
uniform, which no cache likes. On a GPU a call is captured in a CUDA graph and replayed, so device time is measured and
not the host's.

    python scripts/benchmark_op.py                                      the usual cases on the CPU, or on the GPU
    python scripts/benchmark_op.py --cases E1 --batch 1 --threads 2
    python scripts/benchmark_op.py --against mmcv.ops:multi_scale_deformable_attn_pytorch

A rival given as --against MODULE:FUNCTION is called with (value, spatial_shapes, sampling_locations, attention_weights)
and has to be differentiable; an autograd.Function is called through its apply with the official six arguments, shapes
as tensors. --path FOLDER says where MODULE lies, if it is not installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detfamily.ops import backends, ms_deform_attn, ms_deform_attn_projected

HEADS, WIDTH, POINTS = 8, 32, 4
SMALL = ((76, 106), (38, 53), (19, 27), (10, 14))  # 608 x 848
LARGE = ((100, 167), (50, 84), (25, 42), (13, 21))  # 800 x 1333
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
MS = 1000.0


@dataclass(frozen=True)
class Case:
    """Sizes of a call; no queries: an encoder, where every token is a query."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    batch: int
    queries: int | None = None

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.shapes)

    @property
    def num_queries(self) -> int:
        return self.tokens if self.queries is None else self.queries

    def bytes(self, dtype: torch.dtype) -> tuple[float, float]:
        """What forward and backward have to move at least: each input read once, each result written once."""
        element, precise = dtype.itemsize, max(4, dtype.itemsize)
        value = self.batch * self.tokens * HEADS * WIDTH * element
        output = self.batch * self.num_queries * HEADS * WIDTH * element
        params = self.batch * self.num_queries * HEADS * len(self.shapes) * POINTS * 3 * precise
        accumulator = value // element * 4 if element < 4 else 0  # 16-bit gradients add up in float32: one pass more
        return value + params + output, 3 * value + accumulator * 2 + output + 2 * params


CASES = {
    case.name: case
    for case in (
        Case("E1", SMALL, 2),
        Case("E2", LARGE, 4),
        Case("D300", SMALL, 2, 300),
        Case("D900", SMALL, 2, 900),
        Case("E5", ((152, 212), *SMALL), 2),
        Case("E5b", ((200, 334), *LARGE), 4),
    )
}


@dataclass(frozen=True)
class Inputs:
    """Of one case in one dtype; locations and weights are what the raw projections come to."""

    shapes: tuple[tuple[int, int], ...]
    value: Tensor
    references: Tensor
    offsets: Tensor
    logits: Tensor
    locations: Tensor
    weights: Tensor
    grad_output: Tensor


def make_inputs(case: Case, dtype: torch.dtype, locations: str, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    batch, queries, levels = case.batch, case.num_queries, len(case.shapes)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    references = reference_points(case, generator).expand(batch, -1, levels, 2)
    offsets = initial_offsets(levels) + torch.randn(batch, queries, HEADS, levels, POINTS, 2, generator=generator)
    sizes = torch.tensor([(w, h) for h, w in case.shapes], dtype=torch.float32)
    if locations == "uniform":
        places = torch.rand(batch, queries, HEADS, levels, POINTS, 2, generator=generator)
        offsets = (places - references[:, :, None, :, None]) * sizes[:, None]
    logits = torch.randn(batch, queries, HEADS, levels * POINTS, generator=generator)
    final = references[:, :, None, :, None] + offsets / sizes[:, None]
    tokens = (batch, case.tokens, HEADS, WIDTH)

    def put(tensor: Tensor, kind: torch.dtype = precise) -> Tensor:
        return tensor.to(device, kind).contiguous().requires_grad_()

    return Inputs(
        case.shapes,
        put(torch.randn(tokens, generator=generator), dtype),
        put(references).detach(),
        put(offsets),
        put(logits),
        put(final),
        put(logits.softmax(-1).view(offsets.shape[:-1])),
        put(torch.randn(batch, queries, HEADS * WIDTH, generator=generator), dtype).detach(),
    )


def reference_points(case: Case, generator: torch.Generator) -> Tensor:
    """(1, Q, 1, 2): the tokens' own centres in an encoder, anywhere in a decoder."""
    if case.queries is not None:
        return torch.rand(1, case.queries, 1, 2, generator=generator)
    grids = []
    for h, w in case.shapes:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        grids.append(torch.stack([x, y], -1).view(-1, 2))
    return torch.cat(grids)[None, :, None]


def initial_offsets(levels: int) -> Tensor:
    """(M, L, P, 2): heads look in all directions, the p-th point p cells away."""
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    return (directions[:, None, None] * torch.arange(1, POINTS + 1)[:, None]).expand(-1, levels, -1, -1)


@dataclass(frozen=True)
class Candidate:
    """Something that computes the op. ``arguments`` picks from the inputs what is differentiated."""

    name: str
    backend: str | None
    arguments: Callable[[Inputs], tuple[Tensor, ...]]
    function: Callable[..., Tensor]

    def call(self, inputs: Inputs) -> Tensor:
        with backends.use_backend(self.backend) if self.backend else nullcontext():
            return self.function(inputs)


def plain_arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs.value, inputs.locations, inputs.weights


def projected_arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs.value, inputs.offsets, inputs.logits


def own_candidates(names: list[str]) -> Iterator[Candidate]:
    for name in names:
        yield Candidate(
            name, name, plain_arguments, lambda x: ms_deform_attn(x.value, x.shapes, x.locations, x.weights)
        )
        yield Candidate(
            f"{name}, projected",
            name,
            projected_arguments,
            lambda x: ms_deform_attn_projected(x.value, x.shapes, x.references, x.offsets, x.logits),
        )


def rival(path: str) -> Candidate:
    """What --against names."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"--against {path}: {error}; expected MODULE:FUNCTION, and --path for a folder") from error
    official = isinstance(function, type) and issubclass(function, torch.autograd.Function)
    return Candidate(path, None, plain_arguments, as_official(function) if official else as_ours(function))


def as_ours(function: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda x: function(x.value, x.shapes, x.locations, x.weights)


def as_official(function: Any) -> Callable[[Inputs], Tensor]:
    """Shapes and start indices as tensors on the device, made once; 16-bit values go through float32, as there."""
    made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def call(x: Inputs) -> Tensor:
        key = (x.shapes, x.value.device)
        if key not in made:
            shapes = torch.tensor(x.shapes, device=x.value.device)
            made[key] = shapes, torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        wide = x.value.float() if x.value.dtype in (torch.float16, torch.bfloat16) else x.value
        output: Tensor = function.apply(wide, *made[key], x.locations, x.weights, 64)
        return output.to(x.value.dtype)

    return call


# -- time -------------------------------------------------------------------------------------------------------------


def forward_of(candidate: Candidate, inputs: Inputs) -> Callable[[], Any]:
    def run() -> Tensor:
        with torch.no_grad():
            return candidate.call(inputs)

    return run


def backward_of(candidate: Candidate, inputs: Inputs) -> Callable[[], Any]:
    output, leaves = candidate.call(inputs), candidate.arguments(inputs)
    return lambda: torch.autograd.grad(output, leaves, inputs.grad_output, retain_graph=True)


Timer = Callable[[], float]


def wall_timer(run: Callable[[], Any]) -> Timer:
    run()

    def measure() -> float:
        start = time.perf_counter()
        run()
        return MS * (time.perf_counter() - start)

    return measure


def graph_timer(run: Callable[[], Any], repeats: int = 10) -> Timer:
    """Device time of one call: a graph of several, replayed. What cannot be captured is timed between events."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                run()
        replay = graph.replay
    except RuntimeError as error:
        print(f"  no CUDA graph ({str(error).splitlines()[0]}): timed with events, the host's share included")

        def replay() -> None:
            for _ in range(repeats):
                run()

    replay()

    def measure() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / repeats

    return measure


def alternate(timers: dict[str, Timer], rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    return {name: statistics.median(values) for name, values in times.items()}


def bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read plus written."""
    source = torch.empty(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    timer = graph_timer if device == "cuda" else wall_timer
    milliseconds = alternate({"copy": timer(lambda: target.copy_(source))}, 9)["copy"]
    return 2 * source.numel() / milliseconds * MS


# -- memory -----------------------------------------------------------------------------------------------------------


def memory_here(candidate: Candidate, inputs: Inputs, device: str) -> float:
    """MiB that forward and backward take at their peak beside the inputs, the output and the gradients included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(candidate.call(inputs), candidate.arguments(inputs), inputs.grad_output)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    torch.autograd.grad(candidate.call(inputs), candidate.arguments(inputs), inputs.grad_output)
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """MiB: now (VmRSS), or at the peak (VmHWM)."""
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(which))
    return int(line.split()[1]) / 1024


def memory_apart(args: argparse.Namespace, candidate: str, case: Case, dtype: str) -> float:
    """The same in a process of its own, whose peak no other candidate has raised."""
    command = [sys.executable, __file__, "--device", "cpu", "--cases", case.name, "--batch", str(case.batch)]
    command += ["--dtypes", dtype, "--locations", args.locations[0], "--memory-of", candidate]
    command += ["--backends", *args.backends, *(word for path in args.against for word in ("--against", path))]
    command += [word for folder in args.path for word in ("--path", folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"measuring the memory of {candidate} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Milliseconds, how many times as fast as the first candidate's, share of the limit, MiB."""

    case: str
    batch: int
    dtype: str
    locations: str
    candidate: str
    forward_ms: float
    backward_ms: float
    forward_ratio: float
    backward_ratio: float
    forward_share: float
    backward_share: float
    peak_mib: float


def measure(
    args: argparse.Namespace, case: Case, dtype: str, locations: str, candidates: list[Candidate], rate: float
) -> list[Row]:
    inputs = make_inputs(case, DTYPES[dtype], locations, args.device)
    timer = graph_timer if args.device == "cuda" else wall_timer
    forward = alternate({c.name: timer(forward_of(c, inputs)) for c in candidates}, args.rounds)
    backward = alternate({c.name: timer(backward_of(c, inputs)) for c in candidates}, args.rounds)
    limits = [MS * amount / rate for amount in case.bytes(DTYPES[dtype])]
    rows, first = [], candidates[0].name
    for c in candidates:
        peak = memory_here(c, inputs, args.device) if args.device == "cuda" else memory_apart(args, c.name, case, dtype)
        ratios = forward[first] / forward[c.name], backward[first] / backward[c.name]
        shares = limits[0] / forward[c.name], limits[1] / backward[c.name]
        rows.append(
            Row(
                case.name,
                case.batch,
                dtype,
                locations,
                c.name,
                forward[c.name],
                backward[c.name],
                *ratios,
                *shares,
                peak,
            )
        )
    return rows


HEADER = (
    "| case | B | dtype | locations | candidate | forward ms | backward ms | x forward | x backward "
    "| of limit fwd | bwd | peak MiB |"
)


def as_markdown(row: Row) -> str:
    numbers = f"{row.forward_ms:.3f} | {row.backward_ms:.3f} | {row.forward_ratio:.2f} | {row.backward_ratio:.2f}"
    shares = f"{row.forward_share:.0%} | {row.backward_share:.0%} | {row.peak_mib:.0f}"
    return f"| {row.case} | {row.batch} | {row.dtype} | {row.locations} | {row.candidate} | {numbers} | {shares} |"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, help="default: E1 D300 D900 on the CPU, all but E5b on a GPU"
    )
    parser.add_argument("--batch", type=int, help="instead of the case's own; 1 for E1 on the CPU unless given")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--locations", nargs="+", choices=["encoder", "uniform"], default=["encoder"])
    parser.add_argument(
        "--backends", nargs="*", choices=backends.BACKENDS, help="default: reference and the compiled one"
    )
    parser.add_argument("--against", action="append", default=[], metavar="MODULE:FUNCTION")
    parser.add_argument("--path", action="append", default=[], metavar="FOLDER", help="where rivals are imported from")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    on_cpu = args.device == "cpu"
    args.cases = args.cases or (["E1", "D300", "D900"] if on_cpu else [name for name in CASES if name != "E5b"])
    args.backends = ["reference", args.device] if args.backends is None else args.backends
    return args


def case_of(name: str, args: argparse.Namespace) -> Case:
    case = CASES[name]
    batch = args.batch or (1 if args.device == "cpu" and case.queries is None else case.batch)
    return Case(case.name, case.shapes, batch, case.queries)


def main() -> None:
    args = parse()
    sys.path[:0] = args.path
    if args.threads:
        torch.set_num_threads(args.threads)
    candidates = [*own_candidates(args.backends), *map(rival, args.against)]
    if args.memory_of:
        (wanted,) = (one for one in candidates if one.name == args.memory_of)
        inputs = make_inputs(case_of(args.cases[0], args), DTYPES[args.dtypes[0]], args.locations[0], args.device)
        small = make_inputs(Case("", ((2, 2),), 1), DTYPES[args.dtypes[0]], args.locations[0], args.device)
        memory_here(wanted, small, args.device)  # what the first call loads is no part of it
        print(memory_here(wanted, inputs, args.device))
        return
    rate = bandwidth(args.device)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}; a large copy moves {rate / 1e9:.0f} GB/s; {args.rounds} rounds")
    print(f"ratios are to {candidates[0].name}; the limit is what has to be moved at least, at the copy's rate\n")
    print(HEADER + "\n" + "|---" * HEADER.count(" | ") + "|---|", flush=True)
    rows: list[Row] = []
    for name in args.cases:
        for dtype in args.dtypes:
            for locations in args.locations:
                new = measure(args, case_of(name, args), dtype, locations, candidates, rate)
                print("\n".join(map(as_markdown, new)), flush=True)
                rows += new
    if args.json:
        record = {"device": where, "torch": torch.__version__, "bytes_per_second": rate, "rows": [*map(asdict, rows)]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
