"""Golden cases of DINO's contrastive denoising: all that is made of the stored draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detfamily.blocks.denoising import Denoising
from detfamily.structures import Queries, Targets


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """The official settings of noise in our words; without the bound that the official code has not."""
    twice = 2 * settings["dn_number"]
    groups: int | str = "null" if twice >= 100 else max(1, twice)
    return [
        "denoising=cdn",
        f"denoising.num_queries={max(1, twice)}",
        f"denoising.num_groups={groups}",  # few numbers are taken as groups there, whatever the objects are
        f"denoising.label_noise={0.5 * settings['dn_label_noise_ratio']}",
        f"denoising.corner_noise={settings['dn_box_noise_scale']}",
        "denoising.max_queries=1000000",
    ]


def results(denoising: Denoising, prefix: str, targets: Targets, num_queries: int) -> dict[str, Tensor]:
    """The copies and their queries in the official form: flat lists, near copies before far ones in each group."""
    batch, slots = targets.labels.shape
    queries = Queries(
        content=torch.zeros(batch, num_queries, denoising.embed_dim),
        reference_points=torch.full((batch, num_queries, 4), 0.5),
        groups={"match": slice(0, num_queries)},
    )
    own_group, denoising.own_group = denoising.own_group, True
    noised, given = denoising(queries, targets)
    denoising.own_group = own_group
    assert given is not None
    copies = denoising.noise(targets, given.copies)
    count = copies.labels.shape[1]
    rounds = given.copies * denoising.rounds_per_group

    def flat(x: Tensor) -> Tensor:
        per_round = x.expand(batch, *x.shape[1:]).unflatten(1, (rounds, slots)).transpose(0, 1)
        return per_round[targets.valid.expand(rounds, -1, -1)]

    near = flat(given.matched)
    of_object = torch.arange(batch)[:, None].expand(-1, slots)[targets.valid]
    mask = noised.attention_mask
    assert mask is not None
    ours = {
        "noised_labels": flat(copies.labels),
        "noised_boxes": flat(copies.boxes),
        "batch_idx": of_object.repeat(rounds),
        "slot_idx": flat(torch.arange(count)[None]),
        "positive_idx": near.nonzero().flatten(),
        "negative_idx": (~near).nonzero().flatten(),
        "input_query_label": noised.content[:, :count],
        "input_query_bbox": denoising.box_logits_of(copies),
        "attn_mask": mask,
        "pad_size": torch.tensor(count),
        "num_dn_group": torch.tensor(given.copies),
        "single_pad": torch.tensor(slots),
    }
    return {f"{prefix}cdn.{name}": value.detach() for name, value in ours.items()}
