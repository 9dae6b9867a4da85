"""What a detector does with one image: its predictions layer by layer, and what its attentions look at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from detfamily.attention import (
    AxialAttention,
    MapAttention,
    MSDeformAttention,
    NeighborhoodAttention,
    OwnLevelDeformAttention,
    RescaledSine,
    WindowAttention,
)
from detfamily.attention.deformable import FewKeysAttention
from detfamily.attention.dense import MultiHead
from detfamily.attention.ms_deform import Sampling
from detfamily.blocks.encoder import Encoder
from detfamily.detector import Detector
from detfamily.errors import NonFiniteError
from detfamily.structures import Images, Predictions, Size, Tokens

BACKBONE, ENCODER, SELF, CROSS = "backbone", "encoder_attention", "self_attention", "cross_attention"
_WEIGHING = (MultiHead, RescaledSine)
_SAMPLING = (MSDeformAttention, OwnLevelDeformAttention)
_ON_MAPS = (WindowAttention, NeighborhoodAttention, AxialAttention)


@dataclass(frozen=True)
class Call:
    """What an attention was called with."""

    query: Tokens
    source: Tokens
    attention_mask: Tensor | None


@dataclass(frozen=True)
class MapCall:
    """What an attention was given of one map."""

    x: Tensor
    pos: Tensor | None
    padding_mask: Tensor | None


@dataclass(frozen=True)
class Heat:
    """The weights of the cells of one map.

    Attributes:
        weights: (M, h, w) for each head.
        level: of the map.
    """

    weights: Tensor
    level: int


@dataclass(frozen=True)
class Keys:
    """The few keys of a map, and what one token makes of them.

    Attributes:
        start: (Nk, 2) x, y in (0, 1): the grid that they start from.
        places: (G, Nk, 2) where they are, for each group of heads.
        weights: (M, Nk) for each head.
    """

    start: Tensor
    places: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Layer:
    """One attention of a detector, and what it was given for the image.

    Attributes:
        attention: the module.
        calls: one; of an attention on maps, one for each level.
    """

    attention: nn.Module
    calls: Sequence[Call | MapCall]

    @property
    def shapes(self) -> tuple[Size, ...]:
        """(h, w) of the maps that are read from; none where object queries read from each other."""
        first = self.calls[0]
        if isinstance(first, Call):
            return () if first.source.grid is None else first.source.grid.shapes
        return tuple(cast("Size", tuple(call.x.shape[1:3])) for call in self.calls if isinstance(call, MapCall))

    @property
    def reference_points(self) -> Tensor | None:
        """(N, R) where the queries look from, in (0, 1)."""
        first = self.calls[0]
        if not isinstance(first, Call) or first.query.reference_points is None:
            return None
        return first.query.reference_points[0]

    def token(self, x: float, y: float, level: int) -> tuple[int, Size]:
        """The token of a level at a place in (0, 1): its number, and its row and column."""
        h, w = self.shapes[level]
        row, column = (min(max(int(place * n), 0), n - 1) for place, n in ((y, h), (x, w)))
        return sum(math.prod(shape) for shape in self.shapes[:level]) + row * w + column, (row, column)

    def center(self, index: int) -> tuple[float, float]:
        """x, y in (0, 1) of the token of this number."""
        for h, w in self.shapes:
            if index < h * w:
                return (index % w + 0.5) / w, (index // w + 0.5) / h
            index -= h * w
        raise IndexError(index)

    def sampling(self, index: int) -> Sampling | None:
        """Where the token or query of this number samples; None if the attention does not sample."""
        call = self.calls[0]
        if not isinstance(call, Call) or not isinstance(self.attention, _SAMPLING):
            return None
        with torch.no_grad():
            return self.attention.sampling(call.query, call.source, index)

    def weights(self, index: int) -> Tensor:
        """(M, S): the weight of each token or query that is read from."""
        call = self.calls[0]
        assert isinstance(call, Call) and isinstance(self.attention, _WEIGHING)
        return self.attention.weights(call.query, call.source, index, call.attention_mask)[0]

    def heat(self, index: int) -> list[Heat]:
        """The weights of the cells of the maps that the token or query of this number reads from."""
        if isinstance(self.calls[0], Call):
            parts = self.weights(index).split([h * w for h, w in self.shapes], dim=-1)
            maps = [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]
            return [Heat(weights, level) for level, weights in enumerate(maps)]
        call, level, place = self._on_map(index)
        assert isinstance(self.attention, _ON_MAPS)
        return [Heat(self.attention.weights_on_map(call.x, place, call.pos, call.padding_mask)[0], level)]

    def keys(self, index: int) -> Keys | None:
        """The keys that the token of this number looks at; None if the attention has no few keys."""
        if not isinstance(self.attention, FewKeysAttention):
            return None
        call, _, place = self._on_map(index)
        start, places = self.attention.key_places(call.x, call.pos, call.padding_mask)
        weights = self.attention.key_weights(call.x, place, call.pos, call.padding_mask)
        return Keys(start, places[0], weights[0])

    def _on_map(self, index: int) -> tuple[MapCall, int, Size]:
        """The map that a token lies on, with its level, and the token's row and column."""
        for level, (call, (h, w)) in enumerate(zip(self.calls, self.shapes, strict=True)):
            if index < h * w:
                assert isinstance(call, MapCall)
                return call, level, divmod(index, w)
            index -= h * w
        raise IndexError(index)


