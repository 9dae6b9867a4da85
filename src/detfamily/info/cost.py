"""Parameters of a detector, and the multiply-adds of its forward pass, by part. Neither needs numbers, only shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from detfamily.build import build_detector
from detfamily.detector import Detector
from detfamily.structures import Images, Size

PARTS = {
    "position": "positions",
    "level_embed": "positions",
    "encoder_position": "positions",
    "memory_position": "positions",
    "query_source": "queries",
    "patterns": "queries",
}
"""Modules of the detector that are one part; any other is a part of its own."""

KINDS = {
    "convolution": "convolution",
    "mm": "linear",
    "addmm": "linear",
    "bmm": "attention",
    "baddbmm": "attention",
    "ms_deform_attn": "sampling",
    "ms_deform_attn_projected": "sampling",
}
"""Name of an op -> what it is there for: products of batches of matrices are those of attention."""


@dataclass(frozen=True)
class Parameters:
    """How many numbers there are.

    Attributes:
        parts: part -> its parameters.
        trained_parts: part -> those of them that are trained.
        stored: numbers in a checkpoint, which also has what is no parameter, such as statistics of frozen norms.
    """

    parts: dict[str, int]
    trained_parts: dict[str, int]
    stored: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def trained(self) -> int:
        return sum(self.trained_parts.values())


@dataclass(frozen=True)
class MultiplyAdds:
    """What a forward pass computes: products and sums of convolutions, matrices and sampling, counted in pairs.

    Papers call these FLOPs; ``FlopCounterMode`` counts two FLOPs for each. What is done element by element does not
    count.

    Attributes:
        parts: part -> its multiply-adds.
        kinds: "convolution", "linear", "attention" (its two products), "sampling" -> multiply-adds.
    """

    parts: dict[str, int]
    kinds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def of(self, kinds: Iterable[str]) -> int:
        """Those of some kinds only."""
        return sum(self.kinds.get(kind, 0) for kind in kinds)


class Cost:
    """What a detector has and does, each counted when it is asked for, and once.

    Args:
        detector: in evaluation.
    """

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.parameters = count_parameters(detector)
        self._work: dict[Size, MultiplyAdds] = {}

    def work(self, size: Size) -> MultiplyAdds:
        """The multiply-adds for an image of (height, width)."""
        if size not in self._work:
            self._work[size] = count_multiply_adds(self.detector, size)
        return self._work[size]


def shapes_only(cfg: DictConfig, num_classes: int) -> Detector:
    """The detector of a config for evaluation, on the meta device: no memory, no weights, no download.

    Raises:
        ConfigError: the config describes none.
    """
    with torch.device("meta"):
        return build_detector(cfg, num_classes, pretrained=False).eval()


def count_parameters(detector: Detector) -> Parameters:
    """Count parameters; one that several modules share counts once."""
    every = list(detector.named_parameters())
    return Parameters(
        _summed((name, one) for name, one in every),
        _summed((name, one) for name, one in every if one.requires_grad),
        sum(one.numel() for one in detector.state_dict().values()),
    )


def count_multiply_adds(detector: Detector, size: Size) -> MultiplyAdds:
    """Count what the detector computes for one image, without padding.

    Args:
        detector: in evaluation, on any device; on the meta device nothing is really computed.
        size: height and width in pixels.

    Raises:
        DataError: the image is too small for the detector.
    """
    device = next(detector.parameters()).device
    pixels = torch.zeros(1, 3, *size, dtype=torch.uint8, device=device)
    images = Images(pixels, torch.zeros(1, *size, dtype=torch.bool, device=device), (size,), (size,), (0,))
    with _as_constants(detector), torch.no_grad(), FlopCounterMode(display=False) as mode:
        detector(images)
    # Two operations are one multiply-add.
    counts = {where: {_op_name(op): n // 2 for op, n in ops.items()} for where, ops in mode.get_flop_counts().items()}
    kinds: Counter[str] = Counter()
    for op, number in counts.get("Global", {}).items():
        kinds[_kind(op)] += number
    return MultiplyAdds(_by_part(detector, counts, kinds.total()), dict(kinds))


def _summed(named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, one in named:
        found[_part(name)] += one.numel()
    return dict(found)


def _part(name: str) -> str:
    module = name.partition(".")[0]
    return PARTS.get(module, module)


def _by_part(detector: Detector, counts: Mapping[str, Mapping[str, int]], total: int) -> dict[str, int]:
    """What the modules of the first level computed; boxes that a decoder refines in its loop are the decoder's."""
    modules = {name: sum(counts.get(f"{type(detector).__name__}.{name}", {}).values()) for name in _children(detector)}
    modules["decoder"] += total - sum(modules.values())
    found: Counter[str] = Counter()
    for name, number in modules.items():
        found[_part(name)] += number
    return {part: number for part, number in found.items() if number}


def _children(detector: Detector) -> list[str]:
    return [name for name, _ in detector.named_children()]


def _op_name(op: Callable[..., object]) -> str:
    return str(op).rpartition(".")[2]


def _kind(op: str) -> str:
    return "attention" if "attention" in op else KINDS.get(op, op)


@contextmanager
def _as_constants(detector: Detector) -> Iterator[None]:
    """Parameters without gradients: the counter's hooks cannot follow them where gradients are off."""
    trained = [one for one in detector.parameters() if one.requires_grad]
    for one in trained:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in trained:
            one.requires_grad_(True)
