"""Official files become ours: what model they are of, which of their tensors do not fit, and what is refused."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from detfamily.build import build_detector
from detfamily.checkpoints import adapter_for
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.official import computation, label_map_for, read_official, to_official, translate
from detfamily.checkpoints.registry import UPSTREAMS, official_family
from detfamily.config import compose, to_container
from detfamily.data.labels import LabelMap
from detfamily.errors import CheckpointError, ConfigError, DataError
from detfamily.parity.case import Case

Read = Callable[[str], dict[str, Any]]
DEFORMABLE = "r50_deformable_detr"
REFINE = "_plus_iterative_bbox_refinement"
EXPERIMENTS = {
    "detr-r50": "detr_r50_500ep",
    "detr-r101": "detr_r101_500ep",
    "detr-r50-dc5": "detr_r50_dc5_500ep",
    "detr-r101-dc5": "detr_r101_dc5_500ep",
    DEFORMABLE: "deformable_detr_r50",
    f"{DEFORMABLE}{REFINE}": "deformable_detr_r50_refine",
    f"{DEFORMABLE}{REFINE}_plus_plus_two_stage": "deformable_detr_r50_two_stage",
    f"{DEFORMABLE}_single_scale": "deformable_detr_r50_single_scale",
    f"{DEFORMABLE}_single_scale_dc5": "deformable_detr_r50_single_scale_dc5",
    "dab_detr_r50": "dab_detr_r50",
    "dab_detr_r50_3pat": "dab_detr_r50_3pat",
    "dab_detr_r50_dc5": "dab_detr_r50_dc5",
    "dab_deformable_detr_r50": "dab_deformable_detr_r50_v2",
    "dab_deformable_detr_r50_fixxy": "dab_deformable_detr_r50_v2",
    "4scale_r50": "dino_r50_4scale_12ep",
    "5scale_r50": "dino_r50_5scale_12ep",
    "4scale_swin_L_384_22k": "dino_swin_l_4scale_12ep",
}


def family_of(name: str) -> str:
    if name.startswith("dab_"):
        return name.partition("_r50")[0]
    if name[1:].startswith("scale_"):
        return "dino"
    return "detr" if name.startswith("detr") else "deformable_detr"


def stand_ins(stored_json: Read, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the official names and shapes that take no memory, copies alike, and the official settings."""
    folder = "dab_detr" if name.startswith("dab_") else family_of(name)
    found = stored_json(f"{folder}/checkpoint_keys.json")["variants"][name]
    alias = {copy: group[0] for group in found["shared"] for copy in group}
    number = {key: float(index) for index, (key, _, _) in enumerate(found["keys"])}
    state = {
        key: torch.tensor(number[alias.get(key, key)], dtype=getattr(torch, dtype)).expand(shape)
        for key, shape, dtype in found["keys"]
    }
    return state, found["args"]


def official(state: Mapping[str, Tensor], args: Mapping[str, Any] | None = None, name: str = "a.pth") -> Any:
    content: dict[str, Any] = {"model": dict(state)}
    if args is not None:
        content |= {"optimizer": {}, "lr_scheduler": {}, "epoch": 1, "args": argparse.Namespace(**args)}
    return read_official(content, Path(name))


@pytest.mark.parametrize("with_args", [True, False])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_model_a_file_is_of(stored_json: Read, name: str, with_args: bool) -> None:
    state, args = stand_ins(stored_json, name)
    file = official(state, args if with_args else None, f"{name}.pth")
    assert file.family == family_of(name) and file.columns == 91
    variant = UPSTREAMS[file.family].variant(Evidence(file.state, file.args, f"{name}.pth"))
    assert variant.experiment == EXPERIMENTS[name] and not variant.doubts
    untold = {"model.num_heads", "model.dropout"}
    if "swin" not in name:
        untold |= {"backbone.dilation"}
    if file.family.startswith("dab_"):
        untold |= {"query_source.reference.random_centers"}
    if file.family == "dab_detr":
        untold |= {"position.temperature", "postprocess.num_select"}
    if file.family == "dino":
        untold |= {"position.temperature", "postprocess.num_select", "ffn.activation._target_"}
        untold |= {"decoder.look_forward", "query_source.answer_all"}
        untold |= {f"denoising.{key}" for key in ("num_queries", "own_group", "label_noise", "corner_noise")}
    assert set(variant.assumed) - {"model.num_queries"} == (set() if with_args else untold)
    names = {"hidden_dim": "model.embed_dim", "nheads": "model.num_heads", "dim_feedforward": "model.ffn_dim"}
    names |= {"enc_layers": "encoder.num_layers", "dec_layers": "decoder.num_layers", "dropout": "model.dropout"}
    names |= {"num_queries": "model.num_queries", "dilation": "backbone.dilation"}
    if "deformable" in file.family or file.family == "dino":
        names |= {"num_feature_levels": "model.num_levels", "enc_n_points": "model.num_points"}
        names |= {"dec_n_points": "cross_attention.num_points"}
    if file.family.startswith("dab_"):
        names |= {"num_patterns": "model.num_patterns"}
        assert variant.fields["query_source.reference.random_centers"] == (args["random_refpoints_xy"] and with_args)
        assert variant.fields["query_source.reference.freeze_centers"] is False
    if file.family == "dino":
        assert variant.fields["model.stages"] == [index + 2 for index in args["return_interm_indices"]]
        assert variant.fields["denoising.corner_noise"] == (args["dn_box_noise_scale"] if with_args else 1.0)
    assert {key: variant.fields[ours] for key, ours in names.items()} == {key: args[key] for key in names}


