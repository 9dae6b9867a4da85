"""Which adapter reads which files: by the family of a model, or by the names in a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from detfamily.checkpoints import (
    co_detr,
    co_detr_model,
    conditional_detr,
    dab_deformable_detr,
    dab_detr,
    deformable_detr,
    detr,
    dino,
    h_deformable_detr,
)
from detfamily.checkpoints.adapter import Adapter, listed
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.mmcv import Place
from detfamily.checkpoints.variant import Variant
from detfamily.detector import Detector
from detfamily.errors import CheckpointError, nearest


@dataclass(frozen=True)
class Upstream:
    """A project whose files can be read and written.

    Attributes:
        repository: owner/name.
        marks: names of tensors that its files have; a file is of the project of which it has the most.
        adapter: names of its tensors and ours, for a detector of ours.
        variant: tensors and settings of a file -> the model in our words.
        settings: config and detector of ours -> its settings.
        no_object: whether the class head has a last row for "no object".
        class_head: a tensor with a row per class.
        label_book: embedded labels that may have more rows than classes, of which the last one is no class.
        tells: from names and stored settings, whether a file is of this project, where another has the same marks.
        places: of files of mmcv, where settings stand in their config; their class heads count the categories in the
            order of the ids. None for files that have arguments of a command line, and a column for each id.
    """

    repository: str
    marks: tuple[str, ...]
    adapter: Callable[[Detector], Adapter]
    variant: Callable[[Evidence], Variant]
    settings: Callable[[Mapping[str, Any], Detector], dict[str, Any]]
    no_object: bool
    class_head: str
    label_book: str | None = None
    tells: Callable[[Collection[str], Mapping[str, Any]], bool] | None = None
    places: Mapping[str, Place] | None = None

    @property
    def of_mmcv(self) -> bool:
        return self.places is not None


def _co_detr(marks: tuple[str, ...]) -> Upstream:
    return Upstream(
        "Sense-X/Co-DETR",
        marks,
        co_detr.adapter,
        co_detr_model.variant,
        co_detr_model.settings,
        False,
        co_detr.CLASS_HEAD,
        places=co_detr_model.PLACES,
    )


UPSTREAMS: dict[str, Upstream] = {
    "detr": Upstream(
        "facebookresearch/detr", detr.MARKS, detr.adapter, detr.variant, detr.settings, True, "class_embed.weight"
    ),
    "deformable_detr": Upstream(
        "fundamentalvision/Deformable-DETR",
        deformable_detr.MARKS,
        deformable_detr.adapter,
        deformable_detr.variant,
        deformable_detr.settings,
        False,
        "class_embed.0.weight",
    ),
    "conditional_detr": Upstream(
        "Atten4Vis/ConditionalDETR",
        conditional_detr.MARKS,
        conditional_detr.adapter,
        conditional_detr.variant,
        detr.settings,
        False,
        "class_embed.weight",
    ),
    "dab_detr": Upstream(
        "IDEA-Research/DAB-DETR",
        dab_detr.MARKS,
        dab_detr.adapter,
        dab_detr.variant,
        dab_detr.settings,
        False,
        "class_embed.weight",
    ),
    "dab_deformable_detr": Upstream(
        "IDEA-Research/DAB-DETR",
        dab_deformable_detr.MARKS,
        dab_deformable_detr.adapter,
        dab_deformable_detr.variant,
        dab_deformable_detr.settings,
        False,
        "class_embed.0.weight",
    ),
    "dino": Upstream(
        "IDEA-Research/DINO",
        dino.MARKS,
        dino.adapter,
        dino.variant,
        dino.settings,
        False,
        "class_embed.0.weight",
        label_book=dino.LABEL_BOOK,
    ),
    "h_deformable_detr": Upstream(
        "HDETR/H-Deformable-DETR",
        h_deformable_detr.MARKS,
        h_deformable_detr.adapter,
        h_deformable_detr.variant,
        h_deformable_detr.settings,
        False,
        "class_embed.0.weight",
        tells=h_deformable_detr.tells,
    ),
    "co_dino": _co_detr(co_detr.DINO_MARKS),
    "co_deformable_detr": _co_detr(co_detr.DEFORMABLE_MARKS),
}
"""Family -> where its official weights come from."""

DENOISED = {"dab_detr": "dn_detr", "dab_deformable_detr": "dn_deformable_detr"}
"""Family -> the family with denoising, whose files have the same names and one more."""
for _plain, _denoised in DENOISED.items():
    UPSTREAMS[_denoised] = replace(
        UPSTREAMS[_plain],
        repository="IDEA-Research/DN-DETR",
        marks=(*UPSTREAMS[_plain].marks, dab_detr.DENOISING_MARK),
    )

_PANOPTIC = r"(bbox_attention|mask_head)\."

_OTHERS = (
    (
        r"transformer\.decoder\.layers\.\d+\.(lvl_attn|cross_attn_list)\.",
        "DN-DETR with deformable attention in the encoder alone",
    ),
    (r"transformer\.encoder\.layers\.0\.attentions\.0\.", "detrex, which renames the official tensors"),
    (r"(bbox_head|query_head|roi_head|rpn_head)\.", "mmdetection other than Co-DETR's"),
    (r"model\.(backbone\.conv_encoder|encoder\.layers)\.", "Hugging Face transformers"),
    (r"model\.(backbone|transformer|class_embed)\.", "a training framework that puts 'model.' before every name"),
    (r"layer4\.\d+\.conv2\.weight", "a ResNet alone: give it as backbone.weights=PATH to a training from scratch"),
)
"""Files that come by, each by a name that it has and those below it have not."""

_DESCENDANT = r"transformer\.(tgt_embed|enc_out_(class|bbox)_embed)\."
"""What those have that go on from DINO's code, also where little else of it is left."""


