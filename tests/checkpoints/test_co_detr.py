"""Files of Co-DETR become ours and ours become files of Co-DETR, with and without what only training needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from detfamily.build import build_detector
from detfamily.checkpoints.evidence import Evidence
from detfamily.checkpoints.official import computation, label_map_for, read_official, to_official, translate
from detfamily.checkpoints.registry import UPSTREAMS
from detfamily.checkpoints.transfer import read_initial, start_from
from detfamily.cli import main
from detfamily.config import compose, to_container
from detfamily.data.labels import LabelMap
from detfamily.engine.checkpoint import load_model, load_weights
from detfamily.errors import CheckpointError, DataError
from detfamily.structures import Images

Read = Callable[[str], dict[str, Any]]
MODELS = {
    "co_dino_5scale_r50": "co_dino_r50_5scale_12ep",
    "co_dino_5scale_swin_large": "co_dino_swin_l_5scale_12ep",
    "co_deformable_detr_r50": "co_deformable_detr_r50_12ep",
}
BOOK = "query_head.label_embedding.weight"


def stored(stored_json: Read, name: str) -> dict[str, Any]:
    found: dict[str, Any] = stored_json("co_detr/checkpoint_keys.json")["models"][name]
    return found


def stand_ins(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of the stored names, shapes and types without memory, each filled with a number of its own."""
    return {
        name: torch.tensor(float(index), dtype=getattr(torch, one["dtype"])).expand(one["shape"])
        for index, (name, one) in enumerate(found["keys"].items())
    }


def of_training(found: Mapping[str, Any]) -> set[str]:
    return {name for names in found["training_only"].values() for name in names}


def mmcv_file(state: Mapping[str, Tensor], name: str = "a.pth", **meta: Any) -> Any:
    content = {"meta": {"epoch": 12, **meta}, "state_dict": dict(state), "optimizer": {"state": {}}}
    return read_official(content, Path(name))


# -- the published models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_all_tensors_of_a_published_file_there_and_back(stored_json: Read, name: str) -> None:
    found = stored(stored_json, name)
    official = stand_ins(found)
    file = mmcv_file(official)
    assert len(official) == found["num_keys"] and set(file.ignored) == {n for n in official if "num_batches" in n}
    ours = translate(file)
    assert ours.variant.experiment == MODELS[name] and not ours.variant.doubts and not ours.left_out
    wanted = compose("train", [f"experiment={MODELS[name]}", "data.root=."])
    assert to_container(ours.cfg.detector) == to_container(wanted.detector)
    with torch.device("meta"):
        detector = build_detector(ours.cfg, 80, pretrained=False)
    own = detector.state_dict()
    assert {key: value.shape for key, value in ours.weights.items()} == {key: value.shape for key, value in own.items()}
    assert ours.label_map is not None
    back = to_official(ours.weights, ours.cfg, ours.label_map, Path("a.pt"))["state_dict"]
    assert set(back) == set(official) - set(file.ignored)
    for key, value in back.items():
        assert (value.shape, value.dtype) == (official[key].shape, official[key].dtype), key
        if not key.endswith("relative_position_index"):  # follows from the size of the windows
            assert torch.equal(value.flatten()[:1], official[key].flatten()[:1]), key


@pytest.mark.parametrize("name", MODELS)
def test_what_only_training_needs_may_be_missing_or_left_out(stored_json: Read, name: str) -> None:
    found = stored(stored_json, name)
    official, only = stand_ins(found), of_training(found)
    stripped = translate(mmcv_file({key: value for key, value in official.items() if key not in only}))
    plain = ["auxiliary=none", *["denoising=none"] * name.startswith("co_dino")]
    assert set(plain) <= set(stripped.variant.choices) and stripped.variant.experiment is None
    lighter = translate(mmcv_file(official), plain)
    assert set(lighter.left_out) == only and lighter.weights.keys() == stripped.weights.keys()
    assert computation(lighter.config) == computation(stripped.config)
    assert sum(value.numel() for value in stripped.weights.values() if value.is_floating_point()) == pytest.approx(
        found["parameters"]["inference"], rel=0.01
    )


