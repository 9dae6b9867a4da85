"""A real training with every tracker: what each has is what the run's files have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from detfamily.tracking.files import read_rows

ROOT = Path(__file__).resolve().parents[2]
TINY = """
family=deformable_detr backbone=small backbone.stem_width=8 backbone.widths=[8,16,16,16] data=shapes
data.train_size=12 data.val_size=5 data.image_size=96 data.sides=[16,48] data.objects=[1,4] model.embed_dim=32
model.num_heads=4 model.ffn_dim=32 model.num_queries=10 encoder.num_layers=1 decoder.num_layers=2 drop_epochs=[]
schedule.epochs=2 schedule.total_batch_size=4 runtime.num_workers=0 runtime.threads=1 runtime.device=cpu
evaluation.pictures=2 tracking=all tracking.wandb.mode=offline tracking.log_every=1
""".split()


def test_every_tracker_has_what_the_files_have(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "detfamily", "train", *TINY, f"data.root={tmp_path}", f"output_dir={folder}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HOME": str(tmp_path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "wandb sync" in done.stdout, done.stdout + done.stderr

    steps, epochs = read_rows(folder / "train_steps.jsonl"), read_rows(folder / "metrics.jsonl")
    assert len(steps) == 6 and len(epochs) == 2 and "AP/circle" in epochs[0]

    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    words = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(log)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120).stdout.splitlines()
    rows = [one["history"]["item"] for one in map(json.loads, found) if one["type"] == "history"]
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
    assert [row for row in rows if "epoch" in row] == epochs
    assert [row for row in rows if "train/step" in row] == [
        {f"train/{name}": value for name, value in row.items()} for row in steps
    ]
    images = {path.name.split("_")[0]: path.read_bytes() for path in log.parent.glob("files/media/images/*.png")}
    assert images == {name: (folder / f"{name}.png").read_bytes() for name in ("curves", "predictions")}

    for place, prefix, axis, rows in (("steps", "train/", "step", steps), ("epochs", "", "epoch", epochs)):
        events = accumulator.EventAccumulator(str(folder / "tensorboard" / place)).Reload()
        names = {name for row in rows for name in row} - {"step", "epoch"}
        assert {prefix + name for name in names} == set(events.Tags()["scalars"])
        for name in names:
            drawn = [(one.step, one.value) for one in events.Scalars(prefix + name)]
            assert drawn == [(row[axis], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
    assert set(events.Tags()["images"]) == {"curves", "predictions"}