@pytest.mark.parametrize(
    "name",
    [
        "detr-r101-dc5",
        f"{DEFORMABLE}{REFINE}_plus_plus_two_stage",
        "dab_detr_r50_3pat",
        "dab_deformable_detr_r50_fixxy",
        "4scale_swin_L_384_22k",
    ],
)
def test_a_full_size_file_becomes_ours(stored_json: Read, name: str) -> None:
    state, args = stand_ins(stored_json, name)
    found = translate(official(state, args))
    wanted = to_container(compose("train", [f"experiment={EXPERIMENTS[name]}", "data.root=."]))
    assert computation(found.config) == computation(wanted)
    with torch.device("meta"):
        detector = build_detector(found.cfg, 91, pretrained=False)
    own = detector.state_dict()
    written = UPSTREAMS[found.file.family].settings(found.config, detector)
    assert {key: value for key, value in written.items() if args.get(key, value) != value} == {}
    assert {key: value.shape for key, value in found.weights.items()} == {key: v.shape for key, v in own.items()}
    assert found.label_map is not None and found.label_map.name(90) == "toothbrush"


DENOISED = {
    "scalar": 5,
    "label_noise_scale": 0.2,
    "box_noise_scale": 0.4,
    "use_dn": True,
    "transformer_activation": "prelu",
}


@pytest.mark.parametrize(
    ("args", "patterns", "experiment"),
    [
        ({"dilation": True}, 0, "dn_detr_r50_dc5"),
        ({"dilation": True}, 3, "dn_detr_r50_dc5_3pat_12ep"),
        ({"dilation": False}, 0, "dn_detr_r50"),
        ({"dilation": False}, 3, None),
    ],
)
def test_denoising_shows_in_the_labels_that_it_embeds(
    stored_json: Read, args: dict[str, Any], patterns: int, experiment: str | None
) -> None:
    state, stored = stand_ins(stored_json, "dab_detr_r50_3pat" if patterns else "dab_detr_r50")
    stored |= {**DENOISED, **args, "num_patterns": patterns, "modelname": "dn_dab_detr"}
    file = official({**state, "label_enc.weight": torch.zeros(92, 255)}, stored)
    variant = UPSTREAMS[file.family].variant(Evidence(file.state, file.args, "a.pth"))
    assert (file.family, variant.experiment) == ("dn_detr", experiment)
    assert not variant.doubts and variant.fields["denoising.num_groups"] == 5


def test_centres_that_were_to_stay_are_trained_ones(stored_json: Read) -> None:
    """The official code means to freeze them, and does not: its weights belong to a model that trains them."""
    state, args = stand_ins(stored_json, "dab_detr_r50_dc5")
    found = translate(official(state, args | {"random_refpoints_xy": True}))
    assert found.variant.experiment == "dab_detr_r50_dc5_fixed_xy"
    reference = found.config["query_source"]["reference"]
    assert (reference["random_centers"], reference["freeze_centers"]) == (True, False)


def test_two_stages_with_anchors_are_read_with_a_warning(stored_json: Read) -> None:
    state, args = stand_ins(stored_json, "dab_deformable_detr_r50_two_stage")
    found = translate(official(state, args))
    assert found.config["query_source"]["_target_"].endswith("ProposalQueries")
    assert len(found.variant.doubts) == 1 and "nobody trained it" in found.variant.doubts[0]


COLUMNS = LabelMap(tuple(range(91)), tuple(f"c{i}" for i in range(91)))


# -- small files, with everything in them ------------------------------------------------------------------------------