def test_names_are_refused_that_neither_model_has(stored_json: Read) -> None:
    official = stand_ins(stored(stored_json, "co_deformable_detr_r50"))
    more = {"query_head.extra.weight": torch.zeros(1), "rpn_head.extra.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"unknown: query_head\.extra\.weight, rpn_head\.extra\.weight$"):
        translate(mmcv_file({**official, **more}))
    del official["query_head.transformer.enc_output.weight"]
    with pytest.raises(CheckpointError, match=r"missing: query_head\.transformer\.enc_output\.weight$"):
        translate(mmcv_file(official))


SWINS = {
    # embed_dim, blocks of the third stage, window: the recipe with 300 queries
    (96, 6, 7): "co_deformable_detr_swin_t_12ep",
    (96, 18, 7): "co_deformable_detr_swin_s_12ep",
    (128, 18, 12): "co_deformable_detr_swin_b_12ep",
    (192, 18, 12): "co_deformable_detr_swin_l_12ep",
    (192, 18, 7): None,
}


@pytest.mark.parametrize(("size", "experiment"), SWINS.items())
def test_which_swin(stored_json: Read, size: tuple[int, int, int], experiment: str | None) -> None:
    width, depth, window = size
    state = stand_ins(stored(stored_json, "co_deformable_detr_r50"))
    state = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    state["backbone.patch_embed.proj.weight"] = torch.zeros(1).expand(width, 3, 4, 4)
    state["backbone.patch_embed.norm.weight"] = torch.zeros(1).expand(width)
    for layer, blocks in enumerate((2, 2, depth, 2)):
        for block in range(blocks):
            place, channels = f"backbone.layers.{layer}.blocks.{block}.", width * 2**layer
            state[f"{place}norm1.weight"] = torch.zeros(1).expand(channels)
            state[f"{place}mlp.fc1.weight"] = torch.zeros(1).expand(4 * channels, channels)
            state[f"{place}attn.qkv.bias"] = torch.zeros(1).expand(3 * channels)
            table = torch.zeros(1).expand((2 * window - 1) ** 2, channels // 32)
            state[f"{place}attn.relative_position_bias_table"] = table
    told = UPSTREAMS["co_deformable_detr"].variant(Evidence(state, {}, "a.pth"))
    assert told.experiment == experiment
    queries = "query_head.query_embedding.weight"
    state[queries] = torch.zeros(1).expand(900, 256)
    told = UPSTREAMS["co_deformable_detr"].variant(Evidence(state, {}, "a.pth"))
    assert told.experiment == (experiment and "co_deformable_detr_swin_l_900q_36ep" if size == (192, 18, 12) else None)
    assert told.fields["postprocess.num_select"] == 300


# -- small files, with everything in them ------------------------------------------------------------------------------

SMALL = [
    *("backbone=resnet18", "backbone.weights=null", "model.embed_dim=32", "model.ffn_dim=48", "model.num_queries=7"),
    *("encoder.num_layers=1", "decoder.num_layers=2", "model.region_dim=16"),
]
DINO, DEFORMABLE = ["family=co_dino"], ["family=co_deformable_detr"]
KINDS = {
    "dino": [*DINO, "denoising.corner_noise=0.4", "denoising.num_queries=60", "postprocess.max_detections=1000"],
    "dino of four levels": [*DINO, "model.stages=[3,4,5]", "model.num_levels=4", "encoder.num_layers=3"],
    "dino for inference": [*DINO, "auxiliary=none", "denoising=none"],
    "dino with atss": [*DINO, "auxiliary=atss", "auxiliary.depth=2"],
    "dino with features": [*DINO, "collaboration.features=true", "model.num_heads=4", "cross_attention.num_points=2"],
    "deformable": [*DEFORMABLE, "auxiliary.1.depth=0", "auxiliary.0.roi.resolution=5", "postprocess.num_select=50"],
    "deformable with numbers": [*DEFORMABLE, "collaboration.head_code=scalar", "model.region_scale=56"],
    "deformable with faster_rcnn": [*DEFORMABLE, "auxiliary=faster_rcnn", "model.num_points=2"],
    "deformable without queries": [*DEFORMABLE, "collaboration.positive_queries=false", "decoder.look_forward=false"],
    "deformable for inference": [*DEFORMABLE, "auxiliary=none", "position.temperature=30"],
}
NAMES = ("boat", "buoy", "cat")
LABELS = LabelMap((3, 7, 17), NAMES)


@functools.cache
def made(kind: str, columns: int = 3) -> tuple[Any, dict[str, Tensor]]:
    cfg = compose("train", [KINDS[kind][0], *SMALL, *KINDS[kind][1:]])
    torch.manual_seed(0)
    return cfg, build_detector(cfg, columns, pretrained=False).state_dict()


def official(kind: str, labels: LabelMap = LABELS) -> Any:
    cfg, ours = made(kind, labels.num_classes)
    return to_official(ours, cfg, labels, Path("a.pt"))


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str) -> None:
    cfg, ours = made(kind)
    content = official(kind)
    assert list(content) == ["meta", "state_dict"] and content["meta"]["CLASSES"] == NAMES
    found = translate(read_official(content, Path("a.pth")))
    assert not found.variant.doubts and set(found.weights) == set(ours) and found.repository == "Sense-X/Co-DETR"
    for key, value in found.weights.items():
        rows = slice(3 if key == "denoising.label_embed.weight" else None)  # nobody reads the fourth
        assert torch.equal(value[rows] if value.ndim else value, ours[key][rows] if value.ndim else ours[key]), key
    told, wanted = found.config, to_container(cfg)
    assert computation(told) == computation(wanted)
    assert told["postprocess"] == wanted["postprocess"] and told["collaboration"] == wanted["collaboration"]
    noise = ("num_queries", "label_noise", "corner_noise")
    assert all((told["denoising"] or {}).get(key) == (wanted["denoising"] or {}).get(key) for key in noise)
    assert told["model"]["region_scale"] == wanted["model"]["region_scale"]
    assert found.label_map is not None and found.label_map.names == NAMES


def test_the_label_book_has_a_row_for_each_class_officially_and_one_more_here() -> None:
    content = official("dino")
    book = content["state_dict"][BOOK]
    assert book.shape == (3, 32) and torch.equal(book, made("dino")[1]["denoising.label_embed.weight"][:3])
    embedded = translate(read_official(content, Path("a.pth"))).weights["denoising.label_embed.weight"]
    assert torch.equal(embedded, torch.cat([book, book[2:]]))
    content["state_dict"][BOOK] = book[:2]
    with pytest.raises(CheckpointError, match=rf"{BOOK} \[2, 32\], expected \[4, 32\]"):
        translate(read_official(content, Path("a.pth")))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*DINO, "heads.shared=true"], r"missing: query_head\.cls_branches\.1"),
        ([*DINO, "model.box_eps=1e-5"], "eps is 1e-05 here and 0.001 there"),
        ([*DINO, "classification=focal", "query_source.content=memory"], r"transformer\.query_embed\.weight"),
        ([*DINO, "one_to_many=hybrid"], "no queries for training alone"),
        ([*DINO, "neck=channel_mapper"], "neck"),
        ([*DEFORMABLE, "denoising=cdn"], "denoising"),
        ([*DEFORMABLE, "encoder_attention=dense"], r"attentions\.0"),
        ([*DEFORMABLE, "query_source=proposals"], "query_embedding"),
    ],
)
def test_what_the_official_code_cannot_compute_is_not_written(overrides: list[str], words: str) -> None:
    cfg = compose("train", [overrides[0], *SMALL, *overrides[1:]])
    weights = build_detector(cfg, 3, pretrained=False).state_dict()
    with pytest.raises(CheckpointError, match=rf"a\.pt cannot become a file of Sense-X/Co-DETR.*({words})"):
        to_official(weights, cfg, LABELS, Path("a.pt"))


