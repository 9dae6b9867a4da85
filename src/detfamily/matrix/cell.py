"""One cell of a matrix: composed, built, trained for some steps, checked and measured."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import detfamily
from detfamily.build import build_criterion, build_detector, unread
from detfamily.config import build, compose, validate
from detfamily.criterion import Criterion, Losses
from detfamily.detector import Detector
from detfamily.engine.optim import AdamW, clip_gradients
from detfamily.engine.runtime import Runtime, seed_all
from detfamily.errors import DetfamilyError
from detfamily.info.cost import count_multiply_adds, count_parameters, shapes_only
from detfamily.matrix.request import Cell, Settings
from detfamily.structures import Batch, Images, Predictions, Size, Targets

OK, REFUSED, FAILED = "ok", "refused", "failed"
"""How a cell ends. Refused is what our checks say no to, with a reason; whatever else goes wrong is a failure."""

OFF_ZERO = 0.02
"""Added noise: some weights start at zero, and hide from the first gradient what lies before them."""

NEGLIGIBLE = 1e-8
"""A clipped gradient that AdamW's epsilon outweighs: as much is left by rounding where the exact gradient is zero."""

SHOWN = 6
"""Parameters with nothing to learn that a remark names."""

_PACKAGE = Path(detfamily.__file__).resolve().parent


class BrokenError(Exception):
    """A step that ran, and is wrong."""


