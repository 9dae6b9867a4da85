"""From a composed config to the objects of a run, and the checks that need more than one block to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from omegaconf import DictConfig, OmegaConf
from torch import nn

from detfamily.attention import DenseAttention, MapAttention, MSDeformAttention, OwnLevelDeformAttention
from detfamily.blocks.decoder import Decoder
from detfamily.blocks.encoder import Encoder
from detfamily.blocks.patterns import Patterns
from detfamily.blocks.position import AtAttention, Nowhere
from detfamily.blocks.postprocess import SoftmaxScores
from detfamily.blocks.proposals import ProposalQueries
from detfamily.blocks.queries import QuerySource
from detfamily.blocks.query_position import CenterSine
from detfamily.config import build
from detfamily.criterion import Criterion
from detfamily.detector import Detector
from detfamily.errors import ConfigError, require_at_least


def build_detector(
    cfg: DictConfig, num_classes: int, pretrained: bool = True, backbone: nn.Module | None = None
) -> Detector:
    """Build the detector that a config describes.

    Args:
        cfg: composed from ``train.yaml``, or taken from a checkpoint.
        num_classes: columns of the class head, from the data set's label map.
        pretrained: start the backbone from the weights that the config names; False where a checkpoint's follow.
        backbone: instead of the one that the config names.

    Raises:
        ConfigError: the config sets ``model.num_classes``, or blocks contradict each other.
    """
    given = cfg.model.num_classes
    if given is not None and given != num_classes:
        raise ConfigError(
            f"model.num_classes={given} contradicts the data set, which has {num_classes}: leave it out, it is derived"
        )
    cfg = with_num_classes(cfg, num_classes)
    if not pretrained:
        start_backbone_anew(cfg)
    check_composition(cfg)
    detector: Detector = build(cfg.detector, **({} if backbone is None else {"backbone": backbone}))
    check_blocks(detector)
    return detector


def build_criterion(cfg: DictConfig) -> Criterion:
    """Build the criterion that a config describes."""
    criterion: Criterion = build(cfg.criterion)
    return criterion


def build_postprocess(cfg: DictConfig) -> nn.Module:
    """Build what turns predictions into detections."""
    postprocess: nn.Module = build(cfg.postprocess)
    layer, depth = int(cfg.postprocess.layer), int(cfg.decoder.num_layers)
    if not -depth <= layer < depth:
        raise ConfigError(f"postprocess.layer={layer}: the decoder has layers 0 to {depth - 1}, or -{depth} to -1")
    return postprocess


def with_num_classes(cfg: DictConfig, num_classes: int) -> DictConfig:
    """A copy of the config that knows the number of classes."""
    cfg = OmegaConf.create(cfg)
    cfg.model.num_classes = num_classes
    return cfg


def start_backbone_anew(cfg: DictConfig) -> None:
    """Have the backbone start from random numbers; the config is changed."""
    for key, off in (("weights", None), ("pretrained", False)):
        if key in cfg.backbone:
            cfg.backbone[key] = off


def check_composition(cfg: DictConfig) -> None:
    """Refuse choices that contradict each other before anything is built.

    Raises:
        ConfigError: with the reason and what to override.
    """
    for name in ("embed_dim", "num_heads", "ffn_dim", "num_queries"):
        require_at_least(1, f"model.{name}", cfg.model[name])
    require_at_least(0, "encoder.num_layers", cfg.encoder.num_layers)
    softmax_head = cfg.classification.head._target_.endswith("SoftmaxClassHead")
    softmax_scores = cfg.postprocess.scores._target_.endswith(SoftmaxScores.__name__)
    if softmax_head != softmax_scores:
        raise ConfigError(
            "postprocess.scores and classification.head disagree about the 'no object' column: "
            "choose both with classification=softmax or classification=focal"
        )
    if cfg.query_scale is not None and "scale" not in cfg.query_position:
        raise ConfigError(
            "query_scale is for query_position=center and query_position=anchor, and nothing reads it here: add "
            "query_scale=none"
        )
    if cfg.model.indicator and cfg.denoising is None:
        raise ConfigError("model.indicator is set by denoising=dn and has no meaning without it: leave it out")
    if cfg.criterion.aux_loss is False and cfg.postprocess.layer not in (-1, cfg.decoder.num_layers - 1):
        raise ConfigError(
            f"postprocess.layer={cfg.postprocess.layer} evaluates a decoder layer that criterion.aux_loss=false leaves "
            "untrained: use aux_loss=true, or the last layer"
        )


def check_blocks(detector: Detector) -> None:
    """Refuse blocks that cannot work together.

    Raises:
        ConfigError: with the reason and what to override.
    """
    source, decoder = detector.query_source, detector.decoder
    if isinstance(source, ProposalQueries) and not decoder.refine:
        raise ConfigError(
            "query_source=proposals starts from the encoder's boxes, and decoder=plain never updates boxes (its "
            "layers would all answer relative to the raw proposals): two stages need decoder=refine"
        )
    if isinstance(source, ProposalQueries):
        shared = {"class_head": detector.heads.shared, "box_head": detector.heads.shared_boxes}
        for name, one_for_all in shared.items():
            if getattr(source, name) is None and not one_for_all:
                raise ConfigError(
                    f"query_source.{name}=null lets proposals use the decoder's head, and here every decoder layer has "
                    "its own: use decoder=refine_shared, or leave the proposals their own"
                )
    if source.num_one_to_many and cast("Patterns", detector.patterns).num_patterns:
        raise ConfigError(
            "one_to_many=hybrid and patterns multiply queries in two ways that do not go together: add "
            "model.num_patterns=0 or one_to_many=none"
        )
    _check_places(decoder)
    if source.reference_dim is None:
        for name, attentions in _attentions(decoder):
            if any(getattr(module, "needs_reference_points", False) for module in attentions):
                raise ConfigError(
                    f"{name}=ms_deform samples around reference points, and this query source has none: use "
                    "query_source=learned_points, or query_source=proposals with decoder=refine"
                )
    _check_query_position(source, decoder)
    if decoder.reads_sine and not isinstance(detector.memory_position, AtAttention):
        raise ConfigError(
            "cross_attention=conditional compares places with the memory's positions: memory_position=at_attention"
        )
    encoder = cast("Encoder", detector.encoder)
    if encoder.pos_scale is not None and (not encoder.layers or not isinstance(detector.encoder_position, AtAttention)):
        raise ConfigError(
            "encoder.pos_scale multiplies positions that no encoder layer reads here: add encoder.pos_scale=null"
        )
    lost = isinstance(detector.encoder_position, Nowhere) and not isinstance(detector.level_embed, nn.Identity)
    if lost and not any(isinstance(one, DenseAttention) for _, found in _attentions(decoder)[1:] for one in found):
        raise ConfigError(
            "encoder_position=none leaves the level embedding without a reader (deformable cross-attention adds no "
            "positions to what it samples): add level_embed=none"
        )


def unread(detector: nn.Module) -> list[str]:
    """What was chosen and has no effect beside the other choices, in a sentence each."""
    decoder = cast("Detector", detector).decoder
    if isinstance(decoder.query_position, CenterSine) and not decoder.reads_sine:
        return [
            "query_position=center makes a code of the queries' places, which this cross-attention does not read: "
            "positions are as with query_position=fixed, and query_scale has no effect"
        ]
    return []


def _check_places(decoder: Decoder) -> None:
    """Attentions that need their tokens on a map are not for object queries, which lie on none."""
    for name, attentions in _attentions(decoder):
        on_maps = (MapAttention, OwnLevelDeformAttention, *([MSDeformAttention] if name == "self_attention" else []))
        found = [type(one).__name__ for one in attentions if isinstance(one, on_maps)]
        if found:
            others = "dense or split_dense" if name == "self_attention" else "dense, conditional or ms_deform"
            raise ConfigError(
                f"{name} is {found[0]}, whose tokens have to lie on feature maps, and object queries do not: choose "
                f"{others} here; encoder_attention is the place for it"
            )


def _check_query_position(source: QuerySource, decoder: Decoder) -> None:
    position, given = decoder.query_position, source.reference_dim or 0
    if given < position.needs_reference:
        needed = "boxes" if position.needs_reference == 4 else "points or boxes"
        raise ConfigError(
            f"query_position={'center' if position.reads_pos else 'anchor'} makes codes of {needed}, and this query "
            "source has none: use query_source=anchors (or content_anchors), or query_position=fixed"
        )
    if not position.reads_pos and source.has_pos and not isinstance(source, ProposalQueries):
        raise ConfigError(
            "query_position=anchor makes positions of references alone, so those that this query source learns have no "
            "reader: use query_source=anchors (or content_anchors), or query_position=fixed"
        )
    adds_pos = any(getattr(one, "query_pos_proj", None) is not None for one in decoder.layers.modules())
    if position.reads_pos and not source.has_pos and decoder.reads_sine and adds_pos:
        raise ConfigError(
            "the first layer of cross_attention=conditional adds the queries' positions, and this query source has "
            "none: use query_position=anchor, or a query source with positions, such as conditional_points"
        )
    if position.reads_pos and not source.has_pos and not source.has_content:
        raise ConfigError(
            "query_position=fixed adds positions that this query source does not have, so all queries would be equal: "
            "use query_position=anchor"
        )


def _attentions(decoder: Decoder) -> Sequence[tuple[str, list[nn.Module]]]:
    return [
        (kind, [module for layer in decoder.layers for module in layer.get_submodule(kind).modules()])
        for kind in ("self_attention", "cross_attention")
    ]
