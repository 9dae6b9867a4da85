"""TensorBoard's files, read back by TensorBoard."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from detfamily.tracking.files import FilesTracker, read_rows
from detfamily.tracking.tensorboard import TensorBoardTracker
from detfamily.tracking.tracker import RunInfo
from detfamily.tracking.trackers import Trackers

CONFIG = {"seed": 7, "model": {"_target_": "a.B", "name": "# no heading"}}


def read(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def scalars(folder, tag):
    return [(one.step, pytest.approx(one.value)) for one in read(folder).Scalars(tag)]


def log(folder, steps, resumed_at=None, epochs_done=0, loss=1.0, finish=True):
    """Ten steps an epoch, logged every fifth."""
    trackers = Trackers([TensorBoardTracker()])
    trackers.start(RunInfo("toy", folder, CONFIG, 4, resumed_at, epochs_done))
    for step in steps:
        trackers.log_step({"loss": loss / step, "match/1/giou": 0.5}, step)
        if step % 10 == 0:
            trackers.log_epoch({"loss": loss, "AP": step / 100, "AP/traffic light": 0.25}, step // 10, step)
    if finish:
        trackers.finish()
    return trackers


def test_scalars_pictures_and_config_are_there(tmp_path):
    trackers = log(tmp_path, range(5, 25, 5), finish=False)
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "curves.png")
    trackers.log_image("curves", tmp_path / "curves.png", 20)
    trackers.finish()

    steps, epochs = tmp_path / "tensorboard" / "steps", tmp_path / "tensorboard" / "epochs"
    assert scalars(steps, "train/loss") == [(5, 1 / 5), (10, 1 / 10), (15, 1 / 15), (20, 1 / 20)]
    assert scalars(epochs, "AP") == [(1, 0.1), (2, 0.2)]
    assert scalars(epochs, "AP/traffic light") == [(1, 0.25), (2, 0.25)]
    assert sorted(read(steps).Tags()["scalars"]) == ["train/loss", "train/match/1/giou"]

    (image,) = read(epochs).Images("curves")
    (tmp_path / "back.png").write_bytes(image.encoded_image_string)
    same = np.array_equal(
        np.asarray(Image.open(tmp_path / "back.png")), np.asarray(Image.open(tmp_path / "curves.png"))
    )
    assert image.step == 2 and same
    (text,) = read(epochs).Tensors("config/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert all(line.startswith("    ") for line in lines)
    assert yaml.safe_load("\n".join(line[4:] for line in lines)) == CONFIG


def test_a_resumed_run_makes_void_what_comes_again(tmp_path):
    log(tmp_path, range(5, 40, 5))  # up to step 35, in the fourth epoch
    log(tmp_path, range(25, 45, 5), resumed_at=20, epochs_done=1, loss=9.0)  # killed in the evaluation of the second
    log_epochs = scalars(tmp_path / "tensorboard" / "epochs", "loss")
    steps = scalars(tmp_path / "tensorboard" / "steps", "train/loss")
    assert steps == [(step, (1.0 if step <= 20 else 9.0) / step) for step in range(5, 45, 5)]
    assert log_epochs == [(1, 1.0), (3, 9.0), (4, 9.0)]


def test_a_missing_tensorboard_is_one_warning_with_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trackers = Trackers([FilesTracker(), TensorBoardTracker()])
    trackers.start(RunInfo("toy", tmp_path, CONFIG, 4))
    trackers.log_epoch({"loss": 1.0}, 1, 10)
    trackers.finish()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: tensorboard: ImportError") and "pip install 'detfamily[tensorboard]'" in line
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file, where the folder should be")
    trackers = log(tmp_path, range(5, 25, 5))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: tensorboard: ") and trackers.members


def test_patience_must_be_positive():
    with pytest.raises(ValueError, match="patience is 0"):
        TensorBoardTracker(patience=0)
