"""Names of official ImageNet classifiers: a backbone with its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from detfamily.checkpoints import swin
from detfamily.checkpoints.adapter import Adapter, Rename, Rule
from detfamily.errors import CheckpointError


@dataclass(frozen=True)
class Official:
    """Classifiers of one repository.

    Attributes:
        repository: where their files come from.
        sign: an official name that only they have.
        rules: between their names and ours.
        ignored: names that may be left unused (regular expressions).
    """

    repository: str
    sign: str
    rules: Sequence[Rule]
    ignored: Sequence[str] = ()

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.rules, self.ignored)


SWIN = Official(
    "microsoft/Swin-Transformer",
    "patch_embed.proj.weight",
    [
        Rename("head.{rest}", ("head.{rest}",)),
        Rename("backbone.stages.3.norm.{rest}", ("norm.{rest}",)),  # before the mean, which is that of the last map
        *swin.rules("backbone.", ""),
    ],
    (r"\.attn_mask$",),
)
RESNET = Official(
    "torchvision",
    "fc.weight",
    [Rename("head.{rest}", ("fc.{rest}",)), Rename("backbone.body.{rest}", ("{rest}",))],
)
OFFICIAL = (SWIN, RESNET)


def to_ours(state: Mapping[str, Tensor], source: str | Path) -> tuple[str, dict[str, Tensor]]:
    """The repository of an official state dict, and its tensors under our names.

    Raises:
        CheckpointError: no such classifier is known, or a tensor has a name that its code does not know.
    """
    for official in OFFICIAL:
        if official.sign in state:
            try:
                return official.repository, official.adapter.to_ours(state)
            except CheckpointError as error:
                raise CheckpointError(f"{source}, of {official.repository}: {error}") from None
    known = ", ".join(one.repository for one in OFFICIAL)
    raise CheckpointError(f"{source} is neither a checkpoint of detfamily nor an official classifier of {known}")