def test_one_missing_name_does_not_make_it_a_file_of_something_else() -> None:
    for kind, family in (("dino", "co_dino"), ("deformable", "co_deformable_detr")):
        state = official(kind)["state_dict"]
        assert set(UPSTREAMS[family].marks) <= set(state)
        for mark in UPSTREAMS[family].marks:
            assert mmcv_file({key: value for key, value in state.items() if key != mark}).family == family, mark


def test_weights_alone_do_as_well() -> None:
    state = official("deformable")["state_dict"]
    for content in (state, {"model": state}, {f"module.{key}": value for key, value in state.items()}):
        assert set(translate(read_official(content, Path("a.pth")), (), LABELS).weights) == set(made("deformable")[1])


FOREIGN = {
    "roi_head.0.mask_head.convs.0.conv.weight": "learns masks, which have no counterpart here: 1 tensors",
    "mask_head.convs.0.conv.weight": "learns masks",
    "mask_iou_head.fc_mask_iou.bias": "learns masks",
    "query_head.transformer.reference_points.weight": "of one stage",
}
SIZES = {
    # a file that says how images were made ready, in its name or in its config: the recipe
    ("a.pth", 6, None): "co_dino_r50_5scale_12ep",
    ("co_dino_5scale_lsj_r50_3x_coco.pth", 6, None): "co_dino_r50_5scale_lsj_12ep",
    ("a.pth", 9, False): "co_dino_r50_5scale_9enc_lsj_12ep",
    ("a.pth", 9, True): None,
}


