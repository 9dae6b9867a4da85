"""Auxiliary heads beside the decoder: their losses, and their positives as its queries (Co-DETR, arXiv 2211.12860)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from detfamily.auxiliary.divisors import mean_over_processes
from detfamily.auxiliary.head import AuxiliaryHead
from detfamily.auxiliary.positives import PositiveQueries
from detfamily.auxiliary.structures import Auxiliary, Objects, Positives
from detfamily.blocks.boxes import inverse_sigmoid
from detfamily.blocks.decoder import Decoder
from detfamily.blocks.denoising import Draws
from detfamily.blocks.heads import Heads
from detfamily.blocks.position import sine_code
from detfamily.structures import Given, Images, OwnLoss, Predictions, Queries, Targets, Tokens

_EPS = 1e-5
"""Of the inverse sigmoid that the boxes of positives pass through on their way to a code, in every official variant."""

HeadCode = Literal["vector", "scalar"]


class Collaboration(nn.Module):
    """Heads of other detectors on the encoder's output, in training (Co-DETR, sections 3.2 and 3.3).

    The memory becomes maps again, with a further, coarser level. Every head gives its losses and its positives; the
    positives of each head go through the decoder on their own, and answer for the objects that the head gave them.

    Args:
        heads: factories of heads, called with ``strides``; or one of them.
        embed_dim: the width C.
        num_levels: of the memory.
        num_groups: groups of the norm of the further level.
        positive_queries: have queries from positives; without, only the heads' own losses.
        most: queries of a head in an image, at most.
        least: the same at least, filled up with negatives.
        features: what the head read at a positive is part of its query.
        head_code: with features and positions, what the heads' positions differ by: a learned vector each; or, as in
            the official weights of Co-Deformable-DETR, a learned number each, added to all channels.
        strides: pixels between cells of the backbone's maps, finest first; each further level has twice the last.
        needs_pos: the decoder's queries have positions.
        reference_dim: numbers of their references; None where they have none.

    Raises:
        ValueError: no heads; num_groups does not divide embed_dim; a bound of the queries is out of range.
    """

    def __init__(
        self,
        heads: Callable[..., AuxiliaryHead] | Sequence[Callable[..., AuxiliaryHead]],
        embed_dim: int,
        num_levels: int,
        num_groups: int,
        positive_queries: bool,
        most: int,
        least: int,
        features: bool,
        head_code: HeadCode,
        strides: Sequence[int],
        needs_pos: bool,
        reference_dim: int | None,
    ) -> None:
        super().__init__()
        if embed_dim % num_groups:
            raise ValueError(f"collaboration.num_groups={num_groups} does not divide embed_dim={embed_dim}")
        factories = [heads] if callable(heads) else list(heads)
        if not factories:
            raise ValueError("auxiliary=[] names no head; auxiliary=none has none")
        levels = [*strides]
        levels += [levels[-1] * 2**step for step in range(1, num_levels - len(levels) + 2)]
        self.downsample = nn.Sequential(
            nn.Conv2d(embed_dim, embed_dim, 3, stride=2, padding=1), nn.GroupNorm(num_groups, embed_dim)
        )
        self.heads = nn.ModuleDict(_named([factory(strides=levels) for factory in factories]))
        self.queries: nn.ModuleDict | None = None
        if positive_queries:
            self.choose = PositiveQueries(most, least)
            self.queries = nn.ModuleDict(
                {
                    name: PositiveEmbedding(embed_dim, needs_pos, features, head_code, len(self.heads))
                    for name in self.heads
                }
            )
        self.reference_dim = reference_dim
        self.draws = Draws()

    def forward(
        self, memory: Tokens, images: Images, targets: Targets, decoder: Decoder, heads: Heads
    ) -> dict[str, Predictions]:
        """What the decoder says of every head's positives, and the heads' own losses.

        Args:
            memory: tokens of feature maps.
            images: the batch.
            targets: its objects.
            decoder: the detector's.
            heads: the decoder's class and box heads.

        Returns:
            "auxiliary.NAME" -> (D, B, M, ...), with D = 0 without queries from positives.
        """
        maps = self.maps(memory)
        objects = Objects.of(images, targets)
        # all heads sample before any positives are chosen, which is the official order of draws
        found: dict[str, Auxiliary] = {n: head(maps, images, objects, self.draws) for n, head in self.heads.items()}
        predictions = {}
        for name, one in found.items():
            logits, boxes, given = self._answer(name, one, objects, images, memory, decoder, heads)
            predictions[f"auxiliary.{name}"] = Predictions(logits, boxes, given, self._own(name, one))
        return predictions

    def maps(self, memory: Tokens) -> list[Tensor]:
        """(B, S, C) as maps (B, C, h, w) of all levels, and one level more."""
        assert memory.grid is not None
        shapes = memory.grid.shapes
        rows = memory.content.split([h * w for h, w in shapes], 1)
        maps = [one.transpose(1, 2).unflatten(2, shape) for one, shape in zip(rows, shapes, strict=True)]
        return [*maps, self.downsample(maps[-1])]

    def _own(self, name: str, found: Auxiliary) -> dict[str, OwnLoss]:
        weights = cast("AuxiliaryHead", self.heads[name]).weights
        return {
            loss if "/" in loss else f"head/{loss}": OwnLoss(value, weights[loss])
            for loss, value in found.losses.items()
        }

    def _answer(
        self,
        name: str,
        found: Auxiliary,
        objects: Objects,
        images: Images,
        memory: Tokens,
        decoder: Decoder,
        heads: Heads,
    ) -> tuple[Tensor, Tensor, Given]:
        """Logits and boxes of the queries that a head's positives make, and what they are to answer."""
        if self.queries is None:
            boxes = objects.boxes_xyxy[:, :0]
            return boxes[None, :, :, :0][:0], boxes[None][:0], _given(_no_positives(boxes), images)
        positives = self.choose(found.candidates, objects, images, self.draws)
        queries: Queries = self.queries[name](positives, self.reference_dim)
        said = heads(*decoder(queries, memory, heads))
        return said.logits, said.boxes, _given(positives, images)