SMALL = [
    *("backbone=resnet18", "backbone.weights=null", "model.embed_dim=32", "model.ffn_dim=48", "model.num_queries=7"),
    *("encoder.num_layers=1", "decoder.num_layers=2"),
]
MODELS = {
    "detr": ["family=detr"],
    "detr with other blocks": ["family=detr", "residual=pre_norm", "position=learned", "model.num_heads=4"],
    "deformable": ["family=deformable_detr", "model.num_points=3", "cross_attention.num_points=2"],
    "refine": ["family=deformable_detr", "decoder=refine", "position=learned"],
    "two stages": ["family=deformable_detr", "decoder=refine", "query_source=proposals", "model.num_heads=4"],
    "single scale": ["family=deformable_detr", "model.stages=[5]", "model.num_levels=1"],
    "conditional": ["family=conditional_detr", "model.num_heads=4"],
    "dab": ["family=dab_detr"],
    "dab with points": [
        *("family=dab_detr", "model.anchor_dim=2", "query_position.modulate_wh=false", "query_scale=layer"),
        *("position.temperature=10", "position.temperature_x=30", "ffn.activation._target_=torch.nn.GELU"),
        *("residual.encoder_norm._target_=torch.nn.LayerNorm", "+residual.encoder_norm.normalized_shape=32"),
    ],
    "dab without refinement": [
        *("family=dab_detr", "decoder=plain", "query_scale=scalar", "position=learned", "model.num_patterns=2"),
    ],
    "dab with box heads apart": [
        *("family=dab_detr", "heads.shared_boxes=false", "cross_attention.add_query_pos=true"),
        "query_source.reference.freeze_centers=true",
    ],
    "dn": ["family=dn_detr", "denoising.num_groups=3", "model.num_patterns=2", "postprocess.num_select=50"],
    "dab deformable": ["family=dab_deformable_detr", "model.num_patterns=2", "model.num_points=3"],
    "dab deformable without refinement": [
        *("family=dab_deformable_detr", "decoder=plain", "model.stages=[5]", "model.num_levels=1"),
    ],
    "dn deformable": ["family=dab_deformable_detr", "denoising=dn", "denoising.label_noise=0.5"],
    "dino": ["family=dino", "denoising.corner_noise=0.4", "denoising.label_noise=0.1", "denoising.num_queries=120"],
    "dino with heads apart": [
        *("family=dino", "model.stages=[2,3,4,5]", "model.num_levels=5", "heads.shared=false", "model.num_heads=4"),
        *("query_source.learn_size=true", "position.temperature=10", "position.temperature_x=30.5"),
        *("decoder.look_forward=false", "ffn.activation._target_=torch.nn.GELU"),
        *("denoising.num_groups=20", "denoising.num_queries=20"),
    ],
    "dino with one pair of heads": [
        *("family=dino", "query_source.content=memory", "query_source.class_head=null", "query_source.box_head=null"),
        *("ffn=mlp_prelu", "cross_attention.num_points=2", "query_source.answer_all=true", "model.dropout=0.1"),
    ],
    "dino with class heads apart": ["family=dino", "heads.shared=false", "heads.shared_boxes=true"],
    "dino with box heads apart": ["family=dino", "heads.shared_boxes=false", "postprocess.num_select=50"],
    "dino with the decoder's class head": ["family=dino", "query_source.class_head=null", "position=learned"],
    "dino of one stage": [
        *("family=dino", "query_source=content_anchors", "query_source.reference.random_centers=true"),
        *("model.stages=[5]", "model.num_levels=1", "level_embed=none"),
        *("residual.encoder_norm._target_=torch.nn.LayerNorm", "+residual.encoder_norm.normalized_shape=32"),
    ],
    "h deformable": ["family=h_deformable_detr", "model.num_one_to_many=5"],
    "h deformable, codes as content": [
        *("family=h_deformable_detr", "model.num_one_to_many=5", "query_source=proposals", "model.num_heads=4"),
        *("decoder.look_forward=false", "one_to_many.repeats=2", "postprocess.num_select=300"),
    ],
    "h deformable of one stage": [
        *("family=h_deformable_detr", "model.num_one_to_many=5", "query_source=learned_points"),
        "one_to_many.weight=0.5",
    ],
    "h deformable without refinement": [
        *("family=h_deformable_detr", "one_to_many=none", "query_source=learned_points", "decoder=plain"),
        "decoder.look_forward=false",
    ],
    "deformable, looking forward": ["family=deformable_detr", "decoder=refine", "decoder.look_forward=true"],
    "deformable, one to many": ["family=deformable_detr", "one_to_many=hybrid", "model.num_one_to_many=3"],
    "deformable, mixed": ["family=deformable_detr", "decoder=refine", "query_source=proposals_mixed"],
}


def small(name: str, columns: int = 91) -> tuple[dict[str, Tensor], Any, dict[str, Tensor]]:
    """The official names of a small model of ours, its config, and our names."""
    state, cfg, ours = made(name, columns)
    return dict(state), cfg, dict(ours)


@functools.cache
def made(name: str, columns: int) -> tuple[dict[str, Tensor], Any, dict[str, Tensor]]:
    cfg = compose("train", [*MODELS[name], *SMALL])
    torch.manual_seed(0)
    detector = build_detector(cfg, columns, pretrained=False)
    state = adapter_for(official_family(cfg.family_name, detector), detector).to_official(detector.state_dict())
    return state, cfg, detector.state_dict()


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str) -> None:
    state, cfg, ours = small(name)
    labels = COLUMNS
    content = to_official(ours, cfg, labels, Path("a.pt"))
    assert list(content) == ["model", "args"] and content["args"]["num_classes"] == 91
    assert {key: value.shape for key, value in content["model"].items()} == {k: v.shape for k, v in state.items()}
    found = translate(read_official(content, Path("a.pth")))
    assert not found.variant.doubts and set(found.weights) == set(ours)
    for key, value in found.weights.items():
        assert torch.equal(value, ours[key]), key
    resolved = to_container(cfg)
    assert computation(found.config) == computation(resolved)
    kept = ("num_groups", "num_queries", "own_group", "label_noise", "center_noise", "size_noise", "corner_noise")
    for key in kept:
        assert (found.config["denoising"] or {}).get(key) == (resolved["denoising"] or {}).get(key), key
    for key in ("num_queries", "num_one_to_many"):
        assert found.config["query_source"][key] == resolved["query_source"][key], key
    assert found.config["model"]["dropout"] == resolved["model"]["dropout"]
    assert found.config["postprocess"] == resolved["postprocess"]
    assert found.config["criterion"]["groups"]["one_to_many"] == resolved["criterion"]["groups"]["one_to_many"]


GOLDEN = [
    *("detr/postnorm", "deformable_detr/base", "deformable_detr/two_stage", "conditional_detr/base", "dab_detr/base"),
    *("dab_deformable_detr/base", "dn_dab_detr/base", "dino/4scale_train", "dino/4scale_eval"),
]


