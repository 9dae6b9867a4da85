from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import record_function


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "benchmark_models.py"
    spec = importlib.util.spec_from_file_location("benchmark_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def test_peak_is_the_highest_sum_on_the_way(script: ModuleType) -> None:
    assert script.peak([4, 3, -5, 4, -6]) == 7
    assert script.peak([-3, 2]) == 0


def test_ratios_are_taken_round_by_round(script: ModuleType) -> None:
    own = script.Figures(1, 1, ms=[1.0, 10.0, 2.0], cpu_ms=[1.0, 1.0, 1.0])
    other = script.Figures(1, 1, ms=[2.0, 30.0, 4.0], cpu_ms=[5.0, 4.0, 6.0])
    assert script.ratios({"ours": own, "theirs": other}) == (2.0, 5.0)
    assert script.ratios({"ours": own}) is None


@pytest.mark.parametrize("task", ["inference", "train"])
def test_a_rival_runs_by_turns_and_is_measured(script: ModuleType, task: str) -> None:
    def side(name: str, layers: int) -> object:
        model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(layers)))

        def loss(pixels: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
            assert labels.shape == boxes.shape[:2]
            low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
            assert (low > -1e-6).all() and (high < 1 + 1e-6).all()
            answer = model(pixels)
            with record_function(script.CRITERION):
                assert answer.square().mean().item() > 0  # asks the device
                return answer.square().mean()

        return script.Side(name, model, model, loss)

    one = script.Task(task, 2, (32, 40), "fp32", torch.device("cpu"))
    figures = script.compare(one, [side("small", 1), side("large", 8)], rounds=2)
    small, large = figures["small"], figures["large"]
    assert (small.parameters, large.parameters) == (84, 672)
    assert len(small.ms) == len(large.cpu_ms) == 2
    assert small.aten_calls < large.aten_calls
    training = task == "train"
    assert small.host_reads == large.host_reads == (3 if training else 0)  # two asserts above, one item
    assert (0 < small.criterion_calls < small.aten_calls) == training
    assert small.criterion_calls == large.criterion_calls
    assert small.peak_mib >= 2 * 3 * 32 * 40 * 4 / 2**20  # an output at least
    assert sum(large.shares.values()) == pytest.approx(1)


def test_rivals_that_there_are_not(script: ModuleType) -> None:
    for name, message in {"nowhere": "expected 'transformers' or module:function", "os:nothing": "nothing"}.items():
        with pytest.raises(SystemExit, match=message):
            script.find_rival(name)
