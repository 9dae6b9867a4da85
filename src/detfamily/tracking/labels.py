"""By what runs that belong together are found at Weights & Biases: a group, and tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detfamily.config.overrides import quoted

LONGEST_TAG = 64
"""Characters; the server refuses longer tags."""


def label_words(config: Mapping[str, Any], group: str, tags: Sequence[str]) -> list[str]:
    """Overrides that give a run its group and tags, where it goes to W&B and its config does not say them itself.

    Args:
        config: of the run, resolved.
        group: what its runs have in common.
        tags: by which one of them differs.
    """
    place = config["tracking"].get("wandb")
    if not place:
        return []
    words = [] if place.get("group") is not None else [f"tracking.wandb.group={quoted(group)}"]
    if not place.get("tags"):
        listed = ",".join(quoted(one[:LONGEST_TAG]) for one in dict.fromkeys(tags))
        words.append(f"tracking.wandb.tags=[{listed}]")
    return words