@pytest.mark.parametrize(("told", "experiment"), SIZES.items())
def test_large_scale_jitter_shows_in_names_or_configs(
    stored_json: Read, told: tuple[str, int, bool | None], experiment: str | None
) -> None:
    name, layers, mask = told
    state, last = stand_ins(stored(stored_json, "co_dino_5scale_r50")), "query_head.transformer.encoder.layers.5."
    for layer in range(6, layers):
        copies = {key.replace("layers.5.", f"layers.{layer}."): v for key, v in state.items() if key.startswith(last)}
        state |= copies
    meta = {} if mask is None else {"config": f"model = dict(with_attn_mask={mask})"}
    found = translate(mmcv_file(state, name, **meta))
    assert found.variant.experiment == experiment and found.config["encoder"]["num_layers"] == layers


@pytest.mark.parametrize(("name", "words"), FOREIGN.items())
def test_models_without_a_counterpart(name: str, words: str) -> None:
    state = {**official("deformable")["state_dict"], name: torch.zeros(1)}
    with pytest.raises(CheckpointError, match=rf"a\.pth is a file of Co-DETR .*{words}"):
        translate(mmcv_file(state), (), LABELS)


def test_a_vision_transformer_has_no_counterpart() -> None:
    state = {k: v for k, v in official("dino")["state_dict"].items() if not k.startswith("backbone.")}
    with pytest.raises(CheckpointError, match=r"neither a ResNet nor a Swin.*\(ViT-L\).*: backbone\.pos_embed$"):
        translate(mmcv_file({**state, "backbone.pos_embed": torch.zeros(1)}), (), LABELS)


# -- averages ----------------------------------------------------------------------------------------------------------


def test_averages_stand_under_the_plain_names_and_trained_weights_beside_them() -> None:
    """As mmdet's hook leaves them at the end of an epoch, where it has exchanged both."""
    state = official("dino")["state_dict"]
    trained = {f"ema_{key.replace('.', '_')}": value + 1 for key, value in state.items() if "running" not in key}
    content = {"meta": {}, "state_dict": {**state, **trained}}
    key = "decoder.norm.bias"
    for averaged, more in ((None, 0), (True, 0), (False, 1)):
        file = read_official(content, Path("a.pth"), averaged)
        weights = translate(file, (), LABELS).weights
        assert file.averaged is (averaged is not False) and set(weights) == set(made("dino")[1])
        assert torch.equal(weights[key], made("dino")[1][key] + more)
        assert torch.equal(weights["backbone.body.bn1.running_var"], made("dino")[1]["backbone.body.bn1.running_var"])
    assert mmcv_file(state).averaged is None
    with pytest.raises(CheckpointError, match=r"no averaged weights, which mmcv keeps beside tensors ema_"):
        read_official({"meta": {}, "state_dict": state}, Path("a.pth"), True)


