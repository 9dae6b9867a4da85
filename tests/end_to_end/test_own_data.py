"""What a user with a data set of their own does: train, evaluate and score results, by overrides alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detfamily.cli import main

CATEGORIES = [{"id": 90, "name": "kite"}, {"id": 7, "name": "boat"}, {"id": 21, "name": "cow"}]
TINY = [
    "backbone=small",
    "model.embed_dim=32",
    "model.num_heads=4",
    "model.ffn_dim=32",
    "model.num_queries=12",
    "encoder.num_layers=1",
    "decoder.num_layers=2",
    "augmentation=none",
    "schedule.total_batch_size=2",
    "runtime.num_workers=0",
    "evaluation.pictures=2",
]


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """Eight images in subfolders, with three classes whose ids have gaps and are not in order."""
    root = tmp_path / "my data"
    rng = np.random.default_rng(0)
    for split, count in (("training", 6), ("holdout", 2)):
        images, annotations = [], []
        for index in range(count):
            name = f"{'ab'[index % 2]}/picture_{index}.jpg"
            file = root / split / name
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 80, (64, 96, 3), dtype=np.uint8)
            x, y, w, h = 10 + 8 * index, 12, 24, 20
            pixels[y : y + h, x : x + w] = (200, 60 * (index % 3), 90)
            Image.fromarray(pixels).save(file)
            images.append({"id": 100 + index, "file_name": name, "width": 96, "height": 64})
            if index != 1:  # one image without objects
                annotation = {"id": index + 1, "image_id": 100 + index, "category_id": (7, 21, 90)[index % 3]}
                annotations.append({**annotation, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    "family", [["family=detr"], ["family=deformable_detr", "decoder=refine", "query_source=proposals"]]
)
def test_trains_evaluates_and_scores_by_overrides_alone(
    family: list[str], own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [
        "data=coco",
        f"data.root={own_data}",
        "data.train_images=training",
        "data.train_annotations=training.json",
        "data.val_images=holdout",
        "data.val_annotations=holdout.json",
    ]
    run = tmp_path / "run"
    assert main(["train", *family, *data, *TINY, "schedule.epochs=1", "drop_epochs=[]", f"output_dir={run}"]) == 0
    printed = capsys.readouterr().out
    assert "boat" in printed and "Average Precision" in printed

    saved = torch.load(run / "last.pt", weights_only=True)
    assert saved["label_map"]["category_ids"] == [7, 21, 90]
    assert saved["label_map"]["names"] == ["boat", "cow", "kite"]
    assert saved["config"]["model"]["num_classes"] == 3
    head = next(t for name, t in saved["model"].items() if name.endswith("class_heads.0.weight"))
    assert head.shape[0] == (4 if "detr" in family[0].split("=")[1][:4] else 3)
    for name in ("config.yaml", "metrics.jsonl", "metrics.csv", "curves.png", "predictions.png", "best.pt"):
        assert (run / name).stat().st_size > 0, name

    again = tmp_path / "again"
    assert main(["evaluate", f"checkpoint={run / 'last.pt'}", f"output_dir={again}"]) == 0
    trained, evaluated = (json.loads((folder / "metrics.json").read_text()) for folder in (run, again))
    assert evaluated == pytest.approx(trained)

    results = json.loads((again / "results_val.json").read_text())
    assert {row["category_id"] for row in results} <= {7, 21, 90}
    assert {row["image_id"] for row in results} <= {100, 101}
    scored = tmp_path / "scored"
    file = again / "results_val.json"
    assert main(["evaluate", f"results={file}", *data, f"output_dir={scored}"]) == 0
    numbers = json.loads((scored / "metrics.json").read_text())
    assert numbers == pytest.approx({name: trained[name] for name in numbers})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("bacbone=small", "backbone"),
        ("backbone=smal", "small"),
        ("optimizer.lrr=1", "lr"),
        ("runtime.precision=bf17", "bf16"),
        ("model.num_heads=8.5", "model.num_heads"),
        ("decoder.num_layers=two", "decoder.num_layers"),
        ("+encoder.depth=3", "num_layers"),
        ("data.root=/no/such/place", "/no/such/place"),
        ("model.num_heads=7", "embed_dim"),
        ("query_source=proposals", "decoder=refine"),
        ("query_source=learned", "reference points"),
        ("model.num_levels=1", "model.num_levels"),
        ("model.num_classes=5", "model.num_classes"),
        ("postprocess.layer=6", "postprocess.layer"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once_with_a_way_out(
    override: str, words: str, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"data.root={own_data}", "data.train_images=training", "data.train_annotations=training.json"]
    data += ["data=coco", "data.val_images=holdout", "data.val_annotations=holdout.json"]
    run = tmp_path / "run"
    small = [one for one in TINY if one.partition("=")[0] != override.partition("=")[0]]
    assert main(["train", *data, *small, f"output_dir={run}", override]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not run.exists()
