"""Denoising: in training, noised copies of the objects are queries, too, which are to find what they came from.

DN-DETR (arXiv 2203.01305) and DINO (arXiv 2203.03605). The copies stand before the other queries, group by group; each
group has the same number of copies of every object, in slots for as many objects as the fullest image of the batch has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from detfamily.blocks.boxes import inverse_sigmoid, to_cxcywh, to_xyxy
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

    def integers(self, wanted: Tensor, end: int, *more: int) -> Tensor:
        """Numbers in 0 .. end - 1, (*wanted.shape, *more); they matter where ``wanted`` is True."""
        return torch.randint(end, (*wanted.shape, *more), generator=self.generator, device=wanted.device)


@dataclass(frozen=True)
class NoisedCopies:
    """Objects of a batch, copied and noised; R rounds of T slots, of which a group has one or two.

    Attributes:
        labels: (B, R * T) int64.
        boxes: (B, R * T, 4) cx, cy, w, h in [0, 1].
        valid: (B, R * T) bool, False in the slots that an image has no object for.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor


class Denoising(nn.Module):
    """Adds a group "denoise" of noised copies to the queries, in training; the base of all kinds of noise.

    A copy's content is its label's embedding; its reference is its box, of which it keeps as many numbers as the other
    references have; where the other queries bring positions of their own, a perceptron makes one from the code of its
    box. Everything happens on the device of the targets, without a loop over images.

    Args:
        num_classes: columns of the class head.
        embed_dim: the width C.
        label_noise: the probability that a copy gets a label drawn at random, which may be its own.
        eps: of the inverse sigmoid that the boxes pass through.
        rounds_per_group: copies of each object in a group.
        indicator: mark copies by 1 in the content's last channel, which learned queries keep at 0.
        attention_mask: hide the copies from the other queries, and groups from one another; without, answers leak.
        embed_labels: tell a copy its label; without, it is only to find its box, from the embedding of "unknown".
        max_queries: copies in an image, at most: with many objects there are fewer groups, and at last fewer objects,
            chosen at random.
        own_group: copies answer for what they come from; without, they are matched like the other queries, answers in
            hand: what the official DINO does when it is trained with ``use_dn=False``.
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
        label_noise: float,
        eps: float,
        rounds_per_group: int,
        indicator: bool,
        attention_mask: bool,
        embed_labels: bool,
        max_queries: int,
        own_group: bool,
        fills_content: bool,
        needs_pos: bool,
        reference_dim: int | None,
    ) -> None:
        super().__init__()
        _check_least(rounds_per_group, max_queries=max_queries)
        if not 0 <= label_noise <= 1:
            raise ValueError(f"denoising.label_noise={label_noise}: expected a probability, from 0 to 1")
        if not needs_pos and reference_dim is None:
            raise ValueError(
                "denoising tells a copy its box by its position or its reference, and the queries of this query_source "
                "have neither: choose another, or denoising=none"
            )
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.label_noise = label_noise
        self.eps = eps
        self.rounds_per_group = rounds_per_group
        self.indicator = indicator
        self.attention_mask = attention_mask
        self.embed_labels = embed_labels
        self.max_queries = max_queries
        self.own_group = own_group
        self.fills_content = fills_content
        self.reference_dim = reference_dim
        self.label_embed = nn.Embedding(num_classes + 1, embed_dim - 1 if indicator else embed_dim)
        self.pos_head = MLP(2 * embed_dim, embed_dim, embed_dim, num_layers=2, xavier=True) if needs_pos else None
        self.draws = Draws()

    def wanted_groups(self, slots: int) -> int:
        """How many groups there should be, with so many slots for objects."""
        raise NotImplementedError

    def noise_boxes(self, boxes: Tensor, valid: Tensor) -> Tensor:
        """(R, B, T, 4) to the same, within the image; only the boxes of valid slots matter."""
        raise NotImplementedError

    def negative(self, groups: int) -> list[bool]:
        """Of each round, whether its copies are noised so much that they are to find nothing."""
        return [False] * (groups * self.rounds_per_group)

    def forward(self, queries: Queries, targets: Targets | None) -> tuple[Queries, Given | None]:
        """Fill the queries' content where they have none, and put noised copies before them.

        Args:
            queries: of the other groups.
            targets: the objects of the batch; None where there is nothing to denoise, as in evaluation.

        Returns:
            The queries, and what the copies are to answer.
        """
        if self.fills_content:
            queries = replace(queries, content=queries.content + self._marked(self.label_embed.weight[-1], 0.0))
        if targets is None:
            return queries, None
        targets = self._bounded(targets)
        slots = targets.labels.shape[1]
        groups = self._groups(slots)
        rounds = groups * self.rounds_per_group
        copies = self.noise(targets, groups)
        negative = torch.tensor(self.negative(groups)).to(copies.valid.device, non_blocking=True)
        given = Given(
            targets=Targets(
                labels=targets.labels.repeat(1, rounds),
                boxes=targets.boxes.repeat(1, rounds, 1),
                counts=tuple(count * rounds for count in targets.counts),
                image_ids=targets.image_ids,
            ),
            matched=copies.valid & ~negative.repeat_interleave(slots),
            counted=self.counted(copies),
            copies=groups,
            limit=self._most_objects,
        )
        return self._put_before(queries, copies, groups), given if self.own_group else None

    def counted(self, copies: NoisedCopies) -> Tensor:
        """(B, R * T), the slots that take part in the class loss."""
        return copies.valid

    def noise(self, targets: Targets, groups: int) -> NoisedCopies:
        """Noised copies of all objects, for so many groups."""
        rounds = groups * self.rounds_per_group
        valid = targets.valid.expand(rounds, -1, -1)
        labels = targets.labels.expand(rounds, -1, -1)
        if self.label_noise > 0:
            flipped = valid & (self.draws.uniform(valid) < self.label_noise)
            labels = torch.where(flipped, self.draws.integers(flipped, self.num_classes), labels)
        boxes = self.noise_boxes(targets.boxes.expand(rounds, -1, -1, -1), valid)
        return NoisedCopies(*(x.transpose(0, 1).flatten(1, 2) for x in (labels, boxes, valid)))

    def _groups(self, slots: int) -> int:
        bound = self.max_queries // max(1, slots * self.rounds_per_group)
        return max(1, min(self.wanted_groups(slots), bound))

    @property
    def _most_objects(self) -> int:
        return max(1, self.max_queries // self.rounds_per_group)

    def _bounded(self, targets: Targets) -> Targets:
        """Not more objects of each image than one group may have, chosen at random."""
        most = self._most_objects
        if targets.labels.shape[1] <= most:
            return targets
        valid = targets.valid
        order = self.draws.uniform(valid).masked_fill(~valid, 2.0).argsort(1)[:, :most]
        return Targets(
            labels=targets.labels.gather(1, order),
            boxes=targets.boxes.gather(1, order[..., None].expand(-1, -1, 4)),
            counts=tuple(min(count, most) for count in targets.counts),
            image_ids=targets.image_ids,
        )

    def content_of(self, copies: NoisedCopies) -> Tensor:
        """(B, R * T, C), zero in unused slots."""
        labels = copies.labels if self.embed_labels else torch.full_like(copies.labels, self.num_classes)
        return self._marked(self.label_embed(labels), 1.0).masked_fill(~copies.valid[..., None], 0.0)

    def _marked(self, embedded: Tensor, mark: float) -> Tensor:
        if not self.indicator:
            return embedded
        return torch.cat([embedded, torch.full_like(embedded[..., :1], mark)], -1)

    def box_logits_of(self, copies: NoisedCopies) -> Tensor:
        """(B, R * T, 4), zero in unused slots."""
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
        own = {"denoise": slice(0, count)} if self.own_group else {}
        groups_of = {
            name: slice(one.start + (count if own or one.start else 0), one.stop + count)
            for name, one in queries.groups.items()
        }
        return replace(
            queries,
            content=torch.cat([content.to(queries.content.dtype), queries.content], 1),
            pos=pos,
            reference_points=references,
            attention_mask=self._mask(queries.attention_mask, count, others, groups, content.device),
            groups=own | groups_of,
        )

    def _mask(
        self, others_mask: Tensor | None, count: int, others: int, groups: int, device: torch.device
    ) -> Tensor | None:
        """(R * T + N, R * T + N), True where a query may not look: copies see the others, but not vice versa."""
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


class CenterDenoising(Denoising):
    """Noise that moves a box's centre and scales its sides; one copy of every object in each group (DN-DETR, 4.3).

    Args:
        num_classes: columns of the class head.
        embed_dim: the width C.
        num_groups: copies of each object ("scalar" in the official code).
        label_noise: the probability that a copy gets a label drawn at random, which may be its own.
        center_noise: a centre moves by at most this share of half the width and height ("lambda 1").
        size_noise: width and height change by at most this share of themselves ("lambda 2").
        eps: of the inverse sigmoid that the boxes pass through.
        indicator: as in ``Denoising``, and so the others.

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
        indicator: bool = True,
        attention_mask: bool = True,
        embed_labels: bool = True,
        max_queries: int = 1000,
        own_group: bool = True,
        *,
        fills_content: bool,
        needs_pos: bool,
        reference_dim: int | None,
    ) -> None:
        _check_least(1, num_groups=num_groups)
        _check_least(0, center_noise=center_noise, size_noise=size_noise)
        super().__init__(
            num_classes,
            embed_dim,
            label_noise,
            eps,
            1,
            indicator,
            attention_mask,
            embed_labels,
            max_queries,
            own_group,
            fills_content,
            needs_pos,
            reference_dim,
        )
        self.num_groups = num_groups
        self.center_noise = center_noise
        self.size_noise = size_noise

    def wanted_groups(self, slots: int) -> int:
        """As many as were asked for."""
        return self.num_groups

    def noise_boxes(self, boxes: Tensor, valid: Tensor) -> Tensor:
        """(R, B, T, 4) to the same."""
        if not self.center_noise and not self.size_noise:
            return boxes
        reach = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], -1)
        step = (self.draws.uniform(valid, 4).to(boxes.dtype) * 2 - 1) * reach
        moved = boxes + torch.cat([step[..., :2] * self.center_noise, step[..., 2:] * self.size_noise], -1)
        return moved.clamp(0, 1)