@dataclass(frozen=True)
class Figures:
    """What was measured of a cell.

    Attributes:
        parameters: all.
        trained: those of them that are trained.
        multiply_adds: of a forward pass in evaluation, for one image of the batch's size.
        kept_bytes: tensors that the forward pass and the losses keep for the backward pass, parameters not counted.
        peak_bytes: the most that a step had allocated on the CUDA device; None on the CPU.
        seconds: a training step, the median.
        loss: of the first step.
        remark: what is worth a look, and no fault.
        device: where it was computed.
    """

    parameters: int
    trained: int
    multiply_adds: int
    kept_bytes: int
    peak_bytes: int | None
    seconds: float
    loss: float
    remark: str
    device: str


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        status: ``OK``, ``REFUSED`` or ``FAILED``.
        reason: why it was refused or failed.
        details: the traceback of a failure.
        figures: of a cell that is ok.
    """

    status: str
    reason: str = ""
    details: str = ""
    figures: Figures | None = None

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {"status": self.status, "reason": self.reason, **(asdict(self.figures) if self.figures else {})}


def examine(cell: Cell) -> Outcome:
    """Build and measure a cell; nothing that it raises goes further."""
    try:
        cfg = compose("train", cell.overrides)
        validate(cfg)
        figures = measure(cfg, cell.settings)
    except Exception as error:
        if is_refusal(error):
            return Outcome(REFUSED, str(error))
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return Outcome(FAILED, reason.splitlines()[0], traceback.format_exc())
    return Outcome(OK, figures=figures)


def is_refusal(error: Exception) -> bool:
    """Whether one of our checks refused what it was given: an error of ours, or a ValueError from a ``raise`` of ours.

    A ValueError of torch, or of Python within our code (an unpacking, a ``zip``), is a failure.
    """
    if isinstance(error, DetfamilyError):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = Path(last.filename).is_relative_to(_PACKAGE) and (last.line or "").startswith("raise ")
    return isinstance(error, ValueError) and raised


def measure(cfg: DictConfig, settings: Settings) -> Figures:
    """Build a detector without weights of others, take some training steps, and check the first of them.

    Args:
        cfg: composed from ``train.yaml``.
        settings: how it is measured.

    Raises:
        DetfamilyError: blocks that contradict each other, or images that are too small for them.
        BrokenError: something is not finite, a parameter is out of reach, or a step leaves it as it was.
    """
    runtime: Runtime = build(cfg.runtime)
    runtime.apply()
    seed_all(cfg.seed)
    step = Step(cfg, settings, runtime)
    kept, loss, idle = step.first()
    peak = None
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
    seconds = statistics.median(step.timed() for _ in range(settings.repeats))
    if step.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(step.device)
    parameters = count_parameters(step.detector)
    work = count_multiply_adds(shapes_only(cfg, settings.num_classes), settings.size)
    return Figures(
        parameters=parameters.total,
        trained=parameters.trained,
        multiply_adds=work.total,
        kept_bytes=kept,
        peak_bytes=peak,
        seconds=seconds,
        loss=loss,
        remark="; ".join([*_idle_words(idle), *unread(step.detector)]),
        device=runtime.describe().partition(", " + runtime.precision)[0] + f", {runtime.precision}",
    )


def _idle_words(names: list[str]) -> list[str]:
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return [f"nothing to learn here: {', '.join(names[:SHOWN])}{more}"] if names else []


class Step:
    """A detector and all that a training step of it needs.

    Args:
        cfg: composed from ``train.yaml``.
        settings: how it is measured.
        runtime: built from the config, and applied.
    """

    def __init__(self, cfg: DictConfig, settings: Settings, runtime: Runtime) -> None:
        self.runtime, self.device = runtime, runtime.torch_device()
        self.detector = build_detector(cfg, settings.num_classes, pretrained=False).to(self.device).train()
        off_zero(self.detector)
        if runtime.compile:
            self.detector.compile()
        self.criterion: Criterion = build_criterion(cfg).to(self.device)
        self.recipe: AdamW = build(cfg.optimizer)
        self.optimizer = self.recipe.build(self.detector)
        self.batch = make_batch(settings.size, settings.batch_size, settings.num_classes).to(self.device)

    def first(self) -> tuple[int, float, list[str]]:
        """The step that is checked.

        Returns:
            The bytes kept for the backward pass, the loss, and the parameters that have nothing to learn.
        """
        with counting_kept(self.detector) as kept:
            predictions, losses = self.forward()
        check_finite(predictions, losses)
        losses.total.backward()
        check_gradients(self.detector)
        before = {name: one.detach().clone() for name, one in self.detector.named_parameters()}
        self.update()
        return kept(), losses.total.item(), check_changes(before, self.detector)

    def timed(self) -> float:
        """Seconds of one step."""
        self.optimizer.zero_grad()
        self.wait()
        started = time.perf_counter()
        self.forward()[1].total.backward()
        self.update()
        self.wait()
        return time.perf_counter() - started

    def forward(self) -> tuple[dict[str, Predictions], Losses]:
        """Predictions in the chosen precision, and losses."""
        with self.runtime.autocast():
            predictions = self.detector(self.batch.images, self.batch.targets)
        return predictions, self.criterion(predictions, self.batch.targets)

    def update(self) -> None:
        """Clip and step."""
        clip_gradients(self.detector.parameters(), self.recipe.clip_norm)
        self.optimizer.step()

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def off_zero(detector: Detector) -> None:
    """Move trained weights a little."""
    for one in detector.parameters():
        if one.requires_grad:
            one.add_(OFF_ZERO * torch.randn_like(one))


def make_batch(size: Size, count: int, num_classes: int) -> Batch:
    """Images of noise, every other one smaller than the batch, with three, two, one and no objects in turn."""
    generator = torch.Generator().manual_seed(0)
    smaller = (size[0] * 3 // 4, size[1] * 3 // 4)
    sizes = tuple(smaller if index % 2 else size for index in range(count))
    pixels = torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)
    mask = torch.ones(count, *size, dtype=torch.bool)
    for index, (h, w) in enumerate(sizes):
        mask[index, :h, :w] = False
    pixels = pixels.masked_fill(mask[:, None], 0)
    objects = [3 - index % 4 for index in range(count)]
    labels = [torch.randint(0, num_classes, (n,), generator=generator) for n in objects]
    boxes = [0.3 + 0.3 * torch.rand(n, 4, generator=generator) for n in objects]
    ids = tuple(range(count))
    return Batch(Images(pixels, mask, sizes, sizes, ids), Targets.from_lists(labels, boxes, ids))


@contextmanager
def counting_kept(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the bytes of all storages that autograd keeps for the backward pass, those of parameters not counted."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: sum(kept.values())


def check_finite(predictions: dict[str, Predictions], losses: Losses) -> None:
    """Refuse numbers that are none.

    Raises:
        BrokenError: with the group of predictions, or the loss.
    """
    for name, one in predictions.items():
        if not (one.logits.isfinite().all() and one.boxes.isfinite().all()):
            raise BrokenError(f"predictions of the group {name!r} are not finite")
    for name, value in (("total", losses.total), *losses.parts.items()):
        if not value.isfinite():
            raise BrokenError(f"the loss {name!r} is not finite")


def check_gradients(detector: nn.Module) -> None:
    """Refuse trained parameters without a finite gradient, and frozen ones with any.

    Raises:
        BrokenError: with the parameter's name.
    """
    for name, one in detector.named_parameters():
        if one.requires_grad and one.grad is None:
            raise BrokenError(f"no gradient reaches {name}")
        if one.grad is not None and not one.requires_grad:
            raise BrokenError(f"{name} is frozen, and got a gradient")
        if one.grad is not None and not one.grad.isfinite().all():
            raise BrokenError(f"the gradient of {name} is not finite")


def check_changes(before: dict[str, Tensor], detector: nn.Module) -> list[str]:
    """Refuse a step that leaves a parameter with a gradient as it was, or changes a frozen one.

    Args:
        before: all parameters before the step.
        detector: after it, with the gradients of the step.

    Returns:
        The parameters that have nothing to learn here, whose gradient is zero up to rounding.

    Raises:
        BrokenError: with the parameter's name.
    """
    idle = []
    for name, one in detector.named_parameters():
        changed = not torch.equal(one.detach(), before[name])
        if one.grad is None:
            if changed:
                raise BrokenError(f"{name} is frozen, and a step changed it")
        elif float(one.grad.abs().max()) < NEGLIGIBLE:
            idle.append(name)
        elif not changed:
            raise BrokenError(f"a step leaves {name} as it was")
    return idle
