"""The pictures of what a detector looks at: which there are, and which were asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms

from detfamily.blocks.boxes import to_xyxy
from detfamily.errors import ConfigError, nearest
from detfamily.structures import Predictions
from detfamily.visualize.canvas import Subject
from detfamily.visualize.heat import Weighed, draw_heat
from detfamily.visualize.keys import Moved, draw_keys
from detfamily.visualize.look import BACKBONE, CROSS, ENCODER, SELF, Layer, Look
from detfamily.visualize.refinement import Steps, draw_refinement
from detfamily.visualize.relations import Related, draw_relations
from detfamily.visualize.sampling import Sampled, draw_sampling

BOXES = "boxes"
KINDS = (BOXES, CROSS, SELF, ENCODER, BACKBONE)
"""What can be drawn: the boxes layer by layer, and the attentions of each place."""

_SAME = 0.7
"""IoU above which two queries of one class answer for the same object."""


@dataclass(frozen=True)
class Request:
    """What is to be drawn.

    Attributes:
        what: some of ``KINDS``; None for all that there are.
        layer: numbers, from 0 or from the end; "ends" for the first and the last, "all" for all.
        query: numbers of object queries; None for the best ones.
        count: how many of the best, each for another object.
        place: x, y in (0, 1) whose tokens are asked in encoder and backbone; None for the centres of the queries'
            boxes.
        level: whose token is asked in an encoder with several levels, 0 for the finest.
    """

    what: Sequence[str] | None = None
    layer: Sequence[int] | Literal["ends", "all"] = "ends"
    query: Sequence[int] | None = None
    count: int = 2
    place: tuple[float, float] | None = None
    level: int = 0

    def kinds(self, places: Collection[str]) -> list[str]:
        """What is drawn of a detector with attentions in these places.

        Raises:
            ConfigError: something is not known, or this detector does not have it.
        """
        there = [kind for kind in KINDS if kind == BOXES or kind in places]
        if self.what is None:
            return there
        for kind in self.what:
            if kind not in KINDS:
                raise ConfigError(f"what={kind!r}: {nearest(str(kind), KINDS)}")
            if kind not in there:
                raise ConfigError(
                    f"what={kind}: this detector has no attention there that could be drawn; there is "
                    + ", ".join(there)
                )
        return list(self.what)

    def layers(self, kind: str, look: Look) -> list[int]:
        """The layers of an attention that are drawn.

        Raises:
            ConfigError: there is no such layer.
        """
        depth = len(look.layers[kind])
        if self.layer == "all":
            return list(range(depth))
        if self.layer == "ends":
            return sorted({0, depth - 1})
        assert not isinstance(self.layer, str)
        for number in self.layer:
            if not -depth <= number < depth:
                raise ConfigError(f"layer={number}: {kind} has layers 0 to {depth - 1}, or -{depth} to -1")
        return sorted({number % depth for number in self.layer})

    def token_level(self, kind: str, layer: Layer) -> int:
        """The level of the tokens that are asked; a backbone's attention has one.

        Raises:
            ConfigError: there is no such level.
        """
        if kind != ENCODER:
            return 0
        if not 0 <= self.level < len(layer.shapes):
            raise ConfigError(
                f"level={self.level}: the encoder has levels 0 to {len(layer.shapes) - 1}, of "
                + ", ".join(f"{h}x{w}" for h, w in layer.shapes)
                + " cells (height x width)"
            )
        return self.level


def best_queries(predictions: Predictions, scores: torch.nn.Module, named: Sequence[int], count: int) -> list[int]:
    """The queries with the highest scores in the last layer, each for another object.

    Args:
        predictions: of one image.
        scores: logits -> probabilities.
        named: columns that stand for a class.
        count: the most.
    """
    found, labels = scores(predictions.logits[-1, 0])[:, list(named)].max(-1)
    kept = batched_nms(to_xyxy(predictions.boxes[-1, 0]), found, labels, _SAME)
    return [int(one) for one in kept[:count]]


def subjects_of(
    request: Request, look: Look, scores: torch.nn.Module, names: Mapping[int, str]
) -> tuple[list[Subject], list[Subject]]:
    """The queries and the places that pictures are about.

    Raises:
        ConfigError: there is no such query.
    """
    total = look.predictions.boxes.shape[2]
    chosen = best_queries(look.predictions, scores, list(names), request.count)
    if request.query is not None:
        chosen = list(request.query)
        for number in chosen:
            if not 0 <= number < total:
                raise ConfigError(f"query={number}: this detector has queries 0 to {total - 1}")
    queries = []
    for number in chosen:
        answers = scores(look.predictions.logits[-1, 0, number])
        label = max(names, key=lambda one: float(answers[one]))
        box = look.predictions.boxes[-1, 0, number].tolist()
        words = f"query {number} ({names[label]} {float(answers[label]):.2f})"
        queries.append(Subject(words, f"query{number}", (box[0], box[1]), box, number, label))
    if request.place is None:
        return queries, queries
    x, y = request.place
    return queries, [Subject(f"x = {x:.2f}, y = {y:.2f}", f"at-{100 * x:.0f}-{100 * y:.0f}", (x, y))]


def explain(
    pixels: Tensor,
    looks: Mapping[str, Look],
    request: Request,
    scores: torch.nn.Module,
    names: Mapping[int, str],
) -> Iterator[tuple[str, Image.Image]]:
    """Draw what was asked for, for one image.

    Args:
        pixels: (3, H, W) uint8, the image as people see it.
        looks: name of the state -> what the detector did; the first is the one that is asked about, the others stand
            below it.
        request: what to draw.
        scores: logits -> probabilities.
        names: label -> class name.

    Yields:
        Names of files, without a suffix, and pictures.

    Raises:
        ConfigError: the detector does not have what was asked for; before the first picture.
    """
    first = next(iter(looks.values()))
    queries, places = subjects_of(request, first, scores, names)
    kinds = request.kinds(first.layers)
    plan = [(kind, number) for kind in kinds if kind != BOXES for number in request.layers(kind, first)]
    for kind, number in plan:
        request.token_level(kind, first.layers[kind][number])
    if BOXES in kinds and queries:
        yield BOXES, draw_refinement(pixels, [_steps(first, one, scores) for one in queries], _TITLES[BOXES])
    for kind, number in plan:
        for subject in queries if kind in (SELF, CROSS) else places:
            yield f"{kind}-layer{number}-{subject.file}", _draw(pixels, looks, request, kind, number, subject)


_TITLES = {
    BOXES: "the decoder's boxes, layer by layer",
    CROSS: "cross-attention of decoder layer {}",
    SELF: "self-attention of decoder layer {}",
    ENCODER: "attention of encoder layer {}",
    BACKBONE: "attention {} of the backbone",
}


def _steps(look: Look, subject: Subject, scores: torch.nn.Module) -> Steps:
    assert subject.query is not None
    boxes, reference = look.predictions.boxes[:, 0, subject.query].cpu(), look.references[0]
    found = scores(look.predictions.logits[:, 0, subject.query])[:, subject.label]
    return Steps(subject.words, boxes, found.cpu(), None if reference is None else reference[subject.query].tolist())


def _draw(
    pixels: Tensor, looks: Mapping[str, Look], request: Request, kind: str, number: int, subject: Subject
) -> Image.Image:
    states = {name: look.layers[kind][number] for name, look in looks.items()}
    first = next(iter(states.values()))
    title = _TITLES[kind].format(number)
    if kind == SELF:
        assert subject.query is not None
        related = {
            name: Related(subject.query, layer.weights(subject.query), looks[name].predictions.boxes[number, 0])
            for name, layer in states.items()
        }
        return draw_relations(pixels, related, f"{title}: {subject.words}")
    if kind == CROSS:
        assert subject.query is not None
        index, from_words = subject.query, subject.words
    else:
        level = request.token_level(kind, first)
        index, place = first.token(*subject.place, level)
        on_level = f" of level {level}" * (len(first.shapes) > 1)
        from_words = f"token at row {place[0]}, column {place[1]}{on_level}, at {subject.words}"
    return _draw_reading(pixels, states, index, subject, kind, f"{title}: {from_words}")


def _draw_reading(
    pixels: Tensor, states: Mapping[str, Layer], index: int, subject: Subject, kind: str, title: str
) -> Image.Image:
    first = next(iter(states))
    sampled, moved, weighed = {}, {}, {}
    for name, layer in states.items():
        reference = layer.center(index) if kind != CROSS else _reference(layer, index)
        box = subject.box if kind != CROSS or name == first else None
        if sampling := layer.sampling(index):
            assert reference is not None
            sampled[name] = Sampled(sampling, reference, box)
        elif keys := layer.keys(index):
            moved[name] = Moved(keys, layer.center(index), box)
        else:
            weighed[name] = Weighed(layer.heat(index), reference, box)
    if sampled:
        return draw_sampling(pixels, sampled, title)
    return draw_keys(pixels, moved, title) if moved else draw_heat(pixels, weighed, title)


def _reference(layer: Layer, index: int) -> Any:
    points = layer.reference_points
    return None if points is None else points[index].tolist()
