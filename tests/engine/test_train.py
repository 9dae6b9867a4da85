"""The loop from end to end, with the real detector, data and evaluation at their smallest."""

from __future__ import annotations

import copy
import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from detfamily.config import compose, to_container
from detfamily.criterion import Losses
from detfamily.engine import checkpoint, optim
from detfamily.engine import train as loop
from detfamily.engine.evaluate import evaluate
from detfamily.engine.train import Trainer, train
from detfamily.errors import CheckpointError, ConfigError, NonFiniteError, OutputError
from detfamily.tracking.files import read_rows


def leaves(value, prefix=""):
    """All values of nested containers, by path."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{prefix}/{key}")
    elif isinstance(value, list | tuple):
        for key, one in enumerate(value):
            yield from leaves(one, f"{prefix}/{key}")
    else:
        yield prefix, value


def assert_same_training_state(one, other):
    for key in ("model", "ema", "optimizer", "epoch", "steps_done", "step", "images_seen", "rng", "best", "meter"):
        first, second = dict(leaves(one[key])), dict(leaves(other[key]))
        assert first.keys() == second.keys()
        for path, value in first.items():
            same = torch.equal(value, second[path]) if isinstance(value, torch.Tensor) else value == second[path]
            assert same, f"{key}{path} differs"


@pytest.fixture
def gradients(monkeypatch):
    """The averaged gradients of every step, before the update."""
    seen = []

    def record(optimizer, finite):
        groups = optimizer.param_groups
        seen.append([parameter.grad.clone() for group in groups for parameter in group["params"]])
        optim.gated_step(optimizer, finite)

    monkeypatch.setattr(loop, "gated_step", record)
    return seen


def test_a_run_leaves_everything_that_it_promises(config, tmp_path, capsys):
    folder = tmp_path / "run"
    numbers = train(config("tracking.log_every=2", "checkpoint.every=2", "optimizer.ema_decay=0.9"))
    out = capsys.readouterr().out

    assert numbers["images_seen"] == 24 and 0 <= numbers["AP"] <= 1 and numbers["loss"] > 0
    made = {path.name for path in folder.iterdir()}
    assert made == {
        "config.yaml",
        *("last.pt", "best.pt", "epoch_0002.pt"),
        *("metrics.jsonl", "metrics.csv", "train_steps.jsonl", "metrics.json", "results_val.json"),
        *("curves.png", "predictions.png"),
    }
    rows = read_rows(folder / "metrics.jsonl")
    assert [(row["epoch"], row["step"], row["images_seen"]) for row in rows] == [(1, 3, 12), (2, 6, 24)]
    assert rows[1]["AP"] == numbers["AP"] and "match/1/giou" in rows[0] and "AP/circle" in rows[0]
    assert [row["step"] for row in read_rows(folder / "train_steps.jsonl")] == [2, 4, 6]
    with (folder / "metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in rows]
    assert json.loads((folder / "metrics.json").read_text())["AP50"] == numbers["AP50"]

    state = checkpoint.load(folder / "last.pt")
    assert yaml.safe_load((folder / "config.yaml").read_text()) == state["config"]
    assert state["config"]["model"]["num_classes"] == 8 and state["label_map"]["names"][0] == "circle"
    assert state["ema"]["updates"] == 6 and state["step"] == 6

    lines = out.splitlines()
    assert "2 epochs x 3 steps = 6 steps, 24 images" in out and "warning: 6 optimiser steps are few" in out
    assert [line[:9] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert sum(line.startswith(" Average") for line in lines) == 12 and "(evaluated in batches of 4)" in lines
    assert lines[-1].startswith(f"results     {folder}")


def test_the_loss_falls(config, tmp_path):
    train(config("schedule.epochs=8", "optimizer.lr=2e-3", "evaluation.every=8", "evaluation.pictures=0"))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert ["AP" in row for row in rows] == [False] * 7 + [True]


def test_another_run_is_not_overwritten(config):
    train(config("schedule.epochs=1"))
    with pytest.raises(ConfigError, match="holds a run already"):
        train(config("schedule.epochs=1"))


RESUMABLE = ("optimizer.ema_decay=0.9", "model.dropout=0.2", "tracking.log_every=1", "evaluation.pictures=0")


@pytest.fixture
def undisturbed(config, tmp_path):
    train(config(*RESUMABLE, f"output_dir={tmp_path / 'whole'}"))
    return checkpoint.load(tmp_path / "whole" / "last.pt")


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_an_interrupted_run_ends_as_an_undisturbed_one_bit_for_bit(
    config, tmp_path, monkeypatch, capsys, undisturbed, stop_after
):
    folder = tmp_path / "run"
    step = Trainer.train_step

    def interrupted(trainer, batches):
        if trainer.step + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        step(trainer, batches)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(Trainer, "train_step", interrupted)
        train(config(*RESUMABLE))
    assert caught.value.code == 128 + signal.SIGTERM
    assert f"stopped after step {stop_after} of 6; go on with resume=auto" in capsys.readouterr().out
    assert checkpoint.load(folder / "last.pt")["step"] == stop_after

    train(config(*RESUMABLE, "resume=auto"))
    assert_same_training_state(checkpoint.load(folder / "last.pt"), undisturbed)
    for name in ("metrics.jsonl", "train_steps.jsonl"):
        ours, theirs = (read_rows(tmp_path / which / name) for which in ("run", "whole"))
        clocks = ("seconds", "images_per_second", "seconds_left")
        plain = [[{k: v for k, v in row.items() if k not in clocks} for row in rows] for rows in (ours, theirs)]
        assert plain[0] == plain[1]


def test_a_run_that_was_killed_goes_on_from_its_last_epoch(config, tmp_path, monkeypatch, undisturbed):
    class Killed(BaseException):
        pass

    def killed(trainer, batches):
        raise Killed

    monkeypatch.setattr(Trainer, "evaluate", lambda trainer, real=Trainer.evaluate: real(trainer))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        step = Trainer.train_step
        patch.setattr(Trainer, "train_step", lambda t, b: killed(t, b) if t.step == 4 else step(t, b))
        train(config(*RESUMABLE))
    assert len(read_rows(tmp_path / "run" / "train_steps.jsonl")) == 4
    train(config(*RESUMABLE, "resume=auto"))
    assert_same_training_state(checkpoint.load(tmp_path / "run" / "last.pt"), undisturbed)
    assert [row["step"] for row in read_rows(tmp_path / "run" / "train_steps.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_signal_during_evaluation_loses_nothing(config, tmp_path, monkeypatch, undisturbed):
    evaluate = loop.evaluate_model

    def interrupted(*arguments, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop, "evaluate_model", interrupted)
        train(config(*RESUMABLE))
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["steps_done"]) == (0, 3)
    train(config(*RESUMABLE, "resume=auto"))
    assert_same_training_state(checkpoint.load(tmp_path / "run" / "last.pt"), undisturbed)
    first, second = (read_rows(tmp_path / which / "metrics.jsonl")[0] for which in ("run", "whole"))
    assert first["loss"] == second["loss"] and first["AP"] == second["AP"]


def test_a_finished_run_that_is_resumed_shows_its_results_again(config, tmp_path):
    numbers = train(config("schedule.epochs=1"))
    again = train(config("schedule.epochs=1", "resume=auto"))
    assert again["AP"] == numbers["AP"]
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 1


def test_a_resumed_run_may_be_longer_and_says_so(config, tmp_path, capsys):
    train(config("schedule.epochs=1"))
    numbers = train(config("schedule.epochs=3", f"resume={tmp_path / 'run'}"))
    assert "resumed with another setting: schedule.epochs: 1 in the checkpoint, 3 now" in capsys.readouterr().out
    assert numbers["images_seen"] == 36


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("model.num_queries=12", CheckpointError, "model.num_queries: 10 in the checkpoint, 12 now"),
        ("schedule.total_batch_size=2", CheckpointError, "total_batch_size=4, now it would be 2.*init_from="),
        ("resume=gone.pt", CheckpointError, "no checkpoint gone.pt"),
        ("evaluation.every=0", ConfigError, "evaluation.every is 0"),
        ("runtime.batch_size_per_device=3", ConfigError, "valid values: 1, 2, 4"),
    ],
)
def test_what_cannot_be_resumed_is_refused(config, override, error, words):
    train(config("schedule.epochs=1", "evaluation.pictures=0"))
    with pytest.raises(error, match=words):
        train(config("schedule.epochs=1", "evaluation.pictures=0", "resume=auto", override))


def test_weights_of_another_run_may_be_the_start(config, tmp_path):
    train(config("schedule.epochs=1", "evaluation.pictures=0"))
    source = tmp_path / "run" / "last.pt"
    train(
        config(
            *("schedule.epochs=1", "evaluation.pictures=0", "optimizer.lr=1e-12", "seed=5"),
            *(f"init_from={source}", f"output_dir={tmp_path / 'next'}"),
        )
    )
    before, after = checkpoint.load(source)["model"], checkpoint.load(tmp_path / "next" / "last.pt")["model"]
    for name, value in before.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(after[name], value)


FAMILIES = ("deformable_detr", "detr")

# Frozen norms as in the papers' backbones: norms that are trained see the images of one micro-batch only.
ALIKE = (
    *("backbone=resnet18", "backbone.weights=null", "backbone.frozen_stages=0", "model.dropout=0"),
    *("schedule.images_per_epoch=4", "schedule.epochs=1", "optimizer.clip_norm=null", "optimizer.lr=1e-12"),
    "evaluation.batch_size=1",
)


def alike(tiny, family, folder, *more):
    """One step whose gradients must not depend on how its images are spread; the weights hardly move."""
    own = [one for one in tiny if not one.startswith(("family=", "backbone"))]
    fewer_points = ("optimizer.groups.sampling=null",) if family == "deformable_detr" else ()
    return compose("train", [f"family={family}", *own, *ALIKE, *fewer_points, f"output_dir={folder}", *more])


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_micro_batches_give_the_gradients_of_one_batch(tiny, tmp_path, gradients, family):
    whole = train(alike(tiny, family, tmp_path / "whole"))
    split = train(alike(tiny, family, tmp_path / "split", "runtime.batch_size_per_device=1"))
    assert len(gradients) == 2
    assert_same_gradients(*gradients)
    for name in ("loss", "match/0/l1", "match/1/class", "gradient_norm"):
        assert split[name] == pytest.approx(whole[name], rel=1e-4)


def assert_same_gradients(ours, theirs):
    """Within rounding, measured against the largest gradient of each parameter."""
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * max(1e-3, float(other.abs().max())))


SCRIPT = """
import sys
import torch
from detfamily.config import compose
from detfamily.engine import optim, train as loop
from detfamily.engine.evaluate import evaluate