@pytest.mark.parametrize("case", GOLDEN)
def test_the_model_of_a_golden_case(goldens: Path, case: str) -> None:
    """Its config is the one under which the golden results are reproduced, and its tensors go where they belong."""
    stored = Case.load(goldens / case)
    family = import_module(f"detfamily.parity.families.{stored.family}")
    ours = {"dn_dab_detr": "dn_detr"}.get(stored.family, stored.family)
    golden = load_file(goldens / case / "weights.safetensors")
    deformable = "deformable" in stored.family or stored.family == "dino"
    body, _, _ = small("deformable" if deformable else "detr")
    grafted = {**{key: value for key, value in body.items() if key.startswith("backbone.")}, **golden}
    for key, value in golden.items():  # the cases have another backbone: its channels are all that must differ
        if key.startswith("input_proj.") and value.ndim == 4:
            level = key.split(".")[1]
            channels = {"0": 128, "1": 256}.get(level, 512) if deformable else 512
            grafted[key] = torch.zeros(value.shape[0], channels, *value.shape[2:])
    args = {key: value for key, value in stored.info["args"].items() if not key.startswith("backbone")}
    number = stored.info["num_classes"]
    labels = LabelMap(tuple(range(number)), tuple(f"c{i}" for i in range(number)))
    found = translate(official(grafted, args), label_map=labels)
    wanted = to_container(compose("train", family.overrides(stored)))

    def transformer(config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in computation(config).items() if not key.startswith("backbone.")}

    assert transformer(found.config) == transformer(wanted)
    with torch.device("meta"):
        detector = build_detector(found.cfg, number, pretrained=False)
    adapter = adapter_for(ours, detector)
    for key, value in golden.items():
        parts = [found.weights[name] for name in adapter.our_names(key)]
        if not (key.startswith("input_proj.") and value.ndim == 4):
            assert torch.equal(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0], value), key


def test_prefix_and_counters_are_no_obstacle() -> None:
    state, _, ours = small("refine")
    noise = {"total_ops": torch.zeros(1), "backbone.0.body.conv1.total_params": torch.zeros(1)}
    noise["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(7)
    wrapped = {f"module.{name}": value for name, value in {**state, **noise}.items()}
    for content in (wrapped, {"model": wrapped}, {"model": {**state, **noise}}):
        file = read_official(content, Path("a.pth"))
        assert set(file.ignored) == set(noise)
        assert set(translate(file).weights) == set(ours)


def test_half_precision_becomes_single() -> None:
    state, _, ours = small("detr")
    found = translate(official({key: value.half() for key, value in state.items()}))
    assert all(value.dtype == ours[key].dtype for key, value in found.weights.items())


def test_copies_may_be_left_out_as_safetensors_does() -> None:
    state, _, ours = small("deformable")
    fewer = {key: value for key, value in state.items() if not key.startswith(("class_embed.1.", "bbox_embed.1."))}
    assert len(fewer) == len(state) - 8
    assert set(translate(official(fewer)).weights) == set(ours)


def test_all_that_does_not_fit_is_named_at_once() -> None:
    state, _, _ = small("deformable")
    del state["input_proj.1.0.weight"]
    del state["transformer.decoder.layers.1.norm3.bias"]
    state["transformer.extra.weight"] = torch.zeros(2)
    state["backbone.0.body.layer9.0.weight"] = torch.zeros(2)
    state["transformer.encoder.layers.0.linear2.weight"] = torch.zeros(32, 47)
    with pytest.raises(CheckpointError) as caught:
        translate(official(state))
    text = str(caught.value)
    assert "missing: input_proj.1.0.weight, transformer.decoder.layers.1.norm3.bias;" in text
    assert "unknown: transformer.extra.weight, backbone.0.body.layer9.0.weight;" in text
    assert "of another shape: transformer.encoder.layers.0.linear2.weight [32, 47], expected [32, 48]" in text


@pytest.mark.parametrize(
    "name", ["query_embed.weight", "class_embed.weight", "transformer.encoder.layers.0.linear1.weight"]
)
def test_what_tells_the_model_is_missing(name: str) -> None:
    state, _, _ = small("detr")
    del state[name]
    with pytest.raises(CheckpointError, match=rf"a\.pth is incomplete: {name} is missing"):
        translate(official(state))


HOSTILE_SHAPES = [
    ("transformer.decoder.layers.900000000.norm1.bias", torch.zeros(32), "it has transformer.decoder.layers.9000000"),
    ("query_embed.weight", torch.zeros(7), "expected 2 axes"),
    ("query_embed.weight", torch.zeros(0, 32), "expected 2 axes"),
    ("class_embed.weight", torch.zeros(1, 32), "no row for any class"),
    ("transformer.encoder.layers.0.linear1.weight", torch.zeros(1).expand(10**12, 32), "of another shape"),
    (
        "transformer.encoder.layers.0.linear1.bias",
        torch.full((48,), float("nan")),
        "NaN or infinity, in .*linear1",
    ),
    ("backbone.0.body.layer3.7.conv1.weight", torch.zeros(1), "no ResNet that is known here has 8 blocks"),
]


@pytest.mark.parametrize(("name", "value", "words"), HOSTILE_SHAPES)
def test_shapes_and_values_that_no_training_leaves(name: str, value: Tensor, words: str) -> None:
    state, _, _ = small("detr")
    with pytest.raises(CheckpointError, match=words):
        translate(official({**state, name: value}))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"nheads": "eight"}, "stored setting nheads is 'eight'"),
        ({"nheads": -1}, "stored setting nheads is -1"),
        ({"nheads": 10**9}, "stored setting nheads"),
        ({"dropout": float("nan")}, "stored setting dropout is nan"),
        ({"dilation": 3}, "stored setting dilation is 3"),
        ({"nheads": 5}, "num_heads|multiple|5"),
        ({"dilation": True}, "bottlenecks"),
    ],
)
def test_settings_that_make_no_model(args: dict[str, Any], words: str) -> None:
    state, _, _ = small("detr")
    with pytest.raises((CheckpointError, ConfigError), match=words):
        translate(official(state, args))


def test_tensors_decide_where_settings_contradict_them() -> None:
    state, _, _ = small("refine")
    args = {"with_box_refine": False, "hidden_dim": 256, "num_queries": 300, "position_embedding": "sine", "nheads": 8}
    found = translate(official(state, args))
    assert "decoder=refine" in found.variant.choices and found.config["model"]["embed_dim"] == 32
    assert len(found.variant.doubts) == 4
    assert "its stored setting hidden_dim is 256, its tensors are of 32" in found.variant.doubts


