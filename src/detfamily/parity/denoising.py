"""Golden cases of DN-DETR's denoising: the official random draws in the place of ours, and all that is made of them."""

from __future__ import annotations

import re
from typing import cast

import torch
from torch import Tensor

from detfamily.blocks.denoising import Denoising, Draws
from detfamily.blocks.patterns import Patterns
from detfamily.blocks.queries import LearnedQueries
from detfamily.blocks.references import LearnedReference
from detfamily.detector import Detector
from detfamily.parity import contrastive
from detfamily.parity.case import Case
from detfamily.structures import Predictions, Queries, Targets, Tokens


class StoredDraws:
    """The draws that a case stores, in their official order: copy by copy, image by image, object by object.

    Args:
        label_chance: (n,) one for each copy.
        new_label: one for each copy that gets another label.
        box: (n, 4) one for each copy.
        sign: (n, 4) 0 or 1, one for each copy.
    """

    def __init__(
        self, label_chance: Tensor | None, new_label: Tensor | None, box: Tensor | None, sign: Tensor | None = None
    ) -> None:
        self.label_chance, self.new_label, self.box, self.sign = label_chance, new_label, box, sign

    def uniform(self, wanted: Tensor, *more: int) -> Tensor:
        """The stored numbers where they are wanted, zeros elsewhere."""
        return _placed(wanted, self.box if more else self.label_chance)

    def integers(self, wanted: Tensor, end: int, *more: int) -> Tensor:
        """The stored labels or signs where they are wanted, zeros elsewhere."""
        return _placed(wanted, self.sign if more else self.new_label)


def _placed(wanted: Tensor, stored: Tensor | None) -> Tensor:
    if stored is None:
        raise ValueError("the case stores no such draws")
    placed = stored.new_zeros(*wanted.shape, *stored.shape[1:])
    placed[wanted] = stored
    return placed


def stored_draws(case: Case, prefix: str) -> Draws:
    """Draws for ``Denoising.draws``: those of DN-DETR's cases, or those of DINO's."""
    names: tuple[str, ...] = ("dn.rand_label_p", "dn.rand_new_label", "dn.rand_box")
    if any(key.startswith(f"{prefix}cdn.") for key in case.io):
        names = tuple(f"cdn.draw.{name}" for name in ("label_p", "new_label", "box_part", "box_sign01"))
    return cast("Draws", StoredDraws(*(case.io.get(prefix + name) for name in names)))


def can_train(case: Case, prefix: str, detector: Detector) -> bool:
    """Whether the case has the noise that the detector needs in training, or it needs none."""
    stored = any(key.startswith((f"{prefix}cdn.", f"{prefix}dn.")) for key in case.io)
    return stored or detector.denoising is None


def expected(case: Case) -> dict[str, tuple[Tensor, str]]:
    """What is made of the draws is to be compared, too, though a check might as well be given it."""
    return {
        key: (value, "output")
        for key, value in case.io.items()
        if re.search(r"(^|\.)c?dn\.", key) and not re.search(r"(^|\.)(dn\.rand_|cdn\.draw\.)", key)
    }


def results(
    case: Case, prefix: str, detector: Detector, predictions: dict[str, Predictions], targets: Targets
) -> dict[str, Tensor]:
    """The copies, their queries, and what they say, in the official form: flat lists, copy by copy."""
    denoising = detector.denoising
    assert denoising is not None
    if any(key.startswith(f"{prefix}cdn.") for key in case.io):
        return contrastive.results(denoising, prefix, targets, detector.query_source.num_queries)
    said = predictions["denoise"]
    assert said.given is not None
    batch, slots = targets.labels.shape
    groups = said.given.copies
    valid = targets.valid.expand(groups, -1, -1)

    def flat(x: Tensor) -> Tensor:
        return x.expand(batch, *x.shape[1:]).unflatten(1, (groups, slots)).transpose(0, 1)[valid]

    copies = denoising.noise(targets, groups)
    of_object = torch.arange(batch)[:, None].expand(-1, slots)[targets.valid]
    ours = {
        "known_labels": flat(said.given.targets.labels),
        "known_boxes": flat(said.given.targets.boxes),
        "known_labels_noised": flat(copies.labels),
        "known_boxes_noised": flat(copies.boxes),
        "known_batch_idx": of_object.repeat(groups),
        "known_indice": torch.arange(len(of_object)).repeat(groups),
        "map_known_indice": flat(torch.arange(groups * slots)[None]),
        "batch_idx": of_object,
        "single_pad": torch.tensor(slots),
        "pad_size": torch.tensor(groups * slots),
        "scalar": torch.tensor(groups),
        "output_known_class": said.logits.detach(),
        "output_known_coord": said.boxes.detach(),
        **_queries(detector, denoising, targets, denoising.box_logits_of(copies)),
    }
    return {f"{prefix}dn.{name}": value.detach() for name, value in ours.items()}


def _queries(detector: Detector, denoising: Denoising, targets: Targets, box_logits: Tensor) -> dict[str, Tensor]:
    """What the official decoder is given: contents (patterns come later there), anchors before the sigmoid, mask."""
    reference = cast("LearnedReference", cast("LearnedQueries", detector.query_source).reference)
    assert reference.size_logit is not None
    anchors = torch.cat([reference.center_logit, reference.size_logit], -1).repeat(
        max(1, cast("Patterns", detector.patterns).num_patterns), 1
    )
    queries, _ = detector.query_source(Tokens(anchors.new_zeros(len(targets), 1, denoising.embed_dim)), detector.heads)
    repeated = Queries(
        content=queries.content.repeat(1, len(anchors) // queries.content.shape[1], 1),
        reference_points=anchors.sigmoid().expand(len(targets), -1, -1),
        groups={"match": slice(0, len(anchors))},
    )
    given, _ = denoising(repeated, targets)
    assert given.attention_mask is not None
    return {
        "input_query_label": given.content,
        "input_query_bbox": torch.cat([box_logits, anchors.expand(len(targets), -1, -1)], 1),
        "attn_mask": given.attention_mask,
    }
