from __future__ import annotations

from functools import cache

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from detfamily.backbones.small import SmallBackbone
from detfamily.blocks.postprocess import PerQuery, TopK
from detfamily.build import build_criterion, build_detector, build_postprocess, unread
from detfamily.config import compose
from detfamily.criterion.losses import FocalClassLoss, SoftmaxClassLoss
from detfamily.criterion.rules import Hungarian
from detfamily.errors import ConfigError

TINY = ("backbone=small", "model.embed_dim=32", "model.num_heads=4", "model.ffn_dim=16", "model.num_queries=5")
WINDOWS = ("~self_attention.dropout", "+self_attention.window_size=4")
CROSS_WINDOWS = ("~cross_attention.dropout", "+cross_attention.window_size=4")


@cache
def composed(*overrides: str) -> DictConfig:
    return compose("train", [*TINY, *overrides, "encoder.num_layers=1", "decoder.num_layers=2"])


def test_each_family_gets_its_criterion_and_postprocessing() -> None:
    detr, deformable = composed("family=detr"), composed("family=deformable_detr")
    assert isinstance(build_criterion(detr).losses["class"], SoftmaxClassLoss)
    assert isinstance(build_criterion(deformable).losses["class"], FocalClassLoss)
    assert isinstance(build_postprocess(detr), PerQuery)
    assert isinstance(build_postprocess(deformable), TopK)


@pytest.mark.parametrize(
    ("overrides", "class_agnostic"),
    [
        (["family=dino"], False),
        (["family=dino", "query_source.class_agnostic=true"], True),
        (["family=deformable_detr", "decoder=refine", "query_source=proposals"], True),
        (["family=deformable_detr", "decoder=refine", "query_source=proposals_mixed"], True),
        (["family=deformable_detr", "decoder=refine", "query_source=selected"], False),
        (["family=h_deformable_detr"], True),
        (["family=deformable_detr"], True),
    ],
)
def test_proposals_are_trained_on_what_they_say(overrides: list[str], class_agnostic: bool) -> None:
    """Classes, or objects of any."""
    groups = build_criterion(composed(*overrides)).groups
    rule = groups["proposals"]
    assert isinstance(rule, Hungarian) and rule.class_agnostic == class_agnostic and rule.repeats == 1
    assert not groups["match"].class_agnostic and not groups["one_to_many"].class_agnostic


def test_one_to_many_queries_and_their_losses_are_one_choice() -> None:
    settings = ("model.num_one_to_many=7", "one_to_many.repeats=4", "one_to_many.weight=0.5")
    for family in ("detr", "dino", "deformable_detr"):
        with_more = composed(f"family={family}", "one_to_many=hybrid", *settings)
        rule, source = build_criterion(with_more).groups["one_to_many"], build_detector(with_more, 3).query_source
        assert (rule.repeats, rule.weight) == (4, 0.5) and (source.num_queries, source.num_one_to_many) == (5, 7)
        assert build_detector(composed(f"family={family}"), 3).query_source.num_one_to_many == 0
    assert composed("family=h_deformable_detr").query_source.num_one_to_many == 1500


def test_proposals_may_use_the_decoders_heads_where_it_has_one_for_all_layers() -> None:
    no_heads = ("query_source.class_head=null", "query_source.box_head=null")
    source = build_detector(composed("family=dino", *no_heads), 3).query_source
    assert source.class_head is None and source.box_head is None
    mixed = build_detector(
        composed("family=dino", "heads.shared=false", "heads.shared_boxes=true", "query_source.box_head=null"), 3
    )
    assert len(mixed.heads.class_heads) == 2 and len(mixed.heads.box_heads) == 1
    assert mixed.query_source.class_head is not None and mixed.query_source.box_head is None


def test_the_number_of_classes_comes_from_the_data() -> None:
    cfg = composed("family=deformable_detr")
    for classes in (1, 17):
        assert build_detector(cfg, classes).heads.class_heads[0].out_features == classes
    assert cfg.model.num_classes is None, "the given config stays as it was"
    assert build_detector(composed("family=detr"), 17).heads.class_heads[0].out_features == 18
    given = composed("family=deformable_detr", "model.num_classes=80")
    assert build_detector(given, 80).heads.class_heads[0].out_features == 80
    with pytest.raises(ConfigError, match=r"model\.num_classes=80 contradicts the data set, which has 3"):
        build_detector(given, 3)


def test_no_weights_are_fetched_where_a_checkpoints_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    cfg = composed("family=deformable_detr", "backbone=resnet18")
    assert cfg.backbone.weights == "imagenet"
    with torch.device("meta"):
        build_detector(cfg, 3, pretrained=False)
        with pytest.raises(AssertionError, match="a download"):
            build_detector(cfg, 3)


