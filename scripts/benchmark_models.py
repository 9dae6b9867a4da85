"""Time whole models against a rival: inference at 800x1066 and a training step of two images at 320x320.

    python scripts/benchmark_models.py                              ours alone
    python scripts/benchmark_models.py --against transformers       by turns with Hugging Face's models
    python scripts/benchmark_models.py --against my_module:rival    by turns with anything else; --path says where it is

Both sides have random weights, as many queries, layers, levels and classes, the same pixels and objects, a loss on
every decoder layer, and stages C3 to C5 of the backbone trained; the loop around them (clipping, fused AdamW) is one
and the same. They run by turns in one process; a figure is the median over the rounds, a ratio the median of the
rounds' ratios. Calls of aten functions and the peak of memory beyond weights and moments come from one profiled run,
what would have to be read from a device from another one (see ``host_reads.py``).

A rival is a callable ``rival(experiment: str, num_classes: int) -> Side``. If it can tell its matcher and criterion
apart, it runs them within ``torch.profiler.record_function(CRITERION)``. On a busy machine set GOMP_SPINCOUNT=20000, as
``detfamily`` does for itself: otherwise threads that wait for each other burn the time of both sides.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from host_reads import count_host_reads
from torch import Tensor, nn
from torch.profiler import record_function

from detfamily.build import build_criterion, build_detector
from detfamily.config import compose
from detfamily.engine.runtime import DTYPES, keep_freed_memory
from detfamily.files import write_text_atomically
from detfamily.structures import Images, Targets

EXPERIMENTS = ("deformable_detr_r50", "detr_r50_500ep")
NUM_CLASSES = 91
OBJECTS = 7  # of each image, as many as COCO has on average
CLIP_NORM = 0.1
CRITERION = "matcher and criterion"
"""What a side calls that part of its loss for the profiler."""


@dataclass
class Side:
    """One of the two that are compared.

    Attributes:
        name: for the table.
        model: whose parameters are trained.
        predict: (B, 3, H, W) normalised pixels -> anything.
        loss: pixels, labels (B, T) and boxes (B, T, 4) cx, cy, w, h in (0, 1) -> a scalar.
    """

    name: str
    model: nn.Module
    predict: Callable[[Tensor], object]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]


Rival = Callable[[str, int], Side]


def ours(experiment: str, num_classes: int) -> Side:
    cfg = compose("train", [f"experiment={experiment}", "data.root=unused"])
    model, criterion = build_detector(cfg, num_classes, pretrained=False), build_criterion(cfg)

    def images(pixels: Tensor) -> Images:
        batch, _, height, width = pixels.shape
        mask = torch.zeros(batch, height, width, dtype=torch.bool, device=pixels.device)
        sizes = ((height, width),) * batch
        return Images(pixels, mask, sizes, sizes, tuple(range(batch)))

    def loss(pixels: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        count = (labels.shape[1],) * len(labels)
        targets = Targets(labels, boxes, count, tuple(range(len(labels))))
        criterion.to(pixels.device)
        predictions = model(images(pixels), targets)
        with record_function(CRITERION):
            total: Tensor = criterion(predictions, targets).total
        return total

    return Side("detfamily", model, lambda pixels: model(images(pixels)), loss)


def transformers(experiment: str, num_classes: int) -> Side:
    """Hugging Face's model of that family, with its own ResNet-50, nothing downloaded.

    Its rule for frozen parts of that backbone misses the parameters' names and freezes all of it, so that a step is
    cheaper than the recipe's: the stages that the recipe trains are released here.
    """
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, DetrConfig, DetrForObjectDetection
    from transformers import ResNetConfig as Backbone

    recipe = {"auxiliary_loss": True, "attention_dropout": 0.1, "activation_dropout": 0.1}  # as the papers' code has it
    common: dict[str, Any] = {"num_labels": num_classes, **recipe}
    if experiment.startswith("deformable_detr"):
        backbone = Backbone(out_features=["stage2", "stage3", "stage4"])
        model = DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=backbone, **common))
    else:
        model = DetrForObjectDetection(DetrConfig(backbone_config=Backbone(out_features=["stage4"]), **common))
    for name, parameter in model.named_parameters():
        if any(f".stages.{stage}." in name for stage in (1, 2, 3)):
            parameter.requires_grad_(True)

    def loss(pixels: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        targets = [{"class_labels": a, "boxes": b} for a, b in zip(labels, boxes, strict=True)]
        total: Tensor = model(pixels, labels=targets).loss
        return total

    return Side("transformers", model, lambda pixels: model(pixels), loss)


@dataclass
class Task:
    """Something that both sides do, on the same input.

    Attributes:
        name: inference or train.
        batch: number of images.
        size: (height, width).
        precision: of products and convolutions.
        device: where.
    """

    name: str
    batch: int
    size: tuple[int, int]
    precision: str
    device: torch.device

    def prepare(self, side: Side) -> Callable[[], object]:
        """Put the side on the device, and give what is to be timed."""
        rng = torch.Generator().manual_seed(0)
        pixels = torch.randn(self.batch, 3, *self.size, generator=rng).to(self.device)
        labels = torch.randint(0, NUM_CLASSES, (self.batch, OBJECTS), generator=rng).to(self.device)
        low, extent = torch.rand(2, self.batch, OBJECTS, 2, generator=rng).mul(0.5).to(self.device)
        boxes = torch.cat([low + extent / 2, extent], -1)
        side.model.to(self.device)
        return self._inference(side, pixels) if self.name == "inference" else self._step(side, pixels, labels, boxes)

    def _autocast(self) -> Any:
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, DTYPES[self.precision])

    def _inference(self, side: Side, pixels: Tensor) -> Callable[[], object]:
        def run() -> object:
            side.model.eval()
            with torch.inference_mode(), self._autocast():
                return side.predict(pixels)

        return run

    def _step(self, side: Side, pixels: Tensor, labels: Tensor, boxes: Tensor) -> Callable[[], object]:
        parameters = [one for one in side.model.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=1e-4, fused=True)

        def run() -> None:
            side.model.train()
            with self._autocast():
                loss = side.loss(pixels, labels, boxes)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()

        return run


@dataclass
class Figures:
    """What one side took for one task.

    Attributes:
        ms: wall time of each round.
        cpu_ms: CPU time of the process in each round, which other work on the machine disturbs less.
        aten_calls: of one run, calls within calls counted too.
        criterion_calls: those of them in matcher and criterion, forward; 0 if nobody says where these are.
        host_reads: copies to the host in one run, if the model were on a device of its own.
        peak_mib: most memory beyond what lies there between two runs.
        device_ms: how long the GPU had work in one run; far below ``ms``, the host is what one waits for.
        kernels: those of a GPU that took longest -> milliseconds and calls in one run.
        shares: operator -> share of the device's time without that of the operators it calls, largest first.
        parameters: of the model.
        trainable: those with a gradient.
    """

    parameters: int
    trainable: int
    aten_calls: int = 0
    criterion_calls: int = 0
    host_reads: int = 0
    peak_mib: float = 0.0
    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    device_ms: float = 0.0
    kernels: dict[str, list[float]] = field(default_factory=dict)


def compare(task: Task, sides: list[Side], rounds: int) -> dict[str, Figures]:
    """Run all sides by turns; the side that begins changes from round to round."""
    runs = {side.name: task.prepare(side) for side in sides}
    figures = {side.name: Figures(*count_parameters(side.model)) for side in sides}
    for name, run in runs.items():
        run()
        profile(run, task.device, figures[name])
        figures[name].host_reads = count_host_reads(run)
    for index in range(rounds):
        for name in list(runs) if index % 2 == 0 else list(runs)[::-1]:
            wall, cpu = clock(runs[name], task.device)
            figures[name].ms.append(wall)
            figures[name].cpu_ms.append(cpu)
    return figures


def clock(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds of wall and of CPU time."""
    gc.collect()  # not in the middle of somebody's round
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(run: Callable[[], object], device: torch.device, figures: Figures) -> None:
    """Fill in the figures that come from one profiled run."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * cuda]
    with torch.profiler.profile(activities=activities, profile_memory=not cuda) as profiler:
        run()
        synchronize(device)
    rows = profiler.key_averages()
    figures.aten_calls = sum(row.count for row in rows if row.key.startswith("aten::"))
    figures.criterion_calls = calls_within(CRITERION, profiler.events())
    # on a GPU, rows of kernels stand beside those of the operators that started them
    operators = [row for row in rows if row.device_type == torch.autograd.DeviceType.CPU]
    times = {row.key: row.self_device_time_total if cuda else row.self_cpu_time_total for row in operators}
    total = sum(times.values())
    kernels = [row for row in rows if row.device_type != torch.autograd.DeviceType.CPU and row.key != CRITERION]
    figures.device_ms = sum(row.self_device_time_total for row in kernels) / 1000
    kernels.sort(key=lambda row: -row.self_device_time_total)
    figures.kernels = {row.key[:100]: [row.self_device_time_total / 1000, row.count] for row in kernels[:40]}
    figures.shares = {key: one / total for key, one in sorted(times.items(), key=lambda pair: -pair[1]) if one}
    if cuda:
        figures.peak_mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    else:
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
        changes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
        figures.peak_mib = peak(changes) / 2**20


def calls_within(name: str, events: Iterable[Any]) -> int:
    """Calls of aten functions while a part of that name runs."""
    events = list(events)
    parts = [one.time_range for one in events if one.name == name]
    calls = [one.time_range for one in events if one.name.startswith("aten::")]
    return sum(part.start <= call.start and call.end <= part.end for call in calls for part in parts)


def peak(changes: list[int]) -> int:
    """The largest sum of the first so many changes."""
    now = highest = 0
    for change in changes:
        now += change
        highest = max(highest, now)
    return highest


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All, and those with a gradient; buffers of frozen batch norms are none."""
    parameters = list(model.parameters())
    return sum(one.numel() for one in parameters), sum(one.numel() for one in parameters if one.requires_grad)


