from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from detfamily.sweeps.plots import plot_trials
from detfamily.sweeps.report import best, table, write_report
from detfamily.sweeps.sweep import read_sweep
from detfamily.sweeps.trial import Trial


def trial(number, state, value, lr=0.01, decoder="plain", error=None):
    return Trial(number, {"optimizer.lr": lr, "decoder": decoder}, state, value, 4, 61.4, error)


TRIALS = [
    trial(0, "finished", 0.25, lr=0.00123456),
    trial(1, "pruned", 0.5, decoder="refine"),
    trial(2, "finished", 0.375),
    trial(3, "failed", None, error="exit status 3; a | b"),
]


def test_the_table_has_a_line_for_each_trial(sweep):
    assert table(sweep, TRIALS).splitlines() == [
        "| trial | optimizer.lr | decoder | AP | state | epochs | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 0 | 0.001235 | plain | 25.0 | finished | 4 | 61 |",
        "| 1 | 0.01 | refine | 50.0 | pruned | 4 | 61 |",
        "| 2 | 0.01 | plain | **37.5** | finished | 4 | 61 |",
        "| 3 | 0.01 | plain |  | failed: exit status 3; a \\| b | 4 | 61 |",
    ]


def test_the_best_trial_is_a_finished_one(sweep, write_sweep):
    assert best(sweep, TRIALS).number == 2
    assert best(read_sweep(write_sweep(metric="loss")), TRIALS).number == 0
    assert best(sweep, TRIALS[1::2]) is None


def test_the_report_says_how_to_train_the_best_one(sweep, tmp_path):
    recipe = SimpleNamespace(sweep=sweep, words=("experiment=deformable_detr_r50", "+scale=mini", "tracking=wandb"))
    text = write_report(recipe, TRIALS[::-1], "optuna", tmp_path).read_text()
    assert text.index("| 0 |") < text.index("| 3 |") and "![AP against each parameter](trials.png)" in text
    assert "detfamily train experiment=deformable_detr_r50 +scale=mini optimizer.lr=0.01 decoder=plain\n" in text
    assert "Best: trial 2, AP 37.5" in text and "method optuna, seed 0, maximizes AP" in text
    assert Image.open(tmp_path / "trials.png").width > 300


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_picture_has_a_panel_for_each_parameter(write_sweep, tmp_path, count, monkeypatch):
    drawn = []
    monkeypatch.setattr("detfamily.sweeps.plots.write_atomically", lambda path, fill: drawn.append(fill.__closure__))
    parameters = {f"model.field{index}": {"uniform": [0.0, 1.0]} for index in range(count)}
    sweep = read_sweep(write_sweep(parameters=parameters))
    one = Trial(0, dict.fromkeys(parameters, 0.5), "finished", 0.25, 4, 1.0)
    assert plot_trials(sweep, [one], tmp_path / "a.png")
    (figure,) = [cell.cell_contents for cell in drawn[0]]
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in panels] == list(parameters)
    assert [axes.collections[0].get_offsets().tolist() for axes in panels] == [[[0.5, 25.0]]] * count


def test_without_a_value_there_is_no_picture(sweep, tmp_path):
    assert not plot_trials(sweep, TRIALS[3:], tmp_path / "a.png") and not (tmp_path / "a.png").exists()
