"""Names of Co-DETR (Sense-X/Co-DETR): mmdet's names of Co-Deformable-DETR and Co-DINO, with ResNet or Swin.

Auxiliary heads and embedded labels are for training alone: published files have them, and ones that were stripped for
inference have not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from detfamily.auxiliary.collaboration import Collaboration
from detfamily.backbones.swin import Swin
from detfamily.blocks.denoising import Denoising
from detfamily.blocks.neck import ChannelMapper
from detfamily.checkpoints import co_detr_heads, swin
from detfamily.checkpoints.adapter import Adapter, Form, Join, Rename, Rule
from detfamily.checkpoints.classes import LABEL_EMBED
from detfamily.checkpoints.detr import dense
from detfamily.detector import Detector

TRANSFORMER = "query_head.transformer."
_ENCODER, _DECODER = f"{TRANSFORMER}encoder.layers.{{n}}.", f"{TRANSFORMER}decoder.layers.{{n}}."

CLASS_HEAD = "query_head.cls_branches.0.weight"

LABEL_BOOK = "query_head.label_embedding.weight"
"""Embedded labels, one for each class; here there is one more, which nobody reads."""

DINO_MARKS = (
    f"{TRANSFORMER}level_embeds",
    f"{TRANSFORMER}query_embed.weight",
    f"{TRANSFORMER}decoder.ref_point_head.0.weight",
    f"{TRANSFORMER}decoder.norm.weight",
    CLASS_HEAD,
)
DEFORMABLE_MARKS = (
    f"{TRANSFORMER}level_embeds",
    f"{TRANSFORMER}pos_trans.weight",
    f"{TRANSFORMER}pos_trans_norm.weight",
    "query_head.query_embedding.weight",
    CLASS_HEAD,
)
"""Names that every file of the one and of the other has."""

_OF_HEADS = (
    r"^(rpn_head|roi_head|bbox_head)\.",
    r"^query_head\.downsample\.",
    r"^query_head\.transformer\.(aux_pos_trans|aux_pos_trans_norm|pos_feats_trans|pos_feats_norm|head_pos_embed)\.",
)
"""What auxiliary heads have, and their positives need to become queries: in training alone."""


def is_file(names: Iterable[str]) -> bool:
    """Whether tensors of these names are Co-DETR's; mmdet's own detectors have nothing of that name."""
    return any(name.startswith(TRANSFORMER) for name in names)


def adapter(detector: Detector) -> Adapter:
    """Rules for the levels, heads and queries that this detector has; what it trains without is left out."""
    neck, auxiliary, denoising = detector.neck, detector.auxiliary, detector.denoising
    return Adapter(
        [
            *_backbone(detector.backbone),
            *(_neck(neck) if isinstance(neck, ChannelMapper) else []),
            *_heads(len(detector.decoder.layers)),
            *_layers(),
            *_queries(detector.decoder.query_position.reads_pos),
            *([] if auxiliary is None else _auxiliary(auxiliary)),
            *([] if denoising is None else [_label_book(denoising)]),
        ],
        ignored=[
            *(_OF_HEADS if auxiliary is None else ()),
            *([rf"^{re.escape(LABEL_BOOK)}$"] if denoising is None else []),
        ],
    )


def _backbone(backbone: nn.Module) -> list[Rule]:
    if isinstance(backbone, Swin):
        return [*swin.rules(official="backbone.")]
    return [Rename("backbone.body.{rest}", ("backbone.{rest}",))]


def _neck(neck: ChannelMapper) -> list[Rule]:
    """Levels of the backbone's maps, and further ones, which are counted anew."""
    rules: list[Rule] = []
    for level in range(len(neck.levels)):
        own = level < neck.num_maps
        official = f"neck.convs.{level}" if own else f"neck.extra_convs.{level - neck.num_maps}"
        rules += [
            Rename(f"neck.levels.{level}.{number}.{{rest}}", (f"{official}.{name}.{{rest}}",))
            for number, name in enumerate(("conv", "gn"))
        ]
    return rules


def _heads(layers: int) -> list[Rule]:
    """Those of decoder layers, and behind them those of the proposals."""
    rules: list[Rule] = []
    for index in range(layers + 1):
        classes, boxes = f"heads.class_heads.{index}", f"heads.box_heads.{index}"
        if index == layers:
            classes, boxes = "query_source.class_head", "query_source.box_head"
        rules.append(Rename(f"{classes}.{{rest}}", (f"query_head.cls_branches.{index}.{{rest}}",)))
        rules += [
            Rename(f"{boxes}.layers.{n}.{{rest}}", (f"query_head.reg_branches.{index}.{2 * n}.{{rest}}",))
            for n in range(3)
        ]
    return rules


