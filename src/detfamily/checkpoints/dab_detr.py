"""Names of DAB-DETR (IDEA-Research/DAB-DETR) and of DN-DETR on it (IDEA-Research/DN-DETR, ``dn_dab_detr``)."""

from __future__ import annotations

from detfamily.blocks.queries import LearnedQueries
from detfamily.blocks.references import LearnedReference
from detfamily.checkpoints.adapter import Adapter, Join, Rename, Rule
from detfamily.checkpoints.conditional_detr import CONDITIONAL_LAYERS
from detfamily.detector import Detector


def adapter(detector: Detector) -> Adapter:
    """Refined boxes list the box head twice; points have no size."""
    places = ["", "transformer.decoder."] if detector.decoder.refine else [""]
    return Adapter(
        [
            Rename("heads.box_heads.0.{rest}", tuple(f"{place}bbox_embed.{{rest}}" for place in places)),
            Rename("patterns.weight", ("transformer.patterns.weight",)),
            Rename("decoder.query_position.scale.weight", ("transformer.decoder.query_scale.weight",)),
            *anchors(detector),
            Rename("encoder.pos_scale.{rest}", ("transformer.encoder.query_scale.{rest}",)),
            *(
                Rename(
                    f"{part}.layers.{{n}}.ffn.activation.{{rest}}",
                    (f"transformer.{part}.layers.{{n}}.activation.{{rest}}",),
                )
                for part in ("encoder", "decoder")
            ),
            *CONDITIONAL_LAYERS,
        ]
    )


def anchors(detector: Detector) -> list[Rule]:
    """The anchors, what positions are made of them, and the labels of noised copies."""
    source = detector.query_source
    boxes = (
        isinstance(source, LearnedQueries)
        and isinstance(source.reference, LearnedReference)
        and source.reference.dim == 4
    )
    center, size = "query_source.reference.center_logit", "query_source.reference.size_logit"
    return [
        Join((center, size), "refpoint_embed.weight", dim=1) if boxes else Rename(center, ("refpoint_embed.weight",)),
        Rename("decoder.query_position.position_head.{rest}", ("transformer.decoder.ref_point_head.{rest}",)),
        Rename("decoder.query_position.size_head.{rest}", ("transformer.decoder.ref_anchor_head.{rest}",)),
        Rename("denoising.label_embed.weight", ("label_enc.weight",)),
    ]
