"""Names of DAB-Deformable-DETR (IDEA-Research/DAB-DETR) and of denoising on it (IDEA-Research/DN-DETR)."""

from __future__ import annotations

from detfamily.checkpoints import deformable_detr
from detfamily.checkpoints.adapter import Adapter, Rename
from detfamily.checkpoints.dab_detr import anchors
from detfamily.detector import Detector


def adapter(detector: Detector) -> Adapter:
    """Deformable DETR's names, and those of anchors, patterns and labels."""
    return Adapter(
        [
            Rename("query_source.content", ("tgt_embed.weight",)),
            Rename("patterns.weight", ("patterns_embed.weight",)),
            Rename("decoder.query_position.scale.mlp.{rest}", ("transformer.decoder.query_scale.{rest}",)),
            *anchors(detector),
            *deformable_detr.adapter(detector).rules,
        ]
    )