def test_another_backbone_in_the_place_of_the_configs() -> None:
    backbone = SmallBackbone(4, [4, 6, 8, 10], [3, 4, 5])
    detector = build_detector(composed("family=deformable_detr"), 3, backbone=backbone)
    assert detector.backbone is backbone
    assert [level[0].in_channels for level in detector.neck.levels] == [6, 8, 10, 10]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["family=deformable_detr", "query_source=proposals"], "two stages need decoder=refine"),
        (
            ["family=dino", "decoder=refine", "query_source.class_head=null"],
            r"query_source\.class_head=null lets proposals use .* has its own: use decoder=refine_shared",
        ),
        (
            ["family=dino", "decoder=refine", "query_source.box_head=null"],
            r"query_source\.box_head=null lets proposals use",
        ),
        (
            ["family=dino", "heads.shared_boxes=false", "query_source.class_head=null", "query_source.box_head=null"],
            r"query_source\.box_head=null lets proposals use",
        ),
        (
            ["family=deformable_detr", "one_to_many=hybrid", "model.num_patterns=3"],
            "one_to_many=hybrid and patterns multiply queries in two ways",
        ),
        (["family=detr", "cross_attention=ms_deform"], "cross_attention=ms_deform samples around reference points"),
        (["family=deformable_detr", "query_source=learned"], "use query_source=learned_points"),
        (
            [
                "family=detr",
                "postprocess=top_k",
                "classification.scores._target_=detfamily.blocks.postprocess.SigmoidScores",
            ],
            "disagree about the 'no object' column",
        ),
        (
            ["family=deformable_detr", "criterion.aux_loss=false", "postprocess.layer=0"],
            "evaluates a decoder layer that criterion.aux_loss=false leaves untrained",
        ),
        (
            ["family=detr", "self_attention._target_=detfamily.attention.WindowAttention", *WINDOWS],
            "self_attention is WindowAttention, whose tokens have to lie on feature maps.* choose dense or split_dense",
        ),
        (
            ["family=detr", "cross_attention._target_=detfamily.attention.WindowAttention", *CROSS_WINDOWS],
            "cross_attention is WindowAttention, .* choose dense, conditional or ms_deform here",
        ),
        (
            ["family=deformable_detr", "decoder.layer.self_attention=${cross_attention}"],
            "self_attention is MSDeformAttention, whose tokens have to lie on feature maps",
        ),
        (["family=deformable_detr", "model.num_levels=2"], "model.num_levels=2 is less than the 3 maps"),
        (["family=detr", "model.num_heads=5"], "num_heads=5 does not divide embed_dim=32"),
        (["family=detr", "model.stages=[7]"], "expected ascending stages out of"),
        (
            ["family=detr", "model.embed_dim=36", "model.num_heads=3", "neck=channel_mapper"],
            "num_groups=32 does not divide",
        ),
    ],
)
def test_blocks_that_contradict_each_other(overrides: list[str], message: str) -> None:
    cfg = compose("train", [*TINY, *overrides, "encoder.num_layers=1", "decoder.num_layers=2"])
    with pytest.raises(ConfigError, match=message):
        build_detector(cfg, 3)


def test_an_evaluated_layer_that_there_is_not() -> None:
    for layer in (2, -3):
        cfg = composed("family=detr", f"postprocess.layer={layer}")
        with pytest.raises(
            ConfigError, match=rf"postprocess\.layer={layer}: the decoder has layers 0 to 1, or -2 to -1"
        ):
            build_postprocess(cfg)
    assert build_postprocess(composed("family=detr", "postprocess.layer=0")).layer == 0


def test_the_last_layer_may_be_named_by_its_number() -> None:
    cfg = composed("family=detr", "criterion.aux_loss=false", "postprocess.layer=1")
    assert isinstance(build_detector(cfg, 3), nn.Module)


def test_a_choice_without_effect_is_said():
    """Conditional DETR's code of places serves conditional attention alone."""
    tiny = ("model.embed_dim=32", "model.num_heads=4", "model.ffn_dim=8")
    small = ("backbone=small", *tiny, "encoder.num_layers=1", "decoder.num_layers=1")
    swapped = build_detector(compose("train", ["family=conditional_detr", "cross_attention=ms_deform", *small]), 3)
    (words,) = unread(swapped)
    assert "query_position=center" in words and "query_scale" in words
    assert not unread(build_detector(compose("train", ["family=conditional_detr", *small]), 3))