@dataclass(frozen=True)
class Look:
    """What a detector did with one image.

    Attributes:
        predictions: of all decoder layers, (D, 1, N, ...).
        references: (N, R) that the boxes of each decoder layer are relative to, or None.
        layers: the attentions that can be looked at, by place: backbone, encoder_attention, ...; none is empty.
    """

    predictions: Predictions
    references: list[Tensor | None]
    layers: dict[str, list[Layer]]


def look_at(detector: Detector, images: Images) -> Look:
    """Let a detector look at one image, which is not padded.

    The detector stays as it is, and no random numbers are drawn.

    Args:
        detector: on the device of the image; compiled or not.
        images: one.

    Raises:
        NonFiniteError: it gives NaN or infinity.
    """
    places = attentions_of(detector)
    modules = [module for found in places.values() for module in found]
    said: list[tuple[list[Tensor], list[Tensor | None]]] = []
    handle = detector.decoder.register_forward_hook(lambda module, inputs, output: said.append(output))
    modes = {module: module.training for module in detector.modules()}
    try:
        detector.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), recorded(modules) as calls:
            predictions = detector(images)["match"]
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not (predictions.boxes.isfinite().all() and predictions.logits.isfinite().all()):
        raise NonFiniteError("the detector gives NaN or infinity: its weights are spoilt")
    layers = {place: [Layer(module, calls[module]) for module in found] for place, found in places.items()}
    references = [None if one is None else one[0] for one in said[0][1]]
    return Look(predictions, references, layers)


def attentions_of(detector: Detector) -> dict[str, list[nn.Module]]:
    """The attentions that can be looked at, by place, in the order of their layers; no place is empty."""
    encoder, decoder = cast("Encoder", detector.encoder), detector.decoder
    found = {
        BACKBONE: list(_outermost(detector.backbone)),
        ENCODER: [layer.get_submodule("attention") for layer in encoder.layers],
        SELF: [layer.get_submodule("self_attention") for layer in decoder.layers],
        CROSS: [layer.get_submodule("cross_attention") for layer in decoder.layers],
    }
    kept = {place: [module for module in modules if _speaks(module)] for place, modules in found.items()}
    return {place: modules for place, modules in kept.items() if modules}


@contextmanager
def recorded(attentions: Sequence[nn.Module]) -> Iterator[Mapping[nn.Module, list[Call | MapCall]]]:
    """Note what attentions are given, as long as this lasts."""
    calls: dict[nn.Module, list[Call | MapCall]] = {module: [] for module in attentions}
    handles = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        query, source, *rest = inputs
        calls[module].append(Call(query, source, rest[0] if rest else None))

    try:
        for module in calls:
            if isinstance(module, MapAttention):  # backbones call its on_map
                _note_maps(module, calls[module])
            else:
                handles.append(module.register_forward_pre_hook(note))
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module in calls:
            module.__dict__.pop("on_map", None)


def _note_maps(attention: MapAttention, calls: list[Call | MapCall]) -> None:
    on_map = attention.on_map

    def noting(x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        calls.append(MapCall(x, pos, padding_mask))
        return on_map(x, pos, padding_mask)

    attention.__dict__["on_map"] = noting


def _speaks(module: nn.Module) -> bool:
    return isinstance(module, (*_WEIGHING, *_SAMPLING, *_ON_MAPS, FewKeysAttention))


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _speaks(child):
            yield child
        else:
            yield from _outermost(child)