# -- settings that the config in a file tells --------------------------------------------------------------------------

CONFIG = """
num_dec_layer = 6
model = dict(
    type='CoDETR',
    with_attn_mask=False,
    backbone=dict(drop_path_rate=0.5, use_checkpoint=True),
    query_head=dict(
        dn_cfg=dict(noise_scale=dict(label=0.4, box=0.4), group_cfg=dict(num_dn_queries=500)),
        loss_cls=dict(loss_weight=1.0 * num_dec_layer)),
    test_cfg=[dict(max_per_img=1000, nms=dict(type='soft_nms', iou_threshold=0.7)), dict()])
os.remove('everything')
"""


def test_settings_come_from_the_stored_config() -> None:
    fields = translate(mmcv_file(official("dino")["state_dict"], config=CONFIG), (), LABELS).variant.fields
    assert (fields["denoising.num_queries"], fields["denoising.corner_noise"]) == (1000, 0.4)
    assert fields["denoising.label_noise"] == 0.2 and fields["postprocess.max_detections"] == 1000
    assert fields["postprocess.soft_nms_iou"] == 0.7 and fields["backbone.drop_path"] == 0.5


@pytest.mark.parametrize("config", ["model = dict(", "(" * 500, "model = 3", "\0", 7, None])
def test_a_config_that_cannot_be_read_says_nothing(config: Any) -> None:
    told = translate(mmcv_file(official("dino")["state_dict"], config=config), (), LABELS).variant
    assert told.fields["postprocess.max_detections"] == 300 and "postprocess.max_detections" in told.assumed


def test_settings_of_another_kind_are_refused() -> None:
    with pytest.raises(CheckpointError, match="stored setting max_per_img is 'many'"):
        text = "model = dict(test_cfg=[dict(max_per_img='many')])"
        translate(mmcv_file(official("dino")["state_dict"], config=text), (), LABELS)
    text = "model = dict(test_cfg=[dict(nms=dict(type='nms', iou_threshold=0.7))])"
    assert (
        "type 'nms'" in translate(mmcv_file(official("dino")["state_dict"], config=text), (), LABELS).variant.doubts[0]
    )


# -- classes -----------------------------------------------------------------------------------------------------------


def test_80_columns_are_cocos_and_others_are_those_that_the_file_names(stored_json: Read) -> None:
    full = stand_ins(stored(stored_json, "co_deformable_detr_r50"))
    found = translate(mmcv_file(full)).label_map
    assert found is not None and found.num_classes == 80
    assert (found.name(79), found.category_id(79), found.category_id(11)) == ("toothbrush", 90, 13)
    named = translate(mmcv_file(full, CLASSES=tuple(f"c{n}" for n in range(80)))).label_map
    assert named is not None and named.name(0) == "c0"
    state = official("dino")["state_dict"]
    assert translate(mmcv_file(state)).label_map is None
    assert translate(mmcv_file(state, CLASSES=NAMES[:2])).label_map is None
    named = translate(mmcv_file(state, CLASSES=NAMES)).label_map
    assert named is not None and named.names == NAMES


def test_columns_count_the_categories_in_order() -> None:
    categories = [{"id": 7, "name": "buoy"}, {"id": 3, "name": "boat"}]
    assert label_map_for(categories, 2, "x.json", by_id=False).names == ("boat", "buoy")
    with pytest.raises(
        DataError, match=r"x\.json has 2 categories with ids up to 7, and the class head has 10 columns"
    ):
        label_map_for(categories, 10, "x.json", by_id=False)


