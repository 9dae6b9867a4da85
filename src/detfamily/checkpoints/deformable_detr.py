"""Names of fundamentalvision/Deformable-DETR.

Heads are listed once per decoder layer there, also where all layers share one; with refinement the decoder lists the
box heads again, with two stages the class heads too; the heads of the proposals are the ones after the last layer's.
"""

from __future__ import annotations

from collections.abc import Sequence

from detfamily.checkpoints.adapter import Adapter, Join, Rename, Rule
from detfamily.checkpoints.detr import BACKBONE, FFN, POSITION, dense
from detfamily.detector import Detector

_ENCODER, _DECODER = "transformer.encoder.layers.{n}.", "transformer.decoder.layers.{n}."


def adapter(detector: Detector) -> Adapter:
    """Rules for the heads and queries that this detector has."""
    num_layers = len(detector.decoder.layers)
    two_stage = detector.query_source.reference_dim == 4
    return Adapter([*_heads(num_layers, detector.heads.shared, detector.decoder.refine, two_stage), *_blocks()])


def _heads(num_layers: int, shared: bool, refine: bool, two_stage: bool) -> list[Rule]:
    class_places = ["", "transformer.decoder."] if two_stage else [""]
    box_places = ["", "transformer.decoder."] if refine else [""]

    def named(head: str, places: Sequence[str], layers: Sequence[int]) -> tuple[str, ...]:
        return tuple(f"{place}{head}.{layer}.{{rest}}" for place in places for layer in layers)

    rules: list[Rule] = []
    if two_stage:
        rules += [
            Rename("query_source.class_head.{rest}", named("class_embed", class_places, [num_layers])),
            Rename("query_source.box_head.{rest}", named("bbox_embed", box_places, [num_layers])),
        ]
    for index in range(1 if shared else num_layers):
        layers = range(num_layers) if shared else [index]
        rules += [
            Rename(f"heads.class_heads.{index}.{{rest}}", named("class_embed", class_places, layers)),
            Rename(f"heads.box_heads.{index}.{{rest}}", named("bbox_embed", box_places, layers)),
        ]
    return rules


def _blocks() -> list[Rule]:
    return [
        BACKBONE,
        *POSITION,
        *FFN,
        Rename("neck.levels.{n}.{rest}", ("input_proj.{n}.{rest}",)),
        Rename("level_embed.weight", ("transformer.level_embed",)),
        Rename("encoder.layers.{n}.attention.{rest}", (_ENCODER + "self_attn.{rest}",)),
        *dense("decoder.layers.{n}.self_attention", _DECODER + "self_attn"),
        Rename("decoder.layers.{n}.cross_attention.{rest}", (_DECODER + "cross_attn.{rest}",)),
        Rename("decoder.layers.{n}.cross_attention_residual.norm.{rest}", (_DECODER + "norm1.{rest}",)),
        Rename("decoder.layers.{n}.self_attention_residual.norm.{rest}", (_DECODER + "norm2.{rest}",)),
        Join(("query_source.pos", "query_source.content"), "query_embed.weight", dim=1),
        Rename("query_source.reference_head.{rest}", ("transformer.reference_points.{rest}",)),
        Rename("query_source.memory_proj.{rest}", ("transformer.enc_output.{rest}",)),
        Rename("query_source.memory_norm.{rest}", ("transformer.enc_output_norm.{rest}",)),
        Rename("query_source.pos_proj.{rest}", ("transformer.pos_trans.{rest}",)),
        Rename("query_source.pos_norm.{rest}", ("transformer.pos_trans_norm.{rest}",)),
    ]