def ratios(figures: Mapping[str, Figures]) -> tuple[float, float] | None:
    """How many times as long as the first side the second one takes: medians over rounds of wall and of CPU time."""
    if len(figures) < 2:
        return None
    own, other = figures.values()
    wall = statistics.median(b / a for a, b in zip(own.ms, other.ms, strict=True))
    cpu = statistics.median(b / a for a, b in zip(own.cpu_ms, other.cpu_ms, strict=True))
    return wall, cpu


def table(title: str, figures: Mapping[str, Figures], operators: int) -> str:
    columns = (
        f"{'ms':>9}{'CPU ms':>9}{'aten calls':>12}{'criterion':>11}{'host reads':>12}{'peak MiB':>10}{'GPU ms':>8}"
    )
    lines = [title, f"  {'':14}{columns}{'M params':>10}{'trained':>9}"]
    for name, one in figures.items():
        lines.append(
            f"  {name:14}{statistics.median(one.ms):9.0f}{statistics.median(one.cpu_ms):9.0f}{one.aten_calls:12d}"
            f"{one.criterion_calls or '-':>11}{one.host_reads:12d}{one.peak_mib:10.0f}"
            f"{f'{one.device_ms:.1f}' if one.device_ms else '-':>8}"
            f"{one.parameters / 1e6:10.3f}{one.trainable / 1e6:9.3f}"
        )
    both = ratios(figures)
    if both is not None:
        own, other = figures.values()
        known = own.criterion_calls and other.criterion_calls
        criterion = f"{other.criterion_calls / own.criterion_calls:.2f}" if known else ""
        lines.append(
            f"  {'ratio':14}{both[0]:9.2f}{both[1]:9.2f}{other.aten_calls / own.aten_calls:12.2f}"
            f"{criterion:>11}{'':12}{other.peak_mib / own.peak_mib:10.2f}"
        )
    for name, one in figures.items():
        largest = list(one.shares.items())[:operators]
        if largest:
            words = ", ".join(f"{key.removeprefix('aten::')} {100 * share:.0f} %" for key, share in largest)
            lines.append(f"  {name}: {words}")
    return "\n".join(lines)