def test_two_stages_without_refinement_are_refused() -> None:
    state, _, _ = small("two stages")
    fewer = {key: value for key, value in state.items() if not key.startswith("transformer.decoder.bbox_embed.")}
    with pytest.raises(CheckpointError, match="two stages without box refinement"):
        translate(official(fewer))


def test_the_user_can_say_what_the_file_does_not() -> None:
    state, _, _ = small("two stages")
    plain = translate(official(state))
    assert (plain.config["model"]["num_heads"], plain.config["model"]["num_queries"]) == (8, 300)
    found = translate(official(state), ["model.num_heads=4", "model.num_queries=7"])
    assert found.config["encoder_attention"]["num_heads"] == 4 and found.config["encoder_attention"]["num_points"] == 4
    assert found.config["query_source"]["num_queries"] == 7
    with pytest.raises(CheckpointError, match="not a multiple of 44.*model.num_heads"):
        translate(official(state), ["model.num_heads=11"])
    with pytest.raises(CheckpointError, match=r"missing: .*; unknown: "):
        translate(official(state), ["query_source=learned_points"])
    with pytest.raises(ConfigError, match="is of the family deformable_detr, and cannot become one of detr"):
        translate(official(state), ["family=detr"])


# -- other files -------------------------------------------------------------------------------------------------------


def test_panoptic_models_are_refused_by_name(stored_json: Read) -> None:
    state, args = stand_ins(stored_json, "detr-r50-panoptic-masks")
    with pytest.raises(CheckpointError, match=r"panoptic model: .* 32 tensors .*bbox_attention\.q_linear\.weight, "):
        official(state, args)


def test_files_of_other_projects_are_told_apart() -> None:
    state = {f"bbox_head.transformer.encoder.layers.{n}.norms.0.bias": torch.zeros(2) for n in range(6)}
    with pytest.raises(CheckpointError, match="is a file of mmdetection other.*adapters for the official files of fa"):
        read_official({"model": state}, Path("a.pth"))
    detr, _, _ = small("detr")
    with pytest.raises(CheckpointError, match="keeps its weights as 'state_dict'; official files have them as 'model'"):
        read_official({"meta": {}, "state_dict": detr}, Path("a.pth"))


def test_relatives_are_told_apart_by_what_they_have_besides() -> None:
    dn, _, _ = small("dn")
    blind = {"transformer.decoder.layers.0.lvl_attn.weight": torch.zeros(4, 32)}
    with pytest.raises(CheckpointError, match="DN-DETR with deformable attention in the encoder alone.*has .*lvl_attn"):
        official({**dn, **blind})
    between, _, _ = small("dn deformable")
    words = "dn_dab_dino_deformable_detr in DN-DETR's .*"
    with pytest.raises(CheckpointError, match=rf"{words}it has transformer\.tgt_embed"):
        translate(official({**between, "transformer.tgt_embed.weight": torch.zeros(7, 32)}))
    with pytest.raises(CheckpointError, match=f"{words}modelname says so"):
        translate(official(between, {"modelname": "dn_dab_dino_deformable_detr"}))


DESCENDANTS = {
    "bert.embeddings.weight": torch.zeros(2),
    "transformer.decoder.layers.0.ca_text.in_proj_bias": torch.zeros(2),
}


def test_descendants_of_dino_are_refused_by_what_they_have_besides() -> None:
    dino, _, _ = small("dino")
    with pytest.raises(CheckpointError, match=rf"of IDEA-Research/DINO .*: unknown: {', '.join(DESCENDANTS)}$"):
        translate(official({**dino, **DESCENDANTS}))
    other = {f"transformer.tgt_embed.{n}": torch.zeros(2) for n in range(3)}
    with pytest.raises(CheckpointError, match=r"a descendant of DINO .it has transformer\.tgt_embed\.0.; there are"):
        official({**DESCENDANTS, **other})


def test_two_stages_with_learned_content_or_two_kinds_of_queries_are_of_h_deformable_detr() -> None:
    names = ("deformable", "two stages", "h deformable", "h deformable, codes as content")
    files = {name: small(name)[0] for name in names}
    assert [official(state).family.startswith("h_") for state in files.values()] == [False, False, True, False]
    args = {"num_queries_one2one": 3, "num_queries_one2many": 4}
    assert all(official(state, args).family == "h_deformable_detr" for state in files.values())
    found = translate(official(files["deformable"], args))
    assert (found.config["model"]["num_queries"], found.config["model"]["num_one_to_many"]) == (3, 4)
    found = translate(official(files["h deformable"]))  # 12 rows, and nobody says which of them are for training alone
    assert (found.config["model"]["num_queries"], found.config["query_source"]["num_one_to_many"]) == (12, 0)
    with pytest.raises(CheckpointError, match=r"num_queries_one2one is 13, and query_embed.weight has 12 rows"):
        translate(official(files["h deformable"], {"num_queries_one2one": 13}))
    rows = torch.zeros(1800, 32)  # as published: 1500 of them
    found = translate(official({**files["h deformable"], "query_embed.weight": rows}))
    assert (found.config["model"]["num_queries"], found.config["model"]["num_one_to_many"]) == (300, 1500)
    with pytest.raises(CheckpointError, match="position_embedding_scale=1.0, where only 2 pi"):
        translate(official(files["h deformable"], {"position_embedding_scale": 1.0}))