def _layers() -> list[Rule]:
    norms = {"self_attention": 0, "cross_attention": 1, "ffn": 2}
    return [
        Rename("encoder.layers.{n}.attention.{rest}", (_ENCODER + "attentions.0.{rest}",)),
        Rename("encoder.layers.{n}.attention_residual.norm.{rest}", (_ENCODER + "norms.0.{rest}",)),
        Rename("encoder.layers.{n}.ffn_residual.norm.{rest}", (_ENCODER + "norms.1.{rest}",)),
        *dense("decoder.layers.{n}.self_attention", _DECODER + "attentions.0.attn"),
        Rename("decoder.layers.{n}.cross_attention.{rest}", (_DECODER + "attentions.1.{rest}",)),
        *(
            Rename(f"decoder.layers.{{n}}.{name}_residual.norm.{{rest}}", (f"{_DECODER}norms.{number}.{{rest}}",))
            for name, number in norms.items()
        ),
        *(
            Rename(f"{side}.layers.{{n}}.ffn.{linear}.{{rest}}", (f"{place}ffns.0.layers.{name}.{{rest}}",))
            for side, place in (("encoder", _ENCODER), ("decoder", _DECODER))
            for linear, name in (("linear1", "0.0"), ("linear2", "1"))
        ),
        Rename("decoder.norm.{rest}", (f"{TRANSFORMER}decoder.norm.{{rest}}",)),
        Rename("level_embed.weight", (f"{TRANSFORMER}level_embeds",)),
    ]


def _queries(have_positions: bool) -> list[Rule]:
    """Where Co-DINO differs from Co-Deformable-DETR, each name belongs to one of them."""
    content = "query_head.query_embedding.weight" if have_positions else f"{TRANSFORMER}query_embed.weight"
    return [
        Rename("query_source.content", (content,)),
        Rename("query_source.memory_proj.{rest}", (f"{TRANSFORMER}enc_output.{{rest}}",)),
        Rename("query_source.memory_norm.{rest}", (f"{TRANSFORMER}enc_output_norm.{{rest}}",)),
        Rename("query_source.pos_proj.{rest}", (f"{TRANSFORMER}pos_trans.{{rest}}",)),
        Rename("query_source.pos_norm.{rest}", (f"{TRANSFORMER}pos_trans_norm.{{rest}}",)),
        *(
            Rename(
                f"decoder.query_position.position_head.layers.{n}.{{rest}}",
                (f"{TRANSFORMER}decoder.ref_point_head.{2 * n}.{{rest}}",),
            )
            for n in range(2)
        ),
    ]


def _label_book(denoising: Denoising) -> Rule:
    """The last row is added, a copy of the one before it, and left out again."""
    rows, classes = denoising.label_embed.num_embeddings, denoising.num_classes

    def with_unknown(book: Tensor) -> Tensor:
        return torch.cat([book, book[-1:]]) if len(book) == classes < rows else book

    return Rename(LABEL_EMBED, (LABEL_BOOK,), Form(with_unknown, lambda book: book[:classes]))


def _auxiliary(auxiliary: Collaboration) -> list[Rule]:
    """What only training has."""
    parts = {
        "box_proj": "aux_pos_trans",
        "box_norm": "aux_pos_trans_norm",
        "feature_proj": "pos_feats_trans",
        "feature_norm": "pos_feats_norm",
    }
    rules: list[Rule] = [Rename("auxiliary.downsample.{rest}", ("query_head.downsample.{rest}",))]
    rules += co_detr_heads.rules("auxiliary.heads.")
    for index, name in enumerate(auxiliary.heads):
        rules += [
            Rename(f"auxiliary.queries.{name}.{ours}.{{rest}}", (f"{TRANSFORMER}{official}.{index}.{{rest}}",))
            for ours, official in parts.items()
        ]
    codes = tuple(f"auxiliary.queries.{name}.code" for name in auxiliary.heads)
    count = len(codes)
    table = Form(lambda tensor: tensor.flatten(), lambda tensor: tensor.view(count, -1))
    rules.append(Join(codes, f"{TRANSFORMER}head_pos_embed.weight", 0, table))
    return rules