folder, families, overrides = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
for family in families:
    def record(optimizer, finite):
        if loop.torch.distributed.get_rank() == 1:
            gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
            torch.save(gradients, f"{folder}/{family}.gradients")
        optim.gated_step(optimizer, finite)
    loop.gated_step = record
    own = [one for one in overrides if family == "deformable_detr" or "sampling" not in one]
    loop.train(compose("train", [f"family={family}", *own, f"output_dir={folder}/{family}"]))
    evaluate([f"checkpoint={folder}/{family}/last.pt", f"output_dir={folder}/{family}-two"])
"""


def test_two_processes_are_one_with_twice_the_batch(tiny, tmp_path, gradients):
    """Through torchrun, as users start it: gradients, logged losses, evaluation; and only one of them speaks.

    There are five images to evaluate, so one process has one more than the other.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    own = [one for one in tiny if not one.startswith(("family=", "backbone"))]
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("--redirects=3", f"--log-dir={tmp_path / 'said'}", str(script)),
            *(str(tmp_path), ",".join(FAMILIES), *own, *ALIKE, "optimizer.groups.sampling=null"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    said = {
        path.relative_to(path.parents[1]).as_posix(): path.read_text() for path in (tmp_path / "said").rglob("*.log")
    }
    assert ran.returncode == 0, (ran.stderr[-3000:], said)
    assert said["1/stdout.log"] == said["1/stderr.log"] == ""
    out = said["0/stdout.log"]
    assert "4 = 2 images at once x 2 processes" in out
    for line in ("training ", "epoch 1/1", "evaluating ", "results  "):
        assert sum(text.startswith(line) for text in out.splitlines()) == len(FAMILIES), line
    for family in FAMILIES:
        gradients.clear()
        one = train(alike(tiny, family, tmp_path / f"{family}-one"))
        assert_same_gradients(torch.load(tmp_path / f"{family}.gradients"), gradients[0])
        two = read_rows(tmp_path / family / "metrics.jsonl")[0]
        for name in ("loss", "match/1/giou", "gradient_norm", "AP", "AR100"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
        # The same weights: the same detections and numbers, to the last bit.
        evaluate([f"checkpoint={tmp_path / family / 'last.pt'}", f"output_dir={tmp_path / 'alone'}"])
        for name in ("results_val.json", "metrics.json"):
            alone, both = (json.loads((tmp_path / folder / name).read_text()) for folder in ("alone", f"{family}-two"))
            if name == "results_val.json":
                assert len({row["image_id"] for row in alone}) == 5
                alone, both = (sorted(rows, key=lambda row: sorted(row.items(), key=str)) for rows in (alone, both))
            assert alone == both


@pytest.fixture
def broken_step(monkeypatch):
    """The loss of the second step is NaN; the weights before and after that step are recorded."""
    seen = {}
    forward, step = Trainer.forward, Trainer.train_step

    def broken(trainer, *arguments):
        losses = forward(trainer, *arguments)
        if trainer.step == 1:
            return Losses(losses.total * float("nan"), losses.parts, losses.assignments, losses.ride)
        return losses

    def record(trainer, batches):
        before = [parameter.detach().clone() for parameter in trainer.net.parameters()]
        step(trainer, batches)
        seen[trainer.step] = (before, [parameter.detach().clone() for parameter in trainer.net.parameters()])
        seen.setdefault("images", []).append([i for b in batches for i in b.images.image_ids])

    monkeypatch.setattr(Trainer, "forward", broken)
    monkeypatch.setattr(Trainer, "train_step", record)
    return seen


def same(pair):
    return all(torch.equal(one, other) for one, other in zip(*pair, strict=True))


def test_a_step_that_is_not_finite_is_left_out_and_named(config, tmp_path, capsys, broken_step):
    train(config("runtime.on_non_finite=skip", "schedule.epochs=1"))
    assert [same(broken_step[step]) for step in range(3)] == [False, True, False]
    images = ", ".join(map(str, broken_step["images"][1]))
    assert f"step 2: the loss is not finite (images {images}); the weights were left" in capsys.readouterr().out
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[0]["loss"] > 0


def test_a_step_that_is_not_finite_ends_the_run_with_intact_weights(config, broken_step):
    with pytest.raises(NonFiniteError, match="step 2: the loss is not finite"):
        train(config("schedule.epochs=1"))
    assert same(broken_step[1])
    assert 2 not in broken_step


def test_the_last_step_of_an_epoch_is_looked_at_before_it_is_saved(config, tmp_path, broken_step):
    with pytest.raises(NonFiniteError, match="step 2"):
        train(config("schedule.epochs=1", "schedule.images_per_epoch=8"))
    assert not (tmp_path / "run" / "last.pt").exists()


def planted(monkeypatch, at, plant):
    """Call ``plant`` with the trainer and the batches of a step just before it, and undo what it returns after it."""
    fetch, step = Trainer.fetch, Trainer.train_step
    undo = []

    def broken(trainer, batches):
        found = fetch(trainer, batches)
        return plant(trainer, found, undo) if trainer.step + 1 == at else found

    def repaired(trainer, batches):
        step(trainer, batches)
        while undo:
            undo.pop()()

    monkeypatch.setattr(Trainer, "fetch", broken)
    monkeypatch.setattr(Trainer, "train_step", repaired)


def nan_in_a_weight(trainer, batches, undo):
    """A weight of which the statistics of norms are computed, for good."""
    with torch.no_grad():
        next(trainer.net.backbone.parameters()).view(-1)[0] = float("nan")
    return batches


def nan_in_a_box(trainer, batches, undo):
    boxes = batches[0].targets.boxes.clone()
    boxes[2, 0, 1] = float("nan")
    return [replace(batches[0], targets=replace(batches[0].targets, boxes=boxes)), *batches[1:]]


def infinity_in_a_loss(trainer, batches, undo):
    giou = trainer.criterion.losses["giou"]
    forward, ids = giou.forward, batches[0].targets.image_ids

    def infinite(predictions, targets, *others):
        values = forward(predictions, targets, *others)
        return values + torch.tensor([0.0, float("inf")]) if targets.image_ids == ids else values

    giou.forward = infinite
    return batches


def test_a_broken_weight_ends_the_run_and_what_was_saved_is_intact(config, tmp_path, monkeypatch):
    planted(monkeypatch, 4, nan_in_a_weight)
    with pytest.raises(NonFiniteError) as caught:
        train(config())
    words = str(caught.value)
    assert (
        words.startswith("step 4: the loss is not finite (images ")
        and "; the weights were left as they were. " in words
    )
    assert "The weights are broken: backbone." in words and "(1 NaN of " in words and "the output of backbone." in words
    saved = checkpoint.load(tmp_path / "run" / "last.pt")
    assert saved["step"] == 3 and all(value.isfinite().all() for value in saved["model"].values())


def test_a_weight_that_stays_broken_is_not_skipped_forever(config, tmp_path, monkeypatch, capsys):
    planted(monkeypatch, 4, nan_in_a_weight)
    monkeypatch.setattr(optim.FiniteGuard, "PATIENCE", 2)
    with pytest.raises(NonFiniteError, match="step 5: .*That is 2 steps in a row"):
        train(config("runtime.on_non_finite=skip"))
    assert "step 4: the loss is not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (nan_in_a_box, "First is the box of object 0 of image {}: cx, cy, w, h = ("),
        (infinity_in_a_loss, "First is the loss match/1/giou (1 infinite of 1 number)"),
    ],
)
def test_a_step_with_a_bad_box_or_loss_is_named_and_left_out(config, tmp_path, monkeypatch, capsys, plant, words):
    seen = []

    def note(trainer, batches, undo):
        seen.append(batches[0].images.image_ids[2])
        seen.append(copy.deepcopy(trainer.net.state_dict()))
        undo.append(lambda: seen.append(copy.deepcopy(trainer.net.state_dict())))
        return plant(trainer, batches, undo)

    planted(monkeypatch, 2, note)
    train(config("runtime.on_non_finite=skip", "schedule.epochs=1", "evaluation.pictures=0"))
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("step 2: ")]
    image, before, after = seen
    assert words.format(image) in line and str(image) in line.partition("(images ")[2].partition(")")[0].split(", ")
    for name, value in before.items():  # parameters, and the running statistics of the norms
        assert torch.equal(value, after[name]), name
    saved = checkpoint.load(tmp_path / "run" / "last.pt")["model"]
    assert all(value.isfinite().all() for value in saved.values())
    assert any(not torch.equal(value, before[name]) for name, value in saved.items())