FOREIGN = [
    ({}, {"decoder_sa_type": "ca_label"}, "decoder_sa_type='ca_label', expected 'sa'"),
    ({}, {"decoder_module_seq": ["ca", "sa", "ffn"]}, r"decoder_module_seq=\['ca', 'sa', 'ffn'\], expected \['sa'"),
    ({}, {"dec_layer_number": [7, 5], "num_queries": 7}, "fewer queries in later decoder layers"),
    ({}, {"two_stage_type": "no", "num_patterns": 3}, "patterns of learned anchors"),
    ({"label_embedding.weight": torch.zeros(91, 32)}, {}, "decoder layers that look at class embeddings"),
    ({"refpoint_embed.weight": torch.zeros(2, 4)}, {"two_stage_add_query_num": 2}, "learned anchors beside proposals"),
    ({"transformer.pat_embed_for_2stage": torch.zeros(2, 32)}, {"two_stage_pat_embed": 2}, "patterns of proposals"),
]


@pytest.mark.parametrize(("more", "args", "words"), FOREIGN)
def test_variants_of_dino_without_a_counterpart(more: dict[str, Tensor], args: dict[str, Any], words: str) -> None:
    state, _, _ = small("dino")
    with pytest.raises(CheckpointError, match=f"a file of DINO with {words}.* for which there is nothing here"):
        translate(official({**state, **more}, args))
    harmless = {"dec_layer_number": [7, 7], "num_queries": 7, "decoder_module_seq": ["sa", "ca", "ffn"]}
    assert not translate(official(state, harmless)).variant.doubts


def test_heads_are_shared_where_copies_are_equal_unless_settings_say_otherwise() -> None:
    """Copies are equal at the start of a training, too, where they are about to part."""
    state, _, _ = small("dino")
    keys = ("heads.shared", "heads.shared_boxes", "query_source.class_head", "query_source.box_head")

    def told(state: dict[str, Tensor], **args: bool) -> tuple[Any, ...]:
        variant = UPSTREAMS["dino"].variant(Evidence(state, args, "a.pth"))
        assert len(variant.doubts) == args.pop("doubts", False), variant.doubts
        return tuple(variant.fields.get(key, "own") for key in keys)

    assert told(state) == (True, None, "own", "own")
    assert told(state, dec_pred_class_embed_share=False) == (False, True, "own", "own")
    assert told(state, dec_pred_bbox_embed_share=False) == (True, False, "own", "own")
    lent = "transformer.enc_out_class_embed"
    equal = {key: state[key.replace(lent, "class_embed.0")] for key in state}
    assert told(equal) == (True, None, None, "own")
    assert told(equal, two_stage_class_embed_share=False) == (True, None, "own", "own")
    fewer = {key: value for key, value in equal.items() if lent not in key and "class_embed.1." not in key}
    assert told(fewer) == (True, None, None, "own")
    apart = {**state, "bbox_embed.1.layers.0.bias": torch.ones(32)}
    assert told(apart) == (True, False, "own", "own")
    variant = UPSTREAMS["dino"].variant(Evidence(apart, {"dec_pred_bbox_embed_share": True}, "a.pth"))
    assert "dec_pred_bbox_embed_share is True, its tensors are of False" in variant.doubts[0]
    with pytest.raises(CheckpointError, match=r"should be a copy of what heads\.box_heads\.1\.layers\.0\.bias"):
        translate(official(apart))
    with pytest.raises(CheckpointError, match="incomplete: it has no transformer.enc_out_class_embed"):
        told({**fewer, "bbox_embed.1.layers.0.bias": torch.ones(32)})


DN_NUMBERS = [
    ({"dn_number": 100}, (200, None, True)),
    ({"dn_number": 50}, (100, None, True)),
    ({"dn_number": 49}, (98, 98, True)),
    ({"dn_number": 1}, (2, 2, True)),
    ({"dn_number": 0}, (1, 1, False)),
    ({"dn_number": 100, "use_dn": False}, (200, 1, False)),
]


def test_what_the_official_code_makes_of_dn_number() -> None:
    """From 50 on it is a number of copies, below half the number of groups; at 0 copies are matched, too."""
    state, cfg, _ = small("dino")
    keys = ("num_queries", "num_groups", "own_group")
    with torch.device("meta"):
        detector = build_detector(cfg, 91, pretrained=False)
    for args, wanted in DN_NUMBERS:
        for _ in range(2):  # as stored, then as written
            found = UPSTREAMS["dino"].variant(Evidence(state, args, "a.pth"))
            denoising = {key: found.fields[f"denoising.{key}"] for key in keys}
            assert tuple(denoising.values()) == wanted or (not wanted[2] and not denoising["own_group"]), args
            assert ["answers in hand" in one for one in found.doubts] == [True] * (not wanted[2])
            args = UPSTREAMS["dino"].settings({**to_container(cfg), "denoising": denoising}, detector)
            args = {key: args[key] for key in ("dn_number", "use_dn")}
    translated = translate(official(state, {"use_dn": False})).config["denoising"]
    assert [translated[key] for key in keys] == [200, 1, False]


@pytest.mark.parametrize("rows", [91, 100])
def test_label_books_of_any_size_become_the_classes_and_one_row_more(rows: int) -> None:
    state, _, _ = small("dino")
    book = torch.randn(rows, 32)
    found = translate(official({**state, "label_enc.weight": book}, {"dn_labelbook_size": rows - 1}))
    embedded = found.weights["denoising.label_embed.weight"]
    assert torch.equal(embedded[:91], book[:91]) and torch.equal(embedded[91], book[-1]) and len(embedded) == 92
    assert not found.variant.doubts
    content = to_official(found.weights, found.cfg, COLUMNS, Path("a.pt"))
    assert content["args"]["dn_labelbook_size"] == 91 and torch.equal(content["model"]["label_enc.weight"], embedded)


