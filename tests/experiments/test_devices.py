"""What a run is charged for."""

from __future__ import annotations

import pytest

from detfamily.experiments import devices
from detfamily.experiments.devices import Devices, devices_for, places, spent_until_now, visible
from detfamily.experiments.launchers.base import Order


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(devices, "_names", lambda: ("NVIDIA H200", "NVIDIA L4"))


def test_gpus_are_those_that_the_environment_shows(gpus, tmp_path):
    order = Order(tmp_path, (), gpus=0.5)
    assert devices_for(order, {}) == Devices("1 x NVIDIA H200", 0.5, 0)
    assert devices_for(order, {"CUDA_VISIBLE_DEVICES": "1"}).words == "1 x NVIDIA L4"
    assert visible({"CUDA_VISIBLE_DEVICES": ""}) == [] and visible({"CUDA_VISIBLE_DEVICES": "1,0"})[0] == "NVIDIA L4"
    assert places({}) == ["0", "1"] and places({"CUDA_VISIBLE_DEVICES": "GPU-5a, 1"}) == ["GPU-5a", "1"]
    cpu = devices_for(Order(tmp_path, (), device="cpu", threads=2), {})
    assert cpu == Devices("2 threads of CPU", 0.0, 2)


def test_without_gpus_it_is_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_names", lambda: ())
    assert devices_for(Order(tmp_path, ()), {"OMP_NUM_THREADS": "1"}).words == "1 thread of CPU"
    assert places({"CUDA_VISIBLE_DEVICES": "0"}) == []


def test_the_cost_of_all_parts_is_added():
    first = Devices("", 0.5, 0).spent({}, 1800)
    assert first == {"seconds": 1800, "gpu_hours": 0.25, "core_hours": None}
    second = Devices("", 0, 4).spent(first, 900)
    assert second == {"seconds": 2700, "gpu_hours": 0.25, "core_hours": 1.0}
    # A part whose end nobody saw costs as much an hour as it did when it started.
    assert spent_until_now({**first, "gpus": 1.0, "cores": 0}, 3600)["gpu_hours"] == 1.25