def find_rival(name: str) -> Rival:
    """The rival of a name: transformers, or module:function.

    Raises:
        SystemExit: it cannot be imported.
    """
    if name == "transformers":
        if importlib.util.find_spec("transformers") is None:
            raise SystemExit("--against transformers needs that package: pip install transformers")
        return transformers
    module, _, function = name.partition(":")
    if not function:
        raise SystemExit(f"--against {name}: expected 'transformers' or module:function")
    try:
        found: Rival = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"--against {name}: {error}") from error
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="transformers, or module:function")
    parser.add_argument("--path", action="append", default=[], metavar="FOLDER", help="where a rival is imported from")
    parser.add_argument("--experiments", nargs="+", default=EXPERIMENTS, help="of configs/experiment")
    parser.add_argument("--tasks", nargs="+", choices=("inference", "train"), default=("inference", "train"))
    parser.add_argument("--inference-size", nargs=2, type=int, default=(800, 1066), metavar=("H", "W"))
    parser.add_argument("--train-size", nargs=2, type=int, default=(320, 320), metavar=("H", "W"))
    parser.add_argument("--inference-batch", type=int, default=1)
    parser.add_argument("--train-batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of the CPU's operators (default: torch's choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--operators", type=int, default=6, help="largest operators to list")
    parser.add_argument("--keep-freed-memory", action="store_true", help="as runtime.malloc does, for both sides")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.keep_freed_memory:
        keep_freed_memory()
    sys.path[:0] = [*args.path, os.getcwd()]
    rivals = [ours] if args.against is None else [ours, find_rival(args.against)]

    machine = {"torch": torch.__version__, "processor": platform.processor(), "threads": torch.get_num_threads()}
    machine["device"] = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu"
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results = []
    for experiment in args.experiments:
        torch.manual_seed(0)
        sides = [rival(experiment, NUM_CLASSES) for rival in rivals]
        for name in args.tasks:
            size = tuple(args.inference_size if name == "inference" else args.train_size)
            batch = args.inference_batch if name == "inference" else args.train_batch
            task = Task(name, batch, size, args.precision, torch.device(args.device))
            figures = compare(task, sides, args.rounds)
            title = (
                f"{experiment}, {name}, batch {batch} of {size[0]}x{size[1]}, {args.precision}, {args.rounds} rounds"
            )
            print(table(title, figures, args.operators), flush=True)
            results.append(
                {
                    "experiment": experiment,
                    "task": name,
                    "batch": batch,
                    "size": size,
                    "precision": args.precision,
                    "sides": {side: asdict(one) for side, one in figures.items()},
                    "ratios": ratios(figures),
                }
            )
    if args.json is not None:
        write_text_atomically(args.json, json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
