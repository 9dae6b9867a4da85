"""A table on a scale: what the scale changes, what it leaves, and what makes two runs the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from detfamily.config import compose, configs_dir, to_container
from detfamily.config.containers import value_at, walk
from detfamily.config.registry import read_yaml
from detfamily.errors import ConfigError
from detfamily.experiments.scale import LONGEST, identity, scales, variants
from detfamily.experiments.table import read_table

TABLES = Path(__file__).resolve().parents[2] / "experiments"


def of(name: str, scale: str = "mini", *further: str, label: str | None = None):
    """The rows of a table, or of one that has many, a single row beside the baseline."""
    table = read_table(TABLES / f"{name}.yaml")
    rows = tuple(row for row in table.rows if label is None or row.label in (label, table.baseline))
    return variants(replace(table, rows=rows), scale, further)


def test_the_published_scale_changes_nothing_but_the_data():
    found = of("deformable_detr/variants", "coco", "data.root=/data/coco")
    plain = compose("train", ["experiment=deformable_detr_r50", "data.root=/data/coco"])
    assert found["plain"].identity == identity(plain)
    assert found["two-stage"].overrides == (
        "experiment=deformable_detr_r50",
        "+scale=coco",
        "decoder=refine",
        "query_source=proposals",
        "data.root=/data/coco",
    )


def test_what_a_table_varies_stays_as_published():
    depth = of("detr/encoder_depth")
    assert [one.config["encoder"]["num_layers"] for one in depth.values()] == [0, 3, 6, 12]
    assert of("detr/ffn")["with"].config["encoder"]["num_layers"] < 6
    layers = of("detr/decoder_layers")
    assert {one.config["decoder"]["num_layers"] for one in layers.values()} == {6}
    assert layers["layer 1"].overrides == ("postprocess.layer=0",)


def test_lengths_keep_their_ratio_up_to_a_limit():
    images = {label: one.images for label, one in of("deformable_detr/epochs").items()}
    base = images["50 epochs"]
    assert base >= 20_000
    assert [images[label] / base for label in images] == [1, 2, 3]
    against = of("deformable_detr/against_detr")
    assert against["DETR, 500 epochs"].images == LONGEST * base
    assert against["DETR, 500 epochs"].remark == "3 times the length of the baseline instead of 10 times"
    assert not against["DETR-DC5, 50 epochs"].remark
    assert of("deformable_detr/epochs", "mini", "schedule.epochs=1")["150 epochs"].images == base / 10


def test_what_a_recipe_says_of_a_backbone_goes_with_it():
    label = "DINO Swin-L 36 epochs K=0"
    found = of("co_detr/heads", label=label)[label]
    assert compose("train", ["experiment=dino_swin_l_5scale_36ep", "data.root=."]).backbone.drop_path == 0.2
    assert found.config["backbone"].keys() == {"_target_", "stem_width", "widths", "stages"}
    whole = of("co_detr/heads", "coco", "data.root=.", label=label)[label]
    assert whole.config["backbone"]["drop_path"] == 0.2
    assert whole.overrides == ("experiment=dino_swin_l_5scale_36ep", "+scale=coco", "data.root=.")


def test_rows_that_need_more_than_the_scale_has_bring_the_whole_table_along():
    assert {one.config["backbone"]["_target_"].rpartition(".")[2] for one in of("deformable_detr/scales").values()} == {
        "ResNet"
    }
    sizes = {max(one.config["augmentation"]["short_sides"]) for one in of("detr/details").values()}
    assert sizes.pop() < 200 and not sizes


def test_identity_is_what_decides_the_result():
    base = ["experiment=deformable_detr_r50", "+scale=mini"]
    first = identity(compose("train", base))
    for same in (
        ["seed=5", "output_dir=elsewhere", "resume=auto", "name=other"],
        ["runtime.threads=1", "runtime.num_workers=0", "tracking.log_every=7"],
    ):
        assert identity(compose("train", [*base, *same])) == first
    others = [identity(compose("train", [*base, one])) for one in ("optimizer.lr=1e-4", "data.seed=3", "neck=fpn")]
    assert len({first, *others}) == 4


@pytest.mark.parametrize("name", scales())
def test_a_scale_only_sets_what_there_is(name):
    body = {key: value for key, value in read_yaml(configs_dir() / f"scale/{name}.yaml").items() if key != "defaults"}
    groups = ["backbone=small", "data=shapes", "augmentation=detr", "schedule=cosine"]
    cfg = to_container(compose("train", ["experiment=deformable_detr_r50", *groups]))
    for key, value in walk(body):
        if not isinstance(value, dict):
            above = value_at(cfg, key[:-1])
            assert key[-1] in above if isinstance(above, dict) else isinstance(above, list), key


def test_mistakes_are_named(table):
    with pytest.raises(ConfigError, match="no scale 'minni': did you mean 'mini'"):
        variants(table, "minni")
    with pytest.raises(ConfigError, match=r"table.yaml, row 'plain': .*did you mean"):
        variants(table, "mini", ["optimizer.lrr=1"])
    with pytest.raises(ConfigError, match="data.root"):
        variants(table, "coco")
