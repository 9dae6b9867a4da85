"""Denoising: in training, noised copies of the objects are queries, too, which are to find what they came from.

DN-DETR (arXiv 2203.01305). The copies stand before the other queries, group by group; each group has one copy of every
object, in slots for as many objects as the fullest image of the batch has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from detfamily.blocks.boxes import inverse_sigmoid
from detfamily.blocks.layers import MLP
from detfamily.blocks.query_position import anchor_code
from detfamily.structures import Given, Queries, Targets


class Draws:
    """Where the random numbers of noise come from; put another object into ``Denoising.draws`` to choose them.

    Args:
        generator: None takes the default one of the device, whose state checkpoints keep.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def uniform(self, wanted: Tensor, *more: int) -> Tensor:
        """Numbers in [0, 1), (*wanted.shape, *more); they matter where ``wanted`` is True."""
        return torch.rand(*wanted.shape, *more, generator=self.generator, device=wanted.device)

    def integers(self, wanted: Tensor, end: int) -> Tensor:
        """Numbers in 0 .. end - 1, of the shape of ``wanted``; they matter where it is True."""
        return torch.randint(end, wanted.shape, generator=self.generator, device=wanted.device)


@dataclass(frozen=True)
class NoisedCopies:
    """Objects of a batch, copied and noised; G groups of T slots.

    Attributes:
        labels: (B, G * T) int64.
        boxes: (B, G * T, 4) cx, cy, w, h in [0, 1].
        valid: (B, G * T) bool, False in the slots that an image has no object for.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor


class Denoising(nn.Module):
    """Adds a group "denoise" of noised copies to the queries, in training.

    A copy's content is its label's embedding, and 1 in the last channel, which learned queries keep at 0; its reference
    is its box, of which it keeps as many numbers as the other references have; where the other queries bring positions
    of their own, a perceptron makes one from the code of its box. Everything happens on the device of the targets,
    without a loop over images.

    Args:
        num_classes: columns of the class head.
        embed_dim: the width C.
        num_groups: copies of each object ("scalar" in the official code).
        label_noise: the probability that a copy gets a label drawn at random, which may be its own.
        center_noise: a centre moves by at most this share of half the width and height ("lambda 1").
        size_noise: width and height change by at most this share of themselves ("lambda 2").
        eps: of the inverse sigmoid that the boxes pass through.
        attention_mask: hide the copies from the other queries, and groups from one another; without, answers leak.
        embed_labels: tell a copy its label; without, it is only to find its box, from the embedding of "unknown".
        max_queries: copies in an image, at most: with many objects there are fewer groups, and at last fewer objects,
            chosen at random.
        fills_content: queries of the other groups bring no content and get the embedding of "unknown", the last one.
        needs_pos: queries bring positions, so copies need some.
        reference_dim: numbers of the other queries' references; None where they have none.

    Raises:
        ValueError: a number is out of its range; queries have neither positions nor references.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        num_groups: int,
        label_noise: float,
        center_noise: float,
        size_noise: float,
        eps: float,
        attention_mask: bool = True,
        embed_labels: bool = True,
        max_queries: int = 1000,
        *,
        fills_content: bool,
        needs_pos: bool,
        reference_dim: int | None,
    ) -> None:
        super().__init__()
        _check(num_groups, label_noise, center_noise, size_noise, max_queries)
        if not needs_pos and reference_dim is None:
            raise ValueError(
                "denoising tells a copy its box by its position or its reference, and the queries of this query_source "
                "have neither: choose another, or denoising=none"
            )
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.num_groups = num_groups
        self.label_noise = label_noise
        self.center_noise = center_noise
        self.size_noise = size_noise
        self.eps = eps
        self.attention_mask = attention_mask
        self.embed_labels = embed_labels
        self.max_queries = max_queries
        self.fills_content = fills_content
        self.reference_dim = reference_dim
        self.label_embed = nn.Embedding(num_classes + 1, embed_dim - 1)
        self.pos_head = MLP(2 * embed_dim, embed_dim, embed_dim, num_layers=2, xavier=True) if needs_pos else None
        self.draws = Draws()

    def forward(self, queries: Queries, targets: Targets | None) -> tuple[Queries, Given | None]:
        """Fill the queries' content where they have none, and put noised copies before them.

        Args:
            queries: of the other groups.
            targets: the objects of the batch; None where there is nothing to denoise, as in evaluation.

        Returns:
            The queries, and what the copies are to answer.
        """
        if self.fills_content:
            unknown = torch.cat([self.label_embed.weight[-1], self.label_embed.weight.new_zeros(1)])
            queries = replace(queries, content=queries.content + unknown)
        if targets is None:
            return queries, None
        targets = self._bounded(targets)
        groups = self._groups(targets.labels.shape[1])
        copies = self.noise(targets, groups)
        given = Given(
            targets=Targets(
                labels=targets.labels.repeat(1, groups),
                boxes=targets.boxes.repeat(1, groups, 1),
                counts=tuple(count * groups for count in targets.counts),
                image_ids=targets.image_ids,
            ),
            matched=copies.valid,
            counted=copies.valid,
            copies=groups,
            limit=self.max_queries,
        )
        return self._put_before(queries, copies, groups), given

    def noise(self, targets: Targets, groups: int) -> NoisedCopies:
        """Noised copies of all objects (DN-DETR, section 4.3)."""
        valid = targets.valid.expand(groups, -1, -1)
        labels = targets.labels.expand(groups, -1, -1)
        boxes = targets.boxes.expand(groups, -1, -1, -1)
        if self.label_noise > 0:
            flipped = valid & (self.draws.uniform(valid) < self.label_noise)
            labels = torch.where(flipped, self.draws.integers(flipped, self.num_classes), labels)
        if self.center_noise > 0 or self.size_noise > 0:
            reach = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], -1)
            step = (self.draws.uniform(valid, 4).to(boxes.dtype) * 2 - 1) * reach
            boxes = boxes + torch.cat([step[..., :2] * self.center_noise, step[..., 2:] * self.size_noise], -1)
            boxes = boxes.clamp(0, 1)
        return NoisedCopies(*(x.transpose(0, 1).flatten(1, 2) for x in (labels, boxes, valid)))

    def _groups(self, slots: int) -> int:
        return max(1, min(self.num_groups, self.max_queries // max(1, slots)))

    def _bounded(self, targets: Targets) -> Targets:
        """At most ``max_queries`` objects of each image, chosen at random."""
        if targets.labels.shape[1] <= self.max_queries:
            return targets
        valid = targets.valid
        order = self.draws.uniform(valid).masked_fill(~valid, 2.0).argsort(1)[:, : self.max_queries]
        return Targets(
            labels=targets.labels.gather(1, order),
            boxes=targets.boxes.gather(1, order[..., None].expand(-1, -1, 4)),
            counts=tuple(min(count, self.max_queries) for count in targets.counts),
            image_ids=targets.image_ids,
        )

    def content_of(self, copies: NoisedCopies) -> Tensor:
        """(B, G * T, C), zero in unused slots."""
        labels = copies.labels if self.embed_labels else torch.full_like(copies.labels, self.num_classes)
        embedded = self.label_embed(labels)
        content = torch.cat([embedded, torch.ones_like(embedded[..., :1])], -1)
        return content.masked_fill(~copies.valid[..., None], 0.0)

    def box_logits_of(self, copies: NoisedCopies) -> Tensor:
        """(B, G * T, 4), zero in unused slots."""
        return inverse_sigmoid(copies.boxes, self.eps).masked_fill(~copies.valid[..., None], 0.0)

    def _put_before(self, queries: Queries, copies: NoisedCopies, groups: int) -> Queries:
        count, others = copies.labels.shape[1], queries.content.shape[1]
        content, boxes = self.content_of(copies), self.box_logits_of(copies).sigmoid()
        pos, references = queries.pos, queries.reference_points
        if self.pos_head is not None:
            assert pos is not None
            made = self.pos_head(anchor_code(boxes, self.embed_dim).to(content.dtype))
            pos = torch.cat([made.to(pos.dtype), pos], 1)
        if references is not None:
            references = torch.cat([boxes[..., : self.reference_dim].to(references.dtype), references], 1)
        return replace(
            queries,
            content=torch.cat([content.to(queries.content.dtype), queries.content], 1),
            pos=pos,
            reference_points=references,
            attention_mask=self._mask(queries.attention_mask, count, others, groups, content.device),
            groups={
                "denoise": slice(0, count),
                **{name: slice(one.start + count, one.stop + count) for name, one in queries.groups.items()},
            },
        )

    def _mask(
        self, others_mask: Tensor | None, count: int, others: int, groups: int, device: torch.device
    ) -> Tensor | None:
        """(G * T + N, G * T + N), True where a query may not look: copies see the others, but not vice versa."""
        if not self.attention_mask and others_mask is None:
            return None
        mask = torch.zeros(count + others, count + others, dtype=torch.bool, device=device)
        if self.attention_mask:
            group = torch.arange(groups, device=device).repeat_interleave(count // groups)
            mask[:count, :count] = group[:, None] != group
            mask[count:, :count] = True
        if others_mask is not None:
            mask[count:, count:] = others_mask
        return mask


def _check(num_groups: int, label_noise: float, center_noise: float, size_noise: float, max_queries: int) -> None:
    for name, value in (("num_groups", num_groups), ("max_queries", max_queries)):
        if value < 1:
            raise ValueError(f"denoising.{name}={value}: expected 1 or more; denoising=none turns it off")
    if not 0 <= label_noise <= 1:
        raise ValueError(f"denoising.label_noise={label_noise}: expected a probability, from 0 to 1")
    for name, noise in (("center_noise", center_noise), ("size_noise", size_noise)):
        if not 0 <= noise < math.inf:
            raise ValueError(f"denoising.{name}={noise}: expected 0 or more")