def test_a_skipped_step_goes_on_like_any_other(config, tmp_path, monkeypatch):
    """The second pass draws random numbers of its own; the run must not notice, or it could not be resumed exactly."""
    settings = ("runtime.on_non_finite=skip", "schedule.epochs=1", "evaluation.pictures=0", "model.dropout=0.2")
    states = []
    for diagnosing in (True, False):
        with monkeypatch.context() as patch:
            planted(patch, 2, nan_in_a_box)
            if not diagnosing:
                patch.setattr(Trainer, "explain", lambda trainer: "")
            train(config(*settings, f"output_dir={tmp_path / str(diagnosing)}"))
        states.append(checkpoint.load(tmp_path / str(diagnosing) / "last.pt"))
    assert_same_training_state(*states)


@pytest.mark.parametrize(("seconds", "saved"), [("0", [1, 2, 3, 3, 4, 5, 6, 6]), (".inf", [3, 6])])
def test_the_state_is_saved_within_epochs_when_time_has_passed(config, monkeypatch, seconds, saved):
    steps = []
    monkeypatch.setattr(
        checkpoint, "save", lambda path, state: steps.append(state["step"]) if path.name == "last.pt" else 0
    )
    train(config(f"checkpoint.every_seconds={seconds}", "evaluation.pictures=0"))
    assert steps == saved