def test_a_label_book_without_a_row_for_every_class_is_refused() -> None:
    state, _, _ = small("dino")
    with pytest.raises(CheckpointError, match=r"label_enc\.weight \[90, 32\], expected \[92, 32\]"):
        translate(official({**state, "label_enc.weight": torch.zeros(90, 32)}))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_averaged_weights_on_request(prefix: str) -> None:
    state, _, ours = small("dino")
    average = {f"{prefix}{key}": value + 1 if value.is_floating_point() else value for key, value in state.items()}
    content = {"model": state, "ema_model": average, "epoch": 3}
    file = read_official(content, Path("a.pth"))
    key = "decoder.norm.bias"
    assert file.averaged is False and torch.equal(translate(file).weights[key], ours[key])
    file = read_official(content, Path("a.pth"), averaged=True)
    assert file.averaged is True and torch.equal(translate(file).weights[key], ours[key] + 1)
    assert read_official({"model": state}, Path("a.pth")).averaged is None
    with pytest.raises(CheckpointError, match="no averaged weights, .* it holds a dict with 'model', 'epoch'"):
        read_official({"model": state, "epoch": 3}, Path("a.pth"), averaged=True)
    with pytest.raises(CheckpointError, match=r"averaged weights only: it holds a dict with 'ema_model'\..* ema=true"):
        read_official({"ema_model": average}, Path("a.pth"))
    with pytest.raises(CheckpointError, match="among its weights is what is no dense tensor"):
        read_official({"model": state, "ema_model": {**average, "x": 3}}, Path("a.pth"), averaged=True)


RECOGNISED = [
    *("detr", "deformable", "conditional", "dab", "dn", "dab deformable", "dn deformable"),
    *("dino", "dino of one stage"),
]


@pytest.mark.parametrize("name", RECOGNISED)
def test_one_missing_name_does_not_make_it_a_file_of_something_else(name: str) -> None:
    state, cfg, _ = small(name)
    family = "dn_deformable_detr" if name == "dn deformable" else cfg.family_name
    marks = UPSTREAMS[family].marks
    assert set(marks) <= set(state) and official(state).family == family
    for mark in set(marks) - {"label_enc.weight"}:
        assert official({key: value for key, value in state.items() if key != mark}).family == family, mark


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("dab", {"refpoint_embed.weight": torch.zeros(7, 3)}, "has 3 numbers for an anchor"),
        ("dab", {"transformer.decoder.query_scale.layers.1.weight": torch.zeros(5, 32)}, "has 5 rows, expected 1 "),
        ("dab", {"query_embed.weight": torch.zeros(7, 32)}, "unknown: query_embed.weight"),
        ("dn", {"label_enc.weight": torch.zeros(91, 31)}, r"label_enc.weight \[91, 31\], expected \[92, 31\]"),
        ("dn deformable", {"tgt_embed.weight": torch.zeros(7, 32)}, r"\[7, 32\], expected \[7, 31\]"),
        ("conditional", {"transformer.encoder.norm.weight": torch.zeros(32)}, "pre-norm Conditional DETR"),
    ],
)
def test_tensors_of_no_known_kind(name: str, change: dict[str, Tensor], words: str) -> None:
    state, _, _ = small(name)
    with pytest.raises(CheckpointError, match=words):
        translate(official({**state, **change}))


