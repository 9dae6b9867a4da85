"""``detfamily doctor``: what is installed, which code computes the op on which device, is it right, is it fast.

Everything is printed in words that can be pasted into an issue. The exit status is 1 if a backend computes wrong
numbers, or if the one that DETFAMILY_OP_BACKEND asks for cannot be had.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from detfamily import __version__
from detfamily.errors import ConfigError
from detfamily.ops import backends, build, ms_deform_attn, ms_deform_attn_projected
from detfamily.structures import Size

PACKAGES = ("torch", "torchvision", "hydra-core", "wandb", "timm", "natten", "ninja")
CHECKED: tuple[Size, ...] = ((7, 11), (4, 6), (1, 3))
MEASURED: dict[str, tuple[Size, ...]] = {
    "cpu": ((38, 50), (19, 25), (10, 13), (5, 7)),
    "cuda": ((100, 134), (50, 67), (25, 34), (13, 17)),
}
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest difference from float64, relative to the largest number; a wrong corner or weight exceeds it far."""

REPEATS = 3
WRONG = 1


@dataclass(frozen=True)
class Case:
    """Inputs of the op, in float64 on the CPU."""

    shapes: tuple[Size, ...]
    value: Tensor
    references: Tensor
    offsets: Tensor
    logits: Tensor

    def to(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Value, references, offsets and logits as they come under autocast; the op's places stay in float32."""
        small = torch.float64 if dtype == torch.float64 else torch.float32
        moved = [self.value.to(device, dtype)]
        moved += [one.to(device, small) for one in (self.references, self.offsets, self.logits)]
        return [one.detach().requires_grad_() for one in moved]


def doctor(arguments: Sequence[str] = ()) -> None:
    """Print all there is to know about the op on this machine.

    Raises:
        ConfigError: arguments are given; there are none.
        SystemExit: with status 1, if a check fails.
    """
    if arguments:
        raise ConfigError(f"doctor takes no settings, and {' '.join(arguments)!r} is given")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # why a backend is not there is printed anyway
        _print("versions", _versions())
        devices = _devices()
        forced, failed = _forced([device for device, present in devices.items() if present])
        _print("multi-scale deformable attention", [*_chosen(devices), *forced])
        used = [(device, backend) for device, there in devices.items() if there for backend in _available(device)]
        checks = [(device, backend, *_check(device, backend)) for device, backend in used]
        _print("check against float64, forward and gradients", [(_label(d, b), words) for d, b, _, words in checks])
        _print("speed, forward + backward of an encoder layer's op", _speed(used))
    if failed or not all(right for *_, right, _ in checks):
        raise SystemExit(WRONG)


def _label(device: str, backend: str) -> str:
    return f"{device}, {'plain PyTorch' if backend == backends.REFERENCE else 'compiled'}"


def _print(title: str, rows: Iterable[tuple[str, str]]) -> None:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    print(title, *(f"  {name:<{width}}  {words}" for name, words in rows), "", sep="\n", flush=True)


# -- what there is ----------------------------------------------------------------------------------------------------


def _versions() -> list[tuple[str, str]]:
    rows = [("detfamily", f"{__version__} in {Path(__file__).parent}"), ("python", platform.python_version())]
    rows += [(name, _version(name)) for name in PACKAGES]
    if torch.cuda.is_available():
        driver = backends.driver_version()
        rows.append(("CUDA", f"{torch.version.cuda} in PyTorch, driver for {driver // 1000}.{driver % 1000 // 10}"))
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            rows.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"))
    else:
        rows.append(("CUDA", f"{torch.version.cuda or 'not'} in PyTorch, no GPU found"))
    rows += [("C++ compiler", _compiler("cpu")), ("nvcc", _compiler("cuda")), ("processor", _processor())]
    shipped = [kind for kind in build.KINDS if (backends.SHIPPED / build.library_name(kind)).is_file()]
    rows.append(("compiled code", f"{', '.join(shipped)} in the package" if shipped else "none in the package"))
    return [*rows, ("cache", _cache())]


def _version(name: str) -> str:
    try:
        return metadata.version(name) if name != "torch" else torch.__version__
    except metadata.PackageNotFoundError:
        return "not installed"


def _compiler(kind: build.Kind) -> str:
    try:
        return build.find_tools(kind, Path(torch.__file__).parent).version
    except build.BuildError as error:
        return str(error)


def _processor() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in use"


def _cache() -> str:
    try:
        return str(build.cache_folder())
    except build.BuildError as error:
        return str(error)


def _devices() -> dict[str, bool]:
    """The kinds of devices that there is something to say about, and whether this machine has them."""
    devices = {"cpu": True, "cuda": torch.cuda.is_available()}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return devices if accelerator is None else {**devices, accelerator.type: True}


def _chosen(devices: Iterable[str]) -> list[tuple[str, str]]:
    with backends.use_backend(None):
        return [(f"on {device}", backends.describe(device)) for device in devices]


def _forced(devices: Iterable[str]) -> tuple[list[tuple[str, str]], bool]:
    """What DETFAMILY_OP_BACKEND makes of it, and whether that is an error on all devices of this machine."""
    name = os.environ.get(backends.VARIABLE)
    if not name:
        return [], False
    rows, errors = [], []
    for device in devices:
        try:
            rows.append((f"forced on {device}", backends.describe(device)))
        except ConfigError as error:
            errors.append((f"forced on {device}", str(error)))
    return rows + errors, not rows


def _available(device: str) -> list[str]:
    with backends.use_backend(None):
        return list(dict.fromkeys([backends.REFERENCE, backends.backend_for(device)]))


# -- is it right ------------------------------------------------------------------------------------------------------


def _check(device: str, backend: str) -> tuple[bool, str]:
    """Whether a backend's numbers are right, and how far they are from float64 in each precision."""
    case = _case(CHECKED, batch=2, heads=3, width=20, points=3, queries=40)
    right, words = True, []
    for dtype, limit in LIMITS.items():
        try:
            error = _error(case, device, backend, dtype)
        except (RuntimeError, NotImplementedError, ValueError) as failure:
            return False, f"FAILS in {_name(dtype)}: {str(failure).splitlines()[0]}"
        right = right and error <= limit
        words.append(f"{_name(dtype)} {error:.0e}" + ("" if error <= limit else f" WRONG, above {limit:.0e}"))
    return right, ("ok, " if right else "") + ", ".join(words)


def _error(case: Case, device: str, backend: str, dtype: torch.dtype) -> float:
    """Largest relative difference of outputs and gradients, of both forms of the op."""
    given = case.to(device, dtype)
    exact = [one.detach().cpu().double().requires_grad_() for one in given]  # the same numbers, already rounded
    errors = []
    for form in (_plain, _projected):
        with backends.use_backend(backend):
            found = _results(form, case.shapes, given)
        with backends.use_backend(backends.REFERENCE):
            expected = _results(form, case.shapes, exact)
        for one, true in zip(found, expected, strict=True):
            difference = (one.detach().cpu().double() - true).abs().max().item()
            errors.append(difference / max(true.abs().max().item(), 1e-12))
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _results(form: Callable[..., Tensor], shapes: tuple[Size, ...], inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a sum in which every element has a weight of its own."""
    output = form(shapes, *inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    gradients = torch.autograd.grad(output, inputs, weights.to(output))
    return [output.detach(), *gradients]


def _projected(shapes: tuple[Size, ...], value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return ms_deform_attn_projected(value, shapes, references, offsets, logits)


def _plain(shapes: tuple[Size, ...], value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=references.dtype, device=references.device)
    locations = references[:, :, None, :, None] + offsets / sizes[:, None]
    return ms_deform_attn(value, shapes, locations, logits.softmax(-1).view(offsets.shape[:-1]))


def _case(shapes: tuple[Size, ...], batch: int, heads: int, width: int, points: int, queries: int | None) -> Case:
    """Random inputs; the places are up to two cells around a grid, some outside, and none near the border of a cell.

    There the gradients jump, and rounding alone would decide on which side a sample is.
    """
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.rand(size, generator=random, dtype=torch.float64)

    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)
    centers = torch.cat([_grid(h, w) for h, w in shapes])
    if queries is not None:
        centers = centers[torch.randperm(tokens, generator=random)[:queries]]
    references = centers[None, :, None].expand(batch, -1, levels, -1)
    count = references.shape[1]
    cells = (references * sizes)[:, :, None, :, None] - 0.5
    steps = (4 * draw(batch, count, heads, levels, points, 2) - 2).floor()
    inside = 0.1 + 0.8 * draw(batch, count, heads, levels, points, 2)
    offsets = cells.floor() + steps + inside - cells
    value = 2 * draw(batch, tokens, heads, width) - 1
    return Case(shapes, value, references.clone(), offsets, 4 * draw(batch, count, heads, levels * points))


def _grid(h: int, w: int) -> Tensor:
    """(h * w, 2) the centres of a map's cells."""
    y, x = ((torch.arange(size, dtype=torch.float64) + 0.5) / size for size in (h, w))
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- is it fast -------------------------------------------------------------------------------------------------------


def _speed(used: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    rows, slow = [], 0.0
    for device, backend in used:
        case = _case(MEASURED.get(device, MEASURED["cpu"]), batch=1, heads=8, width=32, points=4, queries=None)
        inputs = case.to(device, torch.float32)
        with backends.use_backend(backend):
            seconds = _seconds(partial(_results, _projected, case.shapes, inputs), device)
        if backend == backends.REFERENCE:
            slow = seconds
        compared = "" if backend == backends.REFERENCE else f", {slow / seconds:.1f} times as fast as plain PyTorch"
        rows.append((_label(device, backend), f"{1000 * seconds:.1f} ms for {len(inputs[0][0])} tokens{compared}"))
    return rows


def _seconds(run: Callable[[], object], device: str) -> float:
    """Median time of a run, after one that warms up."""
    moments = []
    for _ in range(REPEATS + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
        run()
    return statistics.median(after - before for before, after in list(pairwise(moments))[1:])