def upstream_for(family: str) -> Upstream:
    """The project that a family's official weights come from.

    Raises:
        CheckpointError: there is none.
    """
    if family not in UPSTREAMS:
        raise CheckpointError(f"no official weights are known for the family {family!r}; {nearest(family, UPSTREAMS)}")
    return UPSTREAMS[family]


def official_family(family: str, detector: Detector) -> str:
    """The family whose files a detector's weights go to: its blocks decide, whatever its own is called."""
    if family == "deformable_detr" and h_deformable_detr.is_needed(detector):
        return "h_deformable_detr"
    plain = next((one for one, name in DENOISED.items() if name == family), family)
    return plain if detector.denoising is None else DENOISED.get(plain, family)


def adapter_for(family: str, detector: Detector) -> Adapter:
    """The adapter between the official names of a family and those of this detector.

    Raises:
        CheckpointError: there is no adapter for the family.
    """
    return upstream_for(family).adapter(detector)


def recognise(names: Iterable[str], source: str, settings: Mapping[str, Any] | None = None) -> str:
    """The family whose official file has these names.

    Args:
        names: of its tensors.
        source: the file, for messages.
        settings: those stored in it.

    Raises:
        CheckpointError: a panoptic model, a file of a project that has no adapter, or of nothing known.
    """
    names = list(names)
    if not co_detr.is_file(names):
        _refuse_others(names, source)
    # One missing name makes a file incomplete, which is said later by name, and not a file of something else.
    there, given = set(names), settings or {}
    known = {family: one for family, one in UPSTREAMS.items() if one.tells is None or one.tells(there, given)}
    _, share, _, best = max((*_marked(one, there), one.tells is not None, family) for family, one in known.items())
    if share > 0.5:
        return best
    if found := next((name for name in names if re.match(_DESCENDANT, name)), None):
        raise CheckpointError(f"{source} is a file of a descendant of DINO (it has {found}); {_readable()}")
    raise CheckpointError(f"{source} holds tensors of no known project ({listed(names, 4)}); {_readable()}")


def _refuse_others(names: Sequence[str], source: str) -> None:
    """Name the project that a file is of, if it is one of those that come by."""
    if masks := [name for name in names if re.match(_PANOPTIC, name)]:
        raise CheckpointError(
            f"{source} is a panoptic model: it has {len(masks)} tensors of a mask head, which has no counterpart here "
            f"({listed(masks)}). Its boxes are of another class head (250 classes, things and stuff), so that nothing "
            "is taken from it; take a checkpoint of the detector instead"
        )
    for pattern, words in _OTHERS:
        if found := next((name for name in names if re.match(pattern, name)), None):
            raise CheckpointError(f"{source} is a file of {words} (it has {found}); {_readable()}")


def _marked(upstream: Upstream, names: set[str]) -> tuple[int, float]:
    """How many of a project's marks are there, and what share of them all."""
    count = sum(mark in names for mark in upstream.marks)
    return count, count / len(upstream.marks)


def _readable() -> str:
    *others, last = dict.fromkeys(one.repository for one in UPSTREAMS.values())
    return f"there are adapters for the official files of {', '.join(others)} and {last}"
