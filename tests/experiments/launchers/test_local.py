"""Processes of this machine: which GPU each one gets, and what it pays for."""

from __future__ import annotations

import json
import sys
import time

import pytest

from detfamily.errors import ConfigError
from detfamily.experiments import devices
from detfamily.experiments.hold import Hold
from detfamily.experiments.launchers.base import Order
from detfamily.experiments.launchers.local import LocalLauncher, LocalOptions
from detfamily.experiments.notes import read_state

SHOW = (
    "import json, os; "
    "found = [os.environ.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'CUDA_DEVICE_ORDER')]; "
    "json.dump(found, open('metrics.json', 'w'))"
)


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(devices, "_names", lambda: ("NVIDIA H200", "NVIDIA H200"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def start(launcher, folder):
    folder.mkdir()
    command = (sys.executable, "-Sc", f"import os; os.chdir({str(folder)!r}); {SHOW}")
    return launcher.start(Order(folder, command), Hold.take(folder))


def end(job):
    until = time.monotonic() + 60
    while not job.poll():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert job.close().error is None
    return json.loads((job.folder / "metrics.json").read_text())


def test_four_at_once_get_two_gpus_in_turn(gpus, tmp_path):
    launcher = LocalLauncher(LocalOptions(), jobs=4)
    jobs = [start(launcher, tmp_path / str(number)) for number in range(4)]
    assert [end(job)[0] for job in jobs] == ["0", "1", "0", "1"]
    state = read_state(tmp_path / "0")
    assert state["devices"] == "1 x NVIDIA H200" and state["gpus"] == 0.5 and state["core_hours"] is None
    assert state["gpu_hours"] == pytest.approx(0.5 * state["seconds"] / 3600, abs=2e-6)
    # The GPU that is free again is the next one's.
    first = start(launcher, tmp_path / "4")
    other = start(launcher, tmp_path / "5")
    assert end(other)[0] == "1"
    third = start(launcher, tmp_path / "6")
    assert end(third)[0] == "1" and end(first) == ["0", "PCI_BUS_ID"]


def test_only_gpus_that_the_user_allows_are_given(gpus, tmp_path):
    assert LocalLauncher(LocalOptions(), 4, environment={"CUDA_VISIBLE_DEVICES": "1"}).places == ["1"]
    assert LocalLauncher(LocalOptions(), 4, environment={"CUDA_VISIBLE_DEVICES": ""}).places == []
    assert LocalLauncher(LocalOptions(), 4, device="cpu").places == []


def test_a_run_on_several_gpus_has_a_process_for_each(gpus):
    launcher = LocalLauncher(LocalOptions(gpus=2))
    assert launcher.processes == 2 and launcher.share == 1
    with pytest.raises(ConfigError, match="number of GPUs here is 2; expected at least 3 .local.gpus=3."):
        LocalLauncher(LocalOptions(gpus=3))


def test_without_gpus_the_environment_stays_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_names", lambda: ())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    job = start(LocalLauncher(LocalOptions(), jobs=2), tmp_path / "run")
    assert end(job)[0] == "7"
    state = read_state(tmp_path / "run")
    assert state["gpu_hours"] is None and "of CPU" in state["devices"]
