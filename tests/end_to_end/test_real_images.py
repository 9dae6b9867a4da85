"""Both families on real COCO images, where shared/data/coco_mini lies beside the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detfamily.cli import main

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_mini"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no real images: put coco_mini at ../shared/data/coco_mini")

SHORT = [
    "model.embed_dim=32",
    "model.num_heads=4",
    "model.ffn_dim=32",
    "model.num_queries=30",
    "encoder.num_layers=1",
    "decoder.num_layers=2",
    "augmentation.short_sides=[96,128]",
    "augmentation.max_size=160",
    "augmentation.crop_short_sides=[100]",
    "augmentation.crop_sizes=[64,96]",
    "augmentation.test_short_side=96",
    "data.limit_train=6",
    "data.limit_val=3",
    "schedule.epochs=1",
    "drop_epochs=[]",
    "schedule.total_batch_size=2",
    "runtime.num_workers=0",
    "evaluation.pictures=3",
]


@pytest.mark.parametrize("backbone", [["backbone=small"], ["backbone=resnet50", "backbone.weights=null"]])
@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
def test_trains_and_evaluates(family: str, backbone: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = ["data=coco_mini", f"data.root={DATA}"]
    assert main(["train", f"family={family}", *backbone, *data, *SHORT, f"output_dir={run}"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and rows[0]["images_seen"] == 6 and rows[0]["loss"] > 0 and 0 <= rows[0]["AP"] <= 1
    results = json.loads((run / "results_val.json").read_text())
    annotations = json.loads((DATA / "annotations/instances_val2017.json").read_text())
    assert {row["category_id"] for row in results} <= {one["id"] for one in annotations["categories"]}
    assert len({row["image_id"] for row in results}) == 3