def test_columns_by_category_id_become_those_of_the_categories_alone() -> None:
    by_id = LabelMap((None, None, 2, 3), (None, None, "cat", "dog"))
    content, (_, ours) = official("dino", by_id), made("dino", 4)
    assert content["meta"]["CLASSES"] == ("cat", "dog")
    state = content["state_dict"]
    boxes = ours["auxiliary.heads.faster_rcnn.roi.box_head.weight"]
    pairs = {
        "query_head.cls_branches.2.weight": ours["query_source.class_head.weight"][2:],
        "bbox_head.0.atss_cls.bias": ours["auxiliary.heads.atss.class_head.bias"][2:],
        "roi_head.0.bbox_head.fc_cls.weight": ours["auxiliary.heads.faster_rcnn.roi.class_head.weight"][2:],  # and none
        "roi_head.0.bbox_head.fc_reg.weight": boxes[8:],
        BOOK: ours["denoising.label_embed.weight"][2:4],
    }
    for name, rows in pairs.items():
        assert torch.equal(state[name], rows), name
    found = translate(read_official(content, Path("a.pth")))
    assert found.label_map is not None and found.label_map.names == ("cat", "dog")


def test_a_training_takes_rows_of_all_heads_by_name(tmp_path: Path) -> None:
    torch.save(official("deformable"), tmp_path / "a.pth")
    labels = LabelMap((1, 2), ("cat", "dog"))
    cfg = compose("train", [KINDS["deformable"][0], *SMALL, *KINDS["deformable"][1:]])
    detector = build_detector(cfg, 2, pretrained=False)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    start_from(detector, read_initial(tmp_path / "a.pth"), to_container(cfg), labels)
    now, old = detector.state_dict(), made("deformable")[1]
    heads = "auxiliary.heads."
    for name in ("heads.class_heads.0.weight", f"{heads}atss.class_head.bias"):
        assert torch.equal(now[name][0], old[name][2]) and torch.equal(now[name][1], before[name][1])
    name = f"{heads}faster_rcnn.roi.class_head.weight"
    assert torch.equal(now[name][[0, 2]], old[name][[2, 3]]) and torch.equal(now[name][1], before[name][1])
    name = f"{heads}faster_rcnn.roi.box_head.weight"
    assert torch.equal(now[name][:4], old[name][8:]) and torch.equal(now[name][4:], before[name][4:])
    rest = [name for name in now if "class_head" not in name and "roi.box_head" not in name]
    assert all(torch.equal(now[name], old[name]) for name in rest)


# -- the commands ------------------------------------------------------------------------------------------------------


def test_from_a_file_of_mmcv_to_ours_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = official("dino")
    torch.save({**content, "optimizer": {}}, tmp_path / "a.pth")
    main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "all.pt")])
    shown = capsys.readouterr().out
    assert "Sense-X/Co-DETR" in shown and "family=co_dino" in shown and "3 columns: boat, buoy, cat" in shown
    main(["convert", str(tmp_path / "all.pt"), str(tmp_path / "back.pth")])
    assert "3 columns, 3 categories" in capsys.readouterr().out
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["meta"]["CLASSES"] == NAMES and back["state_dict"].keys() == content["state_dict"].keys()
    assert all(torch.equal(value, content["state_dict"][key]) for key, value in back["state_dict"].items())
    words = ["auxiliary=none", "denoising=none"]
    main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "light.pt"), *words])
    assert "45 tensors for training alone (query_head.label_embedding.weight, " in capsys.readouterr().out
    said = [answers(tmp_path / name) for name in ("all.pt", "light.pt")]
    assert torch.equal(*said)


def answers(path: Path) -> Tensor:
    """The logits of the model in a file."""
    loaded = load_model(path)
    detector = build_detector(OmegaConf.create(loaded.config), 3, pretrained=False).eval()
    load_weights(detector, loaded.weights, path)
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.zeros(1, 64, 96, dtype=torch.bool), ((64, 96),), ((64, 96),), (0,))
    with torch.inference_mode():
        said: Tensor = detector(images)["match"].logits
    return said