class CornerDenoising(Denoising):
    """Noise that moves a box's corners; of every object a near copy and, to tell apart, a far one (DINO, 3.3).

    Args:
        num_classes: columns of the class head.
        embed_dim: the width C.
        num_queries: copies in an image: as many groups as fit, one at least. Officially it is said by the near copies
            of the fullest image, so ``dn_number`` 100 is 200 here.
        label_noise: the probability that a copy gets a label drawn at random, which may be its own; half of the
            official ``dn_label_noise_ratio``.
        corner_noise: a corner moves by at most this share of half the width and height; that of a far copy by once to
            twice as much.
        eps: of the inverse sigmoid that the boxes pass through.
        contrastive: have far copies, which are to find nothing; then unused slots are to find nothing, too, as
            officially.
        num_groups: a number of groups that does not depend on the objects, instead of num_queries. The official code
            makes 2 * dn_number groups where ``dn_number`` is below 50, however many objects there are.
        indicator: as in ``Denoising``, and so the others.

    Raises:
        ValueError: a number is out of its range; queries have neither positions nor references.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        num_queries: int,
        label_noise: float,
        corner_noise: float,
        eps: float,
        contrastive: bool = True,
        num_groups: int | None = None,
        indicator: bool = False,
        attention_mask: bool = True,
        embed_labels: bool = True,
        max_queries: int = 1000,
        own_group: bool = True,
        *,
        fills_content: bool,
        needs_pos: bool,
        reference_dim: int | None,
    ) -> None:
        _check_least(1, num_queries=num_queries, **({} if num_groups is None else {"num_groups": num_groups}))
        _check_least(0, corner_noise=corner_noise)
        super().__init__(
            num_classes,
            embed_dim,
            label_noise,
            eps,
            2 if contrastive else 1,
            indicator,
            attention_mask,
            embed_labels,
            max_queries,
            own_group,
            fills_content,
            needs_pos,
            reference_dim,
        )
        self.num_queries = num_queries
        self.num_groups = num_groups
        self.corner_noise = corner_noise
        self.contrastive = contrastive

    def wanted_groups(self, slots: int) -> int:
        """As many as fit, or as were asked for; one where there is nothing to copy."""
        if not slots:
            return 1
        if self.num_groups is not None:
            return self.num_groups
        return self.num_queries // (slots * self.rounds_per_group)

    def negative(self, groups: int) -> list[bool]:
        """Every other round."""
        return [self.contrastive and round_ % 2 == 1 for round_ in range(groups * self.rounds_per_group)]

    def counted(self, copies: NoisedCopies) -> Tensor:
        """(B, R * T)"""
        return torch.ones_like(copies.valid) if self.contrastive else copies.valid

    def noise_boxes(self, boxes: Tensor, valid: Tensor) -> Tensor:
        """(R, B, T, 4) to the same; sides may be negative where corners pass each other."""
        if not self.corner_noise:
            return boxes
        sign = self.draws.integers(valid, 2, 4).to(boxes.dtype) * 2 - 1
        share = self.draws.uniform(valid, 4).to(boxes.dtype)
        far = torch.tensor(self.negative(len(boxes) // self.rounds_per_group), dtype=boxes.dtype)
        share = share + far.to(boxes.device, non_blocking=True)[:, None, None, None]
        reach = (boxes[..., 2:] / 2).repeat(1, 1, 1, 2)
        return to_cxcywh((to_xyxy(boxes) + share * sign * reach * self.corner_noise).clamp(0, 1))


def _check_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if not least <= value < math.inf:
            hint = "; denoising=none turns it off" if least else ""
            raise ValueError(f"denoising.{name}={value}: expected {least} or more{hint}")
