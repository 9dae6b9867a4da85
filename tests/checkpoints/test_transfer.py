"""Starting from other weights: what goes over by itself, what only on request, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from detfamily.build import build_detector, with_num_classes
from detfamily.checkpoints import adapter_for
from detfamily.checkpoints.coco_classes import coco_label_map
from detfamily.checkpoints.transfer import Report, read_initial, start_from
from detfamily.config import compose, to_container
from detfamily.data.labels import LabelMap
from detfamily.detector import Detector
from detfamily.engine import checkpoint
from detfamily.errors import CheckpointError, ConfigError
from detfamily.structures import Images

SMALL = [
    *("backbone=resnet18", "backbone.weights=null", "model.embed_dim=32", "model.ffn_dim=48", "model.num_queries=7"),
    *("encoder.num_layers=1", "decoder.num_layers=2", "data=shapes"),
]
DETR, PLAIN = ["family=detr"], ["family=deformable_detr"]
TWO_STAGE = ["family=deformable_detr", "decoder=refine", "query_source=proposals"]
CONDITIONAL, DAB, DN = ["family=conditional_detr"], ["family=dab_detr"], ["family=dn_detr"]
DAB_DEFORMABLE, DN_DEFORMABLE = ["family=dab_deformable_detr"], ["family=dn_deformable_detr"]
PATTERNS = ["model.num_patterns=2"]
DINO, H_DEFORMABLE = ["family=dino"], ["family=h_deformable_detr", "model.num_one_to_many=3"]
PETS = LabelMap((5, 6, 9), ("dog", "fish", "cat"))
FARM = LabelMap((1, 2, 3, 4), ("cow", "cat", "sheep", "dog"))


def model(overrides: list[str], labels: LabelMap, seed: int = 0) -> tuple[Detector, dict[str, Any], Any]:
    cfg = compose("train", [overrides[0], *SMALL, *overrides[1:]])
    torch.manual_seed(seed)
    detector = build_detector(cfg, labels.num_classes, pretrained=False)
    return detector, to_container(with_num_classes(cfg, labels.num_classes)), cfg


def write_ours(path: Path, overrides: list[str], labels: LabelMap, **more: Any) -> dict[str, Tensor]:
    detector, config, cfg = model(overrides, labels, seed=1)
    state = {"config": config, "template": OmegaConf.to_container(cfg), "label_map": labels.state_dict(), **more}
    checkpoint.save(path, {**state, "model": detector.state_dict()})
    return detector.state_dict()


def write_official(path: Path, overrides: list[str], columns: int = 91) -> dict[str, Tensor]:
    labels = LabelMap(tuple(range(columns)), tuple(f"c{i}" for i in range(columns)))
    detector, _, cfg = model(overrides, labels, seed=1)
    torch.save({"model": adapter_for(cfg.family_name, detector).to_official(detector.state_dict())}, path)
    return detector.state_dict()


def start(
    path: Path, overrides: list[str], labels: LabelMap, partial: bool = False, averaged: bool | None = None
) -> tuple[Any, Any, Report]:
    detector, config, _ = model(overrides, labels)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    report = start_from(detector, read_initial(path, averaged), config, labels, partial)
    return before, detector.state_dict(), report


@pytest.mark.parametrize("overrides", [DETR, PLAIN, TWO_STAGE])
def test_rows_of_classes_go_over_by_name_and_all_else_as_it_is(tmp_path: Path, overrides: list[str]) -> None:
    source = write_ours(tmp_path / "a.pt", overrides, FARM)
    before, after, report = start(tmp_path / "a.pt", overrides, PETS)
    heads = [name for name in after if ".class_head" in name]
    for name in after:
        if name not in heads:
            assert torch.equal(after[name], source[name]), name
    for name in heads:
        special = name.startswith("query_source.")
        assert torch.equal(after[name][0], source[name][0 if special else 3]), name  # dog, or "an object"
        assert torch.equal(after[name][1], before[name][1]), name  # fish is new
        assert torch.equal(after[name][2], source[name][1]), name  # cat
        if overrides is DETR:
            assert torch.equal(after[name][3], source[name][4]), name  # no object
    assert dict(report.rows)["classes"] == "2 of 3 by name (dog, cat); 1 new (fish); 2 of the checkpoint are not needed"
    assert f"{len(after) - len(heads)} of {len(after)} tensors as they are" in dict(report.rows)["weights"]
    assert not report.warnings


def test_the_same_classes_keep_every_row(tmp_path: Path) -> None:
    source = write_ours(tmp_path / "a.pt", TWO_STAGE, FARM)
    _, after, report = start(tmp_path / "a.pt", TWO_STAGE, FARM)
    assert all(torch.equal(after[name], value) for name, value in source.items())
    assert [name for name, _ in report.rows] == ["weights"]


def test_averaged_weights_are_those_to_start_from(tmp_path: Path) -> None:
    averaged = {name: value + 1 for name, value in model(DETR, FARM)[0].state_dict().items()}
    trained = write_ours(tmp_path / "a.pt", DETR, FARM, ema={"updates": 3, "model": averaged})
    for asked, wanted, words in (
        (None, averaged, "averaged weights are taken; the file has the trained ones, too"),
        (True, averaged, "averaged weights are taken; the file has the trained ones, too"),
        (False, trained, "trained weights are taken; the file has averaged ones, too"),
    ):
        _, after, report = start(tmp_path / "a.pt", DETR, FARM, averaged=asked)
        assert all(torch.equal(after[name], value) for name, value in wanted.items())
        assert words in dict(report.rows)["averaging"]
    write_ours(tmp_path / "b.pt", DETR, FARM)
    with pytest.raises(CheckpointError, match=r"b\.pt has no averaged weights: .* without optimizer\.ema_decay"):
        read_initial(tmp_path / "b.pt", True)
    with pytest.raises(ConfigError, match="init_ema='yes': expected true, false or null"):
        read_initial(tmp_path / "b.pt", "yes")  # type: ignore[arg-type]


def test_averaged_weights_of_official_files_only_on_request(tmp_path: Path) -> None:
    trained = write_official(tmp_path / "a.pth", DETR)
    content = torch.load(tmp_path / "a.pth")
    averaged = {f"module.{name}": value + 1 for name, value in content["model"].items()}
    torch.save({**content, "ema_model": averaged}, tmp_path / "b.pth")
    key = "encoder.layers.0.ffn.linear1.weight"
    for asked, more, words in ((None, 0, "the trained weights are taken"), (True, 1, "the averaged weights are taken")):
        _, after, report = start(tmp_path / "b.pth", DETR, PETS, averaged=asked)
        assert torch.equal(after[key], trained[key] + more)
        assert dict(report.rows)["averaging"].startswith(words) and not report.warnings
    assert "facebookresearch/detr, averaged)" in report.rows[0][1]
    assert "averaging" not in dict(start(tmp_path / "a.pth", DETR, PETS)[2].rows)
    with pytest.raises(CheckpointError, match=r"a\.pth has no averaged weights.*it holds a dict with 'model'\."):
        read_initial(tmp_path / "a.pth", True)


def test_proposals_that_say_classes_have_no_special_row(tmp_path: Path) -> None:
    source = write_ours(tmp_path / "a.pt", DINO, FARM)
    before, after, report = start(tmp_path / "a.pt", DINO, PETS)
    for name in ("query_source.class_head.weight", "heads.class_heads.0.weight", "denoising.label_embed.weight"):
        assert torch.equal(after[name][[0, 2]], source[name][[3, 1]]), name  # dog, cat
        assert torch.equal(after[name][1], before[name][1]), name  # fish is new
    assert torch.equal(after["denoising.label_embed.weight"][3], source["denoising.label_embed.weight"][4])
    assert not report.warnings
    agnostic = [*DINO, "query_source.class_agnostic=true"]
    with pytest.raises(
        CheckpointError, match=r"query_source\.class_head\.weight \[4, 32\], a class head of another kind"
    ):
        start(tmp_path / "a.pt", agnostic, PETS)
    before, after, _ = start(tmp_path / "a.pt", agnostic, PETS, partial=True)
    assert torch.equal(after["query_source.class_head.bias"], before["query_source.class_head.bias"])
    assert torch.equal(after["heads.class_heads.0.weight"][0], source["heads.class_heads.0.weight"][3])


def test_rows_of_embedded_labels_go_over_by_name_and_that_of_unknown_always(tmp_path: Path) -> None:
    key = "denoising.label_embed.weight"
    source = write_ours(tmp_path / "a.pt", DN, FARM)
    before, after, report = start(tmp_path / "a.pt", DN, PETS)
    assert torch.equal(after[key][[0, 2, 3]], source[key][[3, 1, 4]])  # dog, cat, unknown
    assert torch.equal(after[key][1], before[key][1])  # fish is new
    assert torch.equal(after["heads.class_heads.0.bias"][[0, 2]], source["heads.class_heads.0.bias"][[3, 1]])
    assert not report.warnings
    source = write_official(tmp_path / "a.pth", DN, columns=3)
    before, after, _ = start(tmp_path / "a.pth", DN, FARM)  # nobody knows which three
    assert torch.equal(after[key][-1], source[key][-1]) and torch.equal(after[key][:-1], before[key][:-1])


@pytest.mark.parametrize("overrides", [DETR, PLAIN, TWO_STAGE, CONDITIONAL, DAB, DN_DEFORMABLE, DINO, H_DEFORMABLE])
def test_an_official_file_is_read_as_it_is(tmp_path: Path, overrides: list[str]) -> None:
    source = write_official(tmp_path / "a.pth", overrides)
    before, after, report = start(tmp_path / "a.pth", overrides, PETS)
    coco = coco_label_map()
    head = "heads.class_heads.0.weight"
    assert torch.equal(after[head][0], source[head][coco.names.index("dog")])
    assert torch.equal(after[head][1], before[head][1])
    assert torch.equal(after["backbone.body.conv1.weight"], source["backbone.body.conv1.weight"])
    assert dict(report.rows)["classes"].startswith("2 of 3 by name (dog, cat); 1 new (fish); 78 of the checkpoint")
    owners = {"detr": "facebook", "deformable_detr": "fundamentalvision", "conditional_detr": "Atten4Vis"}
    owners["h_deformable_detr"] = "HDETR"
    assert f"of {owners.get(overrides[0].removeprefix('family='), 'IDEA-Research/D')}" in report.rows[0][1]
    assert not report.warnings


def test_a_head_whose_classes_nobody_knows_starts_anew(tmp_path: Path) -> None:
    write_official(tmp_path / "a.pth", DETR, columns=3)
    before, after, report = start(tmp_path / "a.pth", DETR, PETS)
    assert torch.equal(after["heads.class_heads.0.weight"], before["heads.class_heads.0.weight"])
    assert "so the class heads start anew" in dict(report.rows)["classes"]
    assert "detfamily convert" in dict(report.rows)["classes"]


@pytest.mark.parametrize(("queries", "words"), [(5, "the first 5 of 7"), (9, "the first 7 of 7, 2 new")])
@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (DETR, ["pos"]),
        (PLAIN, ["pos", "content"]),
        (DAB_DEFORMABLE, ["content", "reference.center_logit", "reference.size_logit"]),
    ],
)
def test_as_many_queries_go_over_as_both_have(
    tmp_path: Path, overrides: list[str], keys: list[str], queries: int, words: str
) -> None:
    source = write_ours(tmp_path / "a.pt", overrides, FARM)
    before, after, report = start(tmp_path / "a.pt", [*overrides, f"model.num_queries={queries}"], FARM)
    count = min(queries, 7)
    for key in (f"query_source.{one}" for one in keys):
        assert torch.equal(after[key][:count], source[key][:count])
        assert torch.equal(after[key][count:], before[key][count:])
    assert dict(report.rows)["queries"] == words and not report.warnings


def test_norms_that_count_and_norms_that_do_not_fit_each_other(tmp_path: Path) -> None:
    trained = [*PLAIN, "backbone.norm={_target_: torch.nn.BatchNorm2d, _partial_: true}"]
    write_ours(tmp_path / "frozen.pt", PLAIN, FARM)
    write_ours(tmp_path / "trained.pt", trained, FARM)
    _, _, report = start(tmp_path / "frozen.pt", trained, FARM)
    assert not report.warnings
    _, _, report = start(tmp_path / "trained.pt", PLAIN, FARM)
    assert not report.warnings


def test_another_model_is_refused_with_the_overrides_that_fit(tmp_path: Path) -> None:
    write_official(tmp_path / "a.pth", TWO_STAGE)
    with pytest.raises(CheckpointError) as caught:
        start(tmp_path / "a.pth", [*PLAIN, "encoder.num_layers=2"], PETS)
    text = str(caught.value)
    assert "missing: encoder.layers.1." in text and "not in this model: " in text and "init_partial=true" in text
    fits = text.partition("They fit ")[2].partition(". init_partial")[0].split(" ")
    assert {"family=deformable_detr", "decoder=refine", "query_source=proposals", "backbone=resnet18"} <= set(fits)
    cfg = compose("train", [*fits, "backbone.weights=null"])
    detector = build_detector(cfg, PETS.num_classes, pretrained=False)
    config = to_container(with_num_classes(cfg, PETS.num_classes))
    assert not start_from(detector, read_initial(tmp_path / "a.pth"), config, PETS).warnings


def test_another_model_of_ours_is_refused_with_the_settings_that_differ(tmp_path: Path) -> None:
    write_ours(tmp_path / "a.pt", [*PLAIN, "model.ffn_dim=40"], FARM)
    with pytest.raises(CheckpointError, match=r"of another shape: .*linear1.*Settings that differ: .*was 40, now 48"):
        start(tmp_path / "a.pt", PLAIN, FARM)


def test_on_request_what_fits_goes_over_and_the_rest_is_named(tmp_path: Path) -> None:
    source = write_ours(tmp_path / "a.pt", [*PLAIN, "model.ffn_dim=40"], FARM)
    before, after, report = start(tmp_path / "a.pt", [*PLAIN, "decoder=refine"], FARM, partial=True)
    text = " | ".join(report.warnings)
    assert "heads.class_heads.1.weight" in text and "stay as they were drawn" in text
    assert "are skipped for their shape" in text and "decoder.refine was False, now True" in text
    for name in ("neck.levels.0.0.weight", "heads.class_heads.0.weight"):
        assert torch.equal(after[name], source[name])
    for name in ("heads.class_heads.1.weight", "encoder.layers.0.ffn.linear1.weight"):
        assert torch.equal(after[name], before[name])


def test_a_head_of_another_kind_never_passes_for_this_one(tmp_path: Path) -> None:
    """DETR's head has a row of "no object", also where the numbers of rows happen to agree."""
    three = LabelMap((1, 2, 3), ("cow", "cat", "sheep"))
    write_ours(tmp_path / "a.pt", DETR, three)
    focal = [*DETR, "classification=focal", "postprocess=top_k"]
    with pytest.raises(CheckpointError, match="a class head of another kind"):
        start(tmp_path / "a.pt", focal, FARM)
    before, after, _ = start(tmp_path / "a.pt", focal, FARM, partial=True)
    assert torch.equal(after["heads.class_heads.0.weight"], before["heads.class_heads.0.weight"])


