"""What was not finite in a step, and where it came from: a second pass over the same images, with every module watched.

The first pass asks the device for nothing, so it only knows that something was not finite. This one asks after every
module, once, when it is too late for speed anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from detfamily.criterion import Losses, Normalizer
from detfamily.errors import NonFiniteError
from detfamily.structures import Batch, Targets

NOTHING = "a second pass over the same images was finite"


@dataclass(frozen=True)
class StepRecord:
    """What it takes to go through a step once more.

    Attributes:
        batches: the micro-batches of this process, on the host.
        normalizer: what their losses are divided by.
        random: states of the generators that the model draws from, before the step.
    """

    batches: Sequence[Batch]
    normalizer: Normalizer
    random: Mapping[str, Tensor]

    @classmethod
    def of(cls, batches: Sequence[Batch], normalizer: Normalizer) -> StepRecord:
        """To be called before the step."""
        return cls(batches, normalizer, _generators())


@torch.enable_grad()
def diagnose(
    model: nn.Module,
    criterion: nn.Module,
    record: StepRecord,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    scale: float = 1.0,
) -> str | None:
    """Find the first tensor of a step that is not finite. Everything is left as it was: buffers, gradients, generators.

    Looked at are, in this order and up to the first that is bad: the boxes of the targets; the outputs of the modules
    in the order of the computation, with the parameters that already were bad; the predictions' losses; the gradients
    of the parameters, from the end of the computation to its start.

    Args:
        model: as it was in the step; not wrapped for several processes.
        criterion: predictions, targets, normaliser -> losses.
        record: of the step.
        device: the model's.
        autocast: makes the context of the forward pass.
        scale: of the loss, for float16.

    Returns:
        Words that name the tensor and, where it can be told, the images; None if all is finite.
    """
    buffers = [(one, one.clone()) for one in model.buffers()]
    now = _generators()
    _set_generators(record.random)
    try:
        with torch.compiler.set_stance("force_eager"):
            for batch in record.batches:
                if words := _of_batch(model, criterion, batch, record.normalizer, device, autocast, scale):
                    return words
            return None
    except torch.OutOfMemoryError:
        return "there is no memory for a second pass that would tell more"
    finally:
        _set_generators(now)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _of_batch(
    model: nn.Module,
    criterion: nn.Module,
    batch: Batch,
    normalizer: Normalizer,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    scale: float,
) -> str | None:
    if words := _bad_target(batch.targets):
        return words
    spoiled = [f"{name} ({words})" for name, one in model.named_parameters() if (words := bad_words(one))]
    batch = batch.to(device)
    with _Watch(model, batch.images.image_ids) as watch:
        with autocast():
            predictions = model(batch.images, batch.targets)
        if spoiled or watch.first:
            first = watch.first or "no output of a module shows it"
            return f"The weights are broken: {_some(spoiled)}; {first}" if spoiled else f"First is {first}"
    try:
        losses: Losses = criterion(predictions, batch.targets, normalizer)
    except NonFiniteError as error:
        return f"First is {error}"
    for name, part in losses.parts.items():
        if words := bad_words(part):
            return f"First is the loss {name} ({words})"
    if words := bad_words(losses.total):
        return f"First is the sum of the losses ({words})"
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    gradients = torch.autograd.grad(scale * losses.total, list(parameters.values()), allow_unused=True)
    bad = {name: one for name, one in zip(parameters, gradients, strict=True) if one is not None and bad_words(one)}
    if not bad:
        return None
    # A module that comes late in the forward pass comes early in the backward pass.
    turn = {name: index for index, name in enumerate(watch.order)}
    first = max(bad, key=lambda name: turn.get(name.rpartition(".")[0], -1))
    others = f" and those of {len(bad) - 1} more parameters" if len(bad) > 1 else ""
    return f"First is the gradient of {first} ({bad_words(bad[first])}){others}; all losses are finite"


class _Watch:
    """Notes in which order modules compute, and the first output that is not finite.

    Attributes:
        order: names of the modules, in the order in which they were done.
        first: words about the first bad output, or None.
    """

    def __init__(self, model: nn.Module, image_ids: Sequence[int]) -> None:
        self.model, self.image_ids = model, image_ids
        self.order: list[str] = []
        self.first: str | None = None

    def __enter__(self) -> _Watch:
        self._handles = [
            module.register_forward_hook(partial(self._look, name), with_kwargs=True)
            for name, module in self.model.named_modules()
            if name
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, name: str, module: nn.Module, inputs: Any, more: Any, output: Any) -> None:
        self.order.append(name)
        if self.first is not None:
            return
        # Infinity may come in on purpose (the box of a token that can propose none); NaN never does.
        infinity_counts = not any(bad_words(tensor) for tensor in tensors((inputs, more)))
        for tensor in tensors(output):
            if (words := bad_words(tensor)) and (infinity_counts or tensor.isnan().any()):
                self.first = f"the output of {name} ({words}{self._images(tensor)})"
                return

    def _images(self, tensor: Tensor) -> str:
        """Which images are bad, where the first axis is the batch's and not all of them are."""
        if tensor.dim() < 2 or tensor.shape[0] != len(self.image_ids):
            return ""
        fine = tensor.isfinite().flatten(1).all(1).tolist()
        bad = [str(one) for one, good in zip(self.image_ids, fine, strict=True) if not good]
        return f", image {', '.join(bad)}" if len(bad) < len(fine) else ""


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from tensors(getattr(value, one.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def bad_words(tensor: Tensor) -> str:
    """Words such as "3 NaN and 1 infinite of 256 numbers"; none where all are finite."""
    if not tensor.is_floating_point() or tensor.isfinite().all():
        return ""
    nans, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    counts = [f"{nans} NaN"] * bool(nans) + [f"{infinite} infinite"] * bool(infinite)
    return f"{' and '.join(counts)} of {tensor.numel()} number{'s' * (tensor.numel() > 1)}"


def _bad_target(targets: Targets) -> str | None:
    fine = targets.boxes.isfinite().all(-1)
    for image, count in enumerate(targets.counts):
        for index in range(count):
            if not fine[image, index]:
                box = ", ".join(f"{value:g}" for value in targets.boxes[image, index].tolist())
                return (
                    f"First is the box of object {index} of image {targets.image_ids[image]}: cx, cy, w, h = ({box}) "
                    "after augmentation"
                )
    return None


def _some(names: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
