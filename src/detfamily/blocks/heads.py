"""Class and box heads on the decoder's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from detfamily.blocks.boxes import apply_delta
from detfamily.blocks.layers import MLP
from detfamily.structures import Predictions


def full_precision(x: Tensor) -> Tensor:
    """Leave 16-bit autocast: boxes and losses need at least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class SoftmaxClassHead(nn.Linear):
    """Logits of the classes and, in the last column, of "no object" (DETR, section 3)."""

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__(embed_dim, num_classes + 1)


class SigmoidClassHead(nn.Linear):
    """Logits of the classes, each on its own, which start out improbable (RetinaNet, arXiv 1708.02002, 3.3 and 4.1).

    Args:
        embed_dim: the width C.
        num_classes: columns.
        prior: the probability that every class starts with.
    """

    def __init__(self, embed_dim: int, num_classes: int, prior: float = 0.01) -> None:
        super().__init__(embed_dim, num_classes)
        nn.init.constant_(self.bias, -math.log((1 - prior) / prior))


class BoxHead(MLP):
    """A 3-layer perceptron that says a box, relative to the reference where there is one (DETR, section 3.2).

    Args:
        embed_dim: the width C.
        zero_init: start by saying the reference itself.
        size_logit: added at the start to the logits of width and height, when zero_init: smaller boxes.
    """

    def __init__(self, embed_dim: int, zero_init: bool, size_logit: float = 0.0) -> None:
        super().__init__(embed_dim, embed_dim, 4, num_layers=3)
        if zero_init:
            last = self.layers[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            nn.init.constant_(last.bias[2:], size_logit)


class Heads(nn.Module):
    """A class head and a box head per decoder layer, or one of each for all layers.

    Args:
        class_head: factory of a class head, (..., C) -> (..., K).
        box_head: factory of a box head, (..., C) -> (..., 4).
        num_layers: decoder layers D.
        shared: one pair for all layers.
        shared_boxes: whether the box head is; None as ``shared`` says.
        size_logit: start of the first (or only) box head's width and height, as a logit; the other heads refine what
            came before, and start at 0.
        eps: of the inverse sigmoid of reference points.
    """

    def __init__(
        self,
        class_head: Callable[[], nn.Module],
        box_head: Callable[..., nn.Module],
        num_layers: int,
        shared: bool,
        size_logit: float = 0.0,
        eps: float = 1e-5,
        shared_boxes: bool | None = None,
    ) -> None:
        super().__init__()
        self.shared = shared
        self.shared_boxes = shared if shared_boxes is None else shared_boxes
        classes, boxes = (1 if one else num_layers for one in (self.shared, self.shared_boxes))
        self.class_heads = nn.ModuleList(class_head() for _ in range(classes))
        self.box_heads = nn.ModuleList(box_head(size_logit=size_logit if i == 0 else 0.0) for i in range(boxes))
        self.eps = eps

    def forward(self, hidden: Sequence[Tensor], references: Sequence[Tensor | None]) -> Predictions:
        """Logits and boxes of all layers from [(B, N, C)] and the references that boxes are relative to."""
        stacked = torch.stack(list(hidden))
        logits = _of_layers(self.class_heads, stacked)
        deltas = full_precision(_of_layers(self.box_heads, stacked))
        boxes = [apply_delta(delta, ref, self.eps) for delta, ref in zip(deltas, references, strict=True)]
        return Predictions(full_precision(logits), torch.stack(boxes))

    @property
    def shared_class_head(self) -> nn.Module:
        """The class head of all layers."""
        assert self.shared
        return self.class_heads[0]

    @property
    def shared_box_head(self) -> nn.Module:
        """The box head of all layers."""
        assert self.shared_boxes
        return self.box_heads[0]

    def refine(self, index: int, content: Tensor, reference_points: Tensor | None) -> Tensor:
        """(B, N, 4), the boxes that a layer's content says."""
        head = self.box_heads[0 if self.shared_boxes else index]
        return apply_delta(full_precision(head(content)), reference_points, self.eps)


def _of_layers(heads: nn.ModuleList, hidden: Tensor) -> Tensor:
    """(D, B, N, C) through the one head of all layers, or through each layer's own."""
    if len(heads) == 1:
        shared: Tensor = heads[0](hidden)
        return shared
    return torch.stack([head(x) for head, x in zip(heads, hidden, strict=True)])