def test_the_last_checkpoint_is_written_after_the_others(config, monkeypatch):
    """A run that is killed between two of them would else believe that the best one is there."""
    names = []
    monkeypatch.setattr(checkpoint, "save", lambda path, state: names.append(path.name))
    train(config("schedule.epochs=1", "checkpoint.every=1", "evaluation.pictures=0"))
    assert names == ["best.pt", "epoch_0001.pt", "last.pt"]


def test_what_will_ruin_the_run_is_said(config, capsys):
    train(config("model.num_queries=3", "schedule.epochs=1", "evaluation.pictures=0"))
    out = capsys.readouterr().out
    assert "warning: the detector has 3 queries, but an image of the training set has" in out
    assert "optimiser steps are few" in out


def test_queries_that_answer_alike_are_noticed_once(config, tmp_path, monkeypatch, capsys):
    step = Trainer.train_step

    def collapsed(trainer, batches):
        step(trainer, batches)
        with torch.no_grad():
            for parameter in trainer.net.query_source.parameters():
                parameter.zero_()

    train(config("evaluation.pictures=0"))
    assert "answer alike" not in capsys.readouterr().out
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[0]["query_spread"] > 0.05
    monkeypatch.setattr(Trainer, "train_step", collapsed)
    train(config("evaluation.pictures=0", f"output_dir={tmp_path / 'collapsed'}"))
    assert capsys.readouterr().out.count("warning: all 10 queries answer alike") == 1
    rows = read_rows(tmp_path / "collapsed" / "metrics.jsonl")
    assert len(rows) == 2 and all(row["query_spread"] < 1e-4 for row in rows)