def test_a_config_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    state = {"config": {}, "template": {}, "label_map": FARM.state_dict(), "model": {"x": torch.zeros(1)}}
    checkpoint.save(tmp_path / "a.pt", state)
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged: its config has no detector"):
        read_initial(tmp_path / "a.pt")


def test_nothing_that_fits_is_an_error_also_on_request(tmp_path: Path) -> None:
    _, config, cfg = model(DETR, FARM)
    state = {"config": config, "template": OmegaConf.to_container(cfg), "label_map": FARM.state_dict()}
    checkpoint.save(tmp_path / "a.pt", {**state, "model": {"x": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match="do not fit the model"):
        start(tmp_path / "a.pt", DETR, FARM, partial=True)


@pytest.mark.parametrize(
    ("setting", "words"),
    [("position.offset=0.0", "position.offset was -0.5, now 0.0"), ("normalize.std=[1,1,1]", "normalize.std was")],
)
def test_the_same_tensors_that_would_mean_something_else_are_a_warning(
    tmp_path: Path, setting: str, words: str
) -> None:
    write_ours(tmp_path / "a.pt", PLAIN, FARM)
    _, _, report = start(tmp_path / "a.pt", [*PLAIN, setting], FARM)
    assert len(report.warnings) == 1 and words in report.warnings[0]


def test_what_a_file_does_not_tell_is_no_warning(tmp_path: Path) -> None:
    """Official files without settings do not say how many heads: the config does."""
    write_official(tmp_path / "a.pth", [*DETR, "model.num_heads=4"])
    _, _, report = start(tmp_path / "a.pth", [*DETR, "model.num_heads=4"], PETS)
    assert not report.warnings


# -- denoising that comes or goes --------------------------------------------------------------------------------------


def answers(detector: Detector) -> Tensor:
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.zeros(1, 64, 96, dtype=torch.bool), ((64, 96),), ((64, 96),), (0,))
    with torch.inference_mode():
        return detector.eval()(images)["match"].logits


KEPT = [
    (DAB, DN, "zero as before: so is the embedding of "),
    ([*DN, *PATTERNS], [*DAB, *PATTERNS], "as before: the embedding of"),
    (DN_DEFORMABLE, DAB_DEFORMABLE, "as before, with zero in the last channel"),
]


@pytest.mark.parametrize(("source", "target", "words"), KEPT)
def test_denoising_comes_and_goes_and_detections_stay(
    tmp_path: Path, source: list[str], target: list[str], words: str
) -> None:
    write_ours(tmp_path / "a.pt", source, FARM)
    detector, config, _ = model(target, FARM)
    with pytest.raises(CheckpointError, match=r"denoising\.label_embed\.weight.* init_partial=true takes what fits"):
        start_from(detector, read_initial(tmp_path / "a.pt"), config, FARM)
    report = start_from(detector, read_initial(tmp_path / "a.pt"), config, FARM, partial=True)
    assert dict(report.rows)["content"].startswith(words)
    assert any("denoising.label_embed.weight" in one for one in report.warnings)
    wanted = answers(model(source, FARM, seed=1)[0])
    torch.testing.assert_close(answers(detector), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), [("cdn", "none"), ("none", "cdn")])