class PositiveEmbedding(nn.Module):
    """From positives to queries, by the sine code of their boxes (Co-DETR, eq. 4).

    Args:
        embed_dim: the width C.
        needs_pos: make positions, too, the first half of the projected code; else all of it is content.
        features: add what the head read to the content.
        head_code: see ``Collaboration``.
        num_heads: heads that there are.
    """

    def __init__(self, embed_dim: int, needs_pos: bool, features: bool, head_code: HeadCode, num_heads: int) -> None:
        super().__init__()
        width = 2 * embed_dim if needs_pos else embed_dim
        self.embed_dim = embed_dim
        self.needs_pos = needs_pos
        self.box_proj = nn.Linear(2 * embed_dim, width)
        self.box_norm = nn.LayerNorm(width)
        self.feature_proj = nn.Linear(embed_dim, embed_dim) if features else None
        self.feature_norm = nn.LayerNorm(embed_dim) if features else None
        self.code: nn.Parameter | None = None
        if features and needs_pos:
            self.code = nn.Parameter(torch.empty(embed_dim if head_code == "vector" else 1))
            # xavier's range of the table of all heads' codes, as officially
            reach = math.sqrt(6 / (num_heads + len(self.code)))
            nn.init.uniform_(self.code, -reach, reach)
        for linear in (self.box_proj, self.feature_proj):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)

    def forward(self, positives: Positives, reference_dim: int | None) -> Queries:
        """Queries (B, M, C), whose references are the positives' boxes, or as many of their numbers as are wanted."""
        logits = inverse_sigmoid(positives.boxes, _EPS)
        code = sine_code(logits.sigmoid() * (2 * math.pi), self.embed_dim // 2, temperature=10000.0).flatten(-2)
        projected = self.box_norm(self.box_proj(code.to(self.box_proj.weight.dtype)))
        pos, content = projected.chunk(2, -1) if self.needs_pos else (None, projected)
        if self.feature_proj is not None and self.feature_norm is not None:
            content = content + self.feature_norm(self.feature_proj(positives.features.to(content.dtype)))
        if pos is not None and self.code is not None:
            pos = pos + self.code
        return Queries(
            content=content,
            pos=pos,
            reference_points=None if reference_dim is None else positives.boxes[..., :reference_dim],
        )


def _given(positives: Positives, images: Images) -> Given:
    count = positives.labels.shape[1]
    return Given(
        targets=Targets(positives.labels, positives.target_boxes, (count,) * len(images), images.image_ids),
        matched=positives.matched,
        counted=positives.counted,
        answered=mean_over_processes(positives.matched.sum().to(positives.boxes.dtype)),
    )


def _no_positives(boxes: Tensor) -> Positives:
    """(B, 0, 4) -> as many positives."""
    rows = boxes[..., 0]
    return Positives(boxes, boxes, rows.long(), boxes, rows.long(), rows.bool(), rows.bool())


def _named(heads: Sequence[AuxiliaryHead]) -> dict[str, AuxiliaryHead]:
    """Heads by their names; a second one of a kind has a number behind it."""
    seen: Counter[str] = Counter()
    named = {}
    for head in heads:
        seen[head.name] += 1
        named[head.name if seen[head.name] == 1 else f"{head.name}_{seen[head.name]}"] = head
    return named
