"""A trained detector without what only training needs."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from detfamily.blocks.heads import Heads
from detfamily.detector import Detector
from detfamily.predict.fold import count_batch_norms, fold_batch_norms
from detfamily.structures import Predictions


@dataclass(frozen=True)
class Preparation:
    """What was done to a detector for inference.

    Attributes:
        folded: batch norms folded into convolutions.
        unfolded: batch norms that are still there.
        decoder_layers: layers dropped because a layer before them answers.
        class_heads: heads of other layers than the one that answers, dropped.
        box_heads: the same; heads that refine the references of the layers stay.
    """

    folded: int
    unfolded: int
    decoder_layers: int
    class_heads: int
    box_heads: int

    def describe(self) -> str:
        """A few words, such as "53 batch norms folded; dropped: 5 class heads, 5 box heads"."""
        words = [f"{self.folded} batch norms folded"] if self.folded else []
        words += [f"{self.unfolded} batch norms left as they are"] if self.unfolded else []
        kinds = {
            "decoder layers": self.decoder_layers,
            "class heads": self.class_heads,
            "box heads": self.box_heads,
        }
        dropped = [f"{count} {kind if count > 1 else kind[:-1]}" for kind, count in kinds.items() if count]
        words += [f"dropped: {', '.join(dropped)}"] if dropped else []
        return "; ".join(words) or "nothing to fold or to drop"


class AnswerHeads(nn.Module):
    """The heads of the last decoder layer alone, and what refines references on the way there.

    Args:
        heads: those of all layers.
        depth: decoder layers that are left; the last of them answers.
        refine: whether boxes of a layer are the references of the next.
    """

    def __init__(self, heads: Heads, depth: int, refine: bool) -> None:
        super().__init__()
        self.answer = heads if heads.shared else _part(heads, slice(depth - 1, depth), slice(depth - 1, depth))
        steps = depth - 1 if refine and not heads.shared else 0
        self.refinement = _part(heads, slice(0), slice(steps)) if steps else None

    def forward(self, hidden: Sequence[Tensor], references: Sequence[Tensor | None]) -> Predictions:
        """Logits and boxes (1, B, N, ...) of the last layer."""
        predictions: Predictions = self.answer(hidden[-1:], references[-1:])
        return predictions

    def refine(self, index: int, content: Tensor, reference_points: Tensor | None) -> Tensor:
        """As ``Heads.refine``."""
        heads = self.answer if self.refinement is None else self.refinement
        return heads.refine(index, content, reference_points)


def prepare(detector: Detector, layer: int) -> Preparation:
    """Take from a detector, in place, what only training needs, and fold its batch norms.

    It answers as before, to rounding, but only for one decoder layer: its predictions have D = 1.

    Args:
        detector: with its trained weights.
        layer: the decoder layer that answers, as ``postprocess.layer``; it becomes the last one.
    """
    detector.eval().requires_grad_(False)
    detector.backbone, folded = fold_batch_norms(detector.backbone)
    decoder, heads = detector.decoder, detector.heads
    depth = range(len(decoder.layers))[layer] + 1
    before = len(decoder.layers), len(heads.class_heads), len(heads.box_heads)
    decoder.layers = decoder.layers[:depth]
    answering = AnswerHeads(heads, depth, decoder.refine)
    detector.heads = cast("Heads", answering)
    boxes = len(answering.answer.box_heads) + (len(answering.refinement.box_heads) if answering.refinement else 0)
    return Preparation(
        folded=folded,
        unfolded=count_batch_norms(detector),
        decoder_layers=before[0] - depth,
        class_heads=before[1] - len(answering.answer.class_heads),
        box_heads=before[2] - boxes,
    )


def _part(heads: Heads, class_heads: slice, box_heads: slice) -> Heads:
    part = deepcopy(heads)
    part.class_heads, part.box_heads = part.class_heads[class_heads], part.box_heads[box_heads]
    return part