def test_a_metric_that_cannot_be_written_ends_the_run_with_its_file(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    log = Trainer.log_step

    def full(trainer):
        if trainer.step == 4:
            (folder / "train_steps.jsonl").unlink()
            (folder / "train_steps.jsonl").mkdir()
        return log(trainer)

    monkeypatch.setattr(Trainer, "log_step", full)
    with pytest.raises(OutputError, match=r"cannot write .*train_steps.jsonl: Is a directory"):
        train(config("tracking.log_every=1"))
    assert checkpoint.load(folder / "last.pt")["step"] == 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_float32_weights(config, tmp_path, precision):
    numbers = train(config(f"runtime.precision={precision}", "schedule.epochs=1"))
    assert numbers["loss"] > 0
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert all(value.dtype == torch.float32 for value in state["model"].values() if value.is_floating_point())
    assert bool(state["scaler"]) == (precision == "fp16")


def test_compile_compiles_the_detector(config, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    train(config("runtime.compile=true", "schedule.epochs=1", "evaluation.pictures=0"))
    assert compiled == ["Detector"]


def test_the_seed_decides_the_run(config, tmp_path):
    settings = ("schedule.epochs=1", "evaluation.pictures=0")
    runs = [
        train(config(*settings, f"seed={seed}", f"output_dir={tmp_path / name}"))["loss"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_the_stored_config_is_the_composed_one(config, tmp_path):
    cfg = config("schedule.epochs=1", "evaluation.pictures=0")
    train(cfg)
    stored = checkpoint.load(tmp_path / "run" / "last.pt")["config"]
    expected = to_container(cfg)
    assert stored.keys() == expected.keys()
    assert {key: stored[key] for key in ("optimizer", "schedule", "data")} == {
        key: expected[key] for key in ("optimizer", "schedule", "data")
    }