def test_activations_show_in_tensors_or_settings() -> None:
    state, _, _ = small("dab")
    without = {key: value for key, value in state.items() if "activation" not in key}
    for content, args, kind, doubts in (
        (state, {}, "PReLU", 0),
        (state, {"transformer_activation": "relu"}, "PReLU", 1),
        (without, {"transformer_activation": "gelu"}, "GELU", 0),
        (without, {"transformer_activation": "prelu"}, "ReLU", 1),
        (without, {}, "ReLU", 0),
    ):
        variant = UPSTREAMS["dab_detr"].variant(Evidence(content, args, "a.pth"))
        assert variant.fields["ffn.activation._target_"] == f"torch.nn.{kind}" and len(variant.doubts) == doubts
    assert "ffn.activation._target_" in variant.assumed
    with pytest.raises(CheckpointError, match="transformer_activation is 'glu', expected one of prelu, relu"):
        UPSTREAMS["dab_detr"].variant(Evidence(without, {"transformer_activation": "glu"}, "a.pth"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"meta": {}, "state_dict": {"bbox_head.x": torch.zeros(1)}}, "mmdetection"),
        ({"model": {"transformer.encoder.layers.0.attentions.0.x": torch.zeros(1)}}, "detrex"),
        ({"conv1.weight": torch.zeros(1), "layer4.2.conv2.weight": torch.zeros(1)}, "ResNet alone.*backbone.weights="),
        ({"state_dict": {"model.transformer.x": torch.zeros(1)}}, "training framework"),
        ({"model": {"a.weight": torch.zeros(1)}}, "tensors of no known project"),
        ({"model": {}}, "holds a dict with nothing in it"),
        ({}, "holds a dict with nothing in it"),
        (torch.zeros(3), "holds a tensor of"),
        ([1, 2], "holds a list"),
        ({"model": [torch.zeros(3)]}, "holds a list"),
        ({"model": {"a": torch.zeros(1), "b": 3}}, "no dense tensor with a name: 'b'"),
        ({"model": {1: torch.zeros(1)}}, "no dense tensor with a name: 1"),
        ({"model": {"a": torch.eye(3).to_sparse()}}, "no dense tensor with a name: 'a'"),
        ({"model": {"a": torch.zeros(1, device="meta")}}, "no dense tensor with a name: 'a'"),
    ],
)
def test_what_holds_no_official_weights(content: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_official(content, Path("a.pth"))


# -- labels, and back --------------------------------------------------------------------------------------------------

CATEGORIES = [{"id": 3, "name": "boat"}, {"id": 7, "name": "buoy"}]


def test_what_columns_stand_for() -> None:
    by_id = label_map_for(CATEGORIES, 10, "x.json")
    assert by_id.num_classes == 10 and by_id.name(3) == "boat" and by_id.name(7) == "buoy"
    assert label_map_for(CATEGORIES, 2, "x.json") == LabelMap.contiguous(CATEGORIES)
    with pytest.raises(DataError, match=r"x\.json has 2 categories with ids up to 7, and the class head has 5 columns"):
        label_map_for(CATEGORIES, 5, "x.json")


@pytest.mark.parametrize("name", ["detr", "two stages", "dn", "dino"])
def test_contiguous_columns_go_to_their_category_ids(name: str) -> None:
    _, cfg, ours = small(name, columns=2)
    labels = LabelMap.contiguous(CATEGORIES)
    content = to_official(ours, cfg, labels, Path("a.pt"))
    key = UPSTREAMS[cfg.family_name].class_head
    weight, bias = content["model"][key], content["model"][key.replace("weight", "bias")]
    source = ours["heads.class_heads.0.weight"]
    assert content["args"]["num_classes"] == 8 and len(weight) == 8 + (name == "detr")
    assert torch.equal(weight[[3, 7]], source[:2]) and not weight[[0, 1, 2, 4, 5, 6]].any()
    assert (bias[[0, 1, 2, 4, 5, 6]] < -50).all()
    if name == "detr":
        assert torch.equal(weight[8], source[2])
    elif name in ("dn", "dino"):
        labels_embedded = content["model"]["label_enc.weight"]
        assert torch.equal(labels_embedded[[3, 7, 8]], ours["denoising.label_embed.weight"])  # boat, buoy, unknown
        if name == "dino":  # its proposals say classes
            said = content["model"]["transformer.enc_out_class_embed.bias"]
            assert torch.equal(said[[3, 7]], ours["query_source.class_head.bias"]) and said[0] < -50
            assert content["args"]["dn_labelbook_size"] == 8
    else:  # the official code takes proposals by the first column
        assert torch.equal(content["model"]["class_embed.2.weight"][0], ours["query_source.class_head.weight"][0])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["family=detr", "classification=focal", "postprocess=top_k"], "class_embed|class_head"),
        (["family=detr", "position=sine_centered"], "position.offset is -0.5 here and 0.0 there"),
        (["family=detr", "encoder_position=at_input"], "encoder_position"),
        (["family=deformable_detr", "normalize.mean=[0,0,0]"], "normalize.mean"),
        (
            ["family=deformable_detr", "decoder=refine", "query_source=proposals", "query_source.content=memory"],
            "query_source.content is memory here and code there",
        ),
        (["family=dino", "denoising=none"], "label_enc.weight is missing"),
        (["family=dino", "denoising=dn"], "label_enc.weight"),
        (["family=dino", "query_source.content=code"], r"unknown: transformer\.pos_trans\.weight"),
        (["family=dino", "query_source.class_agnostic=true"], "class_agnostic is True here and False there"),
        (["family=dino", "one_to_many=hybrid"], "no queries for training alone"),
        (["family=dino", "model.box_eps=1e-5"], "eps is 1e-05 here and 0.001 there"),
        (
            ["family=dino", "heads.shared=false", "heads.shared_boxes=true", "query_source.box_head=null"],
            "query_source.box_head is None here and absent there",
        ),
        (["family=dab_detr", "one_to_many=hybrid"], "no queries for training alone"),
        (["family=h_deformable_detr", "query_source.content=memory"], "query_source.content"),
        (["family=conditional_detr", "query_scale=scalar"], "no such model.*query_scale.layers.1.weight"),
        (["family=conditional_detr", "denoising=dn"], "without an official counterpart: denoising"),
        (["family=dab_detr", "query_scale=only_scale"], "query_position.scale._target_"),
        (["family=dab_detr", "ffn.activation._target_=torch.nn.SiLU"], "transformer_activation is 'torch.nn.SiLU'"),
        (["family=dab_detr", "residual=pre_norm"], "residual._target_"),
        (["family=dab_deformable_detr", "ffn=mlp_prelu"], "without an official counterpart: .*activation"),
        (["family=deformable_detr", "encoder_attention=dense"], "no such model.*encoder.layers.0.self_attn"),
        (["family=deformable_detr", "encoder_attention=[dense]"], "no such model.*encoder.layers.0.self_attn"),
        (
            ["family=detr", "encoder_attention=[ms_deform_own_level]"],
            "official counterpart: encoder.layers.0.attention",
        ),
        (["family=deformable_detr", "neck=fpn"], "without an official counterpart: neck"),
        (["family=deformable_detr", "backbone=small"], "without an official counterpart: backbone"),
    ],
)
def test_what_the_official_code_cannot_compute_is_not_written(overrides: list[str], words: str) -> None:
    more = SMALL[2:] if "backbone=small" in overrides else SMALL
    cfg = compose("train", [*overrides, *more])
    weights = build_detector(cfg, 91, pretrained=False).state_dict()
    labels = COLUMNS
    with pytest.raises(CheckpointError, match=rf"a\.pt cannot become a file of .*({words})"):
        to_official(weights, cfg, labels, Path("a.pt"))