def test_proposals_bring_their_content_with_and_without_denoising(tmp_path: Path, source: str, target: str) -> None:
    pure = [*DINO, "query_source.content=memory"]
    write_ours(tmp_path / "a.pt", [*pure, f"denoising={source}"], FARM)
    before, after, report = start(tmp_path / "a.pt", [*pure, f"denoising={target}"], FARM, partial=True)
    assert "content" not in dict(report.rows) and not any("content" in one for one in report.warnings)
    assert any("denoising.label_embed.weight" in one for one in report.warnings)
    if target == "cdn":
        assert torch.equal(after["denoising.label_embed.weight"], before["denoising.label_embed.weight"])


LOST = [
    (DN, DAB, 'content is no longer the embedding of "unknown"'),
    (DAB_DEFORMABLE, DN_DEFORMABLE, "content goes over without the last channel"),
]


@pytest.mark.parametrize(("source", "target", "words"), LOST)
def test_what_denoising_cannot_keep_is_a_warning(
    tmp_path: Path, source: list[str], target: list[str], words: str
) -> None:
    weights = write_ours(tmp_path / "a.pt", source, FARM)
    _, after, report = start(tmp_path / "a.pt", target, FARM, partial=True)
    assert any(words in one for one in report.warnings), report.warnings
    assert "content" not in dict(report.rows)
    key = "query_source.reference.center_logit"
    assert torch.equal(after[key], weights[key])
    if "query_source.content" in after:
        assert torch.equal(after["query_source.content"], weights["query_source.content"][:, :-1])


def test_how_copies_were_noised_is_no_other_model(tmp_path: Path) -> None:
    write_ours(tmp_path / "a.pt", [*DN, "denoising.num_groups=2", "denoising.center_noise=1.0"], FARM)
    assert not start(tmp_path / "a.pt", [*DN, "query_source.reference.freeze_centers=true"], FARM)[2].warnings


def test_what_settings_would_tell_is_not_held_against_a_file_without_them(tmp_path: Path) -> None:
    chosen = [*DAB, "position.temperature=30", "ffn.activation._target_=torch.nn.GELU"]
    write_official(tmp_path / "a.pth", chosen)
    assert not start(tmp_path / "a.pth", chosen, PETS)[2].warnings
    _, _, report = start(tmp_path / "a.pth", [*chosen, "position.offset=0.5"], PETS)
    assert len(report.warnings) == 1 and "position.offset was 0.0, now 0.5" in report.warnings[0]
