"""The runner, with a stand-in for the training, and once with the real one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from detfamily.errors import ConfigError
from detfamily.experiments import runner
from detfamily.experiments.ablate import go, read_request
from detfamily.experiments.launchers.slurm import SlurmOptions
from detfamily.experiments.results import RESULTS, read_results
from detfamily.experiments.table import read_table
from detfamily.experiments.version import PACKAGE, Code


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "POLL", 0.01)
    monkeypatch.delenv("STAND_IN", raising=False)


class Now:
    """The version of the code, which tests change."""

    identity = "one"

    def __call__(self) -> Code:
        return Code(self.identity, f"commit-{self.identity}")


@pytest.fixture
def code() -> Now:
    return Now()


def records(folder: Path) -> list[dict]:
    return read_results(folder / RESULTS)


def calls(folder: Path) -> int:
    """How often the stand-in was called."""
    return sum(log.read_text().count("called:") for log in folder.rglob("log.txt"))


# What was typed


def test_words_are_understood(write_table, monkeypatch, tmp_path):
    file = write_table()
    asked = read_request([str(file), "scale=mini", "seeds=3", "jobs=2", "optimizer.lr=1e-4", "rows=plain,no NMS"])
    assert (asked.seeds, asked.jobs, asked.rows) == ((0, 1, 2), 2, ("plain", "no NMS"))
    assert asked.further == ("optimizer.lr=1e-4",) and asked.folder == Path("runs/ablate/paper/table-mini")
    asked = read_request([str(file), "scale=mini", "seeds=[4,7]", 'rows=["refined, well"]', "output_dir=x"])
    assert (asked.seeds, asked.rows, asked.folder) == ((4, 7), ("refined, well",), Path("x"))
    assert read_request([str(file), "scale=mini", "rows=refined, well"]).rows == ("refined, well",)
    words = ["launcher=slurm", "slurm.time=30", "slurm.setup=[module load cuda]", "optimizer.lr=1e-4"]
    asked = read_request([str(file), "scale=mini", *words])
    assert asked.options == SlurmOptions(time=30, setup=["module load cuda"]) and asked.jobs is None
    assert asked.further == ("optimizer.lr=1e-4",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one table, and none is given"),
        (["scale=minni"], "scale=minni: did you mean 'mini'"),
        ([""], "scale=?"),
        (["scale=mini", "rows=plane"], "no row 'plane': did you mean 'plain'"),
        (["scale=mini", "rows=["], "rows=.: expected labels"),
        (["scale=mini", "seeds=0"], "seeds=0: expected how many"),
        (["scale=mini", "seeds=[a]"], "expected how many"),
        (["scale=mini", "jobs=0"], "jobs=0: expected how many runs at once"),
        (["scale=mini", "seed=4"], "seeds=3 or"),
        (["scale=mini", "other.yaml"], "2 are given"),
        (["scale=mini", "launcher=rey"], "launcher=rey: did you mean 'ray'"),
        (["scale=mini", "slurm.time=30"], "slurm.time=30 is a word of launcher=slurm"),
    ],
)
def test_mistakes_end_in_a_message(write_table, words, message):
    given = [] if not words else [str(write_table()), *filter(None, words)]
    with pytest.raises(ConfigError, match=message):
        read_request(given)


# What is run


def test_rows_times_seeds_are_run_once_and_kept_in_one_file(request_of, launch, code, capsys):
    asked = request_of()
    assert go(asked, launch, code) == 0
    found = records(asked.folder)
    assert [(one["row"], one["seed"]) for one in found] == [
        (row, seed) for row in ("no NMS", "plain", "refined, well") for seed in (0, 1)
    ]
    plain = found[3]
    assert (plain["AP"], plain["AP50"], plain["APs"]) == (pytest.approx(0.11), pytest.approx(0.22), None)
    assert plain["images_seen"] == 300 and plain["images_per_second"] == 52 and plain["commit"] == "commit-one"
    assert [images for images, _ in plain["curve"]] == [100, 200, 300]
    assert plain["seconds"] > 0 and plain["memory_gib"] > 0 and plain["memory_of"] == "process"
    assert "of CPU" in plain["devices"] and plain["core_hours"] > 0 and plain["gpu_hours"] is None
    assert found[0]["AP"] == 0.05 and found[0]["images_seen"] == 300 and found[0]["curve"] == []
    before = (asked.folder / RESULTS).read_text()
    capsys.readouterr()
    assert go(asked, launch, code) == 0 and calls(asked.folder) == 6
    assert (asked.folder / RESULTS).read_text() == before
    assert capsys.readouterr().out.count("done") >= 6


def test_the_runs_get_their_overrides(request_of, launch, code):
    asked = request_of(seeds=(3,), rows=("refined, well",), further=("optimizer.lr=0.001",))
    assert go(asked, launch, code) == 0
    (log,) = asked.folder.rglob("log.txt")
    words = log.read_text().splitlines()[0].split()
    assert words[1:7] == [
        "train",
        "experiment=deformable_detr_r50",
        "+scale=mini",
        "decoder=refine",
        "optimizer.lr=0.001",
        "seed=3",
    ]
    assert words[-1] == "resume=auto" and words[-2] == f"output_dir={log.parent}"


def test_runs_at_wandb_are_the_same_runs_grouped_by_table(request_of, launch, code):
    asked = request_of(seeds=(1,), rows=("refined, well", "no NMS"))
    assert go(asked, launch, code) == 0 and calls(asked.folder) == 3
    tracked = request_of(seeds=(1, 2), rows=("refined, well", "no NMS"), further=("tracking=wandb",))
    assert go(tracked, launch, code) == 0 and calls(asked.folder) == 6
    (log,) = asked.folder.glob("refined-well/seed2-*/log.txt")
    group, tags = "tracking.wandb.group='paper/table'", "tracking.wandb.tags=['refined, well','seed 2','mini']"
    assert f" tracking=wandb {group} {tags} seed=2 " in log.read_text()


def test_a_row_that_is_evaluated_gets_the_weights_of_its_own_seed(request_of, launch, code):
    asked = request_of(rows=("no NMS",))
    assert go(asked, launch, code) == 0
    assert len(records(asked.folder)) == 4, "the row whose weights it takes is trained"
    for log in asked.folder.glob("no-nms/*/log.txt"):
        words = log.read_text().split()
        (checkpoint,) = [word for word in words if word.startswith("checkpoint=")]
        assert "postprocess.num_select=50" in words
        assert checkpoint.split("/")[-2].split("-")[0] == log.parent.name.split("-")[0]


def test_a_failing_run_stops_no_other_and_is_named_with_its_log(request_of, launch, code, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN", "fail")
    asked = request_of()
    assert go(asked, launch, code) == 1
    said = capsys.readouterr().out
    assert "FAILED: refined, well, seed 1: exit status 3" in said and "the planted fault" in said
    assert [one["status"] for one in records(asked.folder)].count("finished") == 5
    (failed,) = [one for one in records(asked.folder) if one["status"] == "failed"]
    assert "planted fault" in failed["error"] and failed["AP"] is None
    monkeypatch.delenv("STAND_IN")
    assert go(asked, launch, code) == 0
    assert [one["status"] for one in records(asked.folder)] == ["finished"] * 6


def test_without_weights_there_is_nothing_to_evaluate(request_of, launch, code, monkeypatch, write_table):
    rows = [
        {"label": "plain", "overrides": ["decoder=refine"]},
        {"label": "no NMS", "overrides": ["postprocess.num_select=50"], "weights_of": "plain"},
    ]
    monkeypatch.setenv("STAND_IN", "fail")
    asked = request_of(table=read_table(write_table(rows=rows)), seeds=(1,), rows=("plain", "no NMS"))
    assert go(asked, launch, code) == 1
    assert [one["row"] for one in records(asked.folder)] == ["plain"]


def test_a_killed_run_goes_on_where_it_was(request_of, launch, code, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN", "die")
    asked = request_of(seeds=(1,))
    assert go(asked, launch, code) == 1
    assert "killed by signal 9" in capsys.readouterr().out
    monkeypatch.delenv("STAND_IN")
    assert go(asked, launch, code) == 0
    assert "goes on" in capsys.readouterr().out
    (resumed,) = [one for one in records(asked.folder) if one["row"] == "refined, well"]
    assert [images for images, _ in resumed["curve"]] == [100, 200, 300] and resumed["AP"] == pytest.approx(0.13)


def test_other_code_and_other_settings_are_never_mixed(request_of, launch, code, capsys):
    asked = request_of(seeds=(0,), rows=("plain",))
    assert go(asked, launch, code) == 0
    code.identity = "two"
    assert go(asked, launch, code) == 0
    assert "1 finished runs of other code (commit-one) stay where they are" in capsys.readouterr().out
    assert go(request_of(seeds=(0,), rows=("plain",), further=("optimizer.lr=0.003",)), launch, code) == 0
    assert "finished runs of other settings" in capsys.readouterr().out
    found = records(asked.folder)
    assert len({(one["config"], one["code"]) for one in found}) == len(found) == 3
    code.identity = "one"
    go(asked, launch, code)
    assert calls(asked.folder) == 3


def test_code_that_changes_under_way_starts_no_more_runs(request_of, launch, code, monkeypatch):
    asked = request_of(seeds=(0,), rows=("plain", "refined, well"))
    versions = iter([Code("one", "a"), Code("one", "a"), Code("two", "b")])
    assert go(asked, launch, lambda: next(versions)) == 1
    assert [one["row"] for one in records(asked.folder)] == ["plain"]


def test_two_at_once_share_the_cores(request_of, launch, code, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    most = []
    look = runner.Runner._look

    def counted(self):
        most.append(len(self.running))
        look(self)

    monkeypatch.setattr(runner.Runner, "_look", counted)
    asked = request_of(jobs=2)
    assert go(asked, launch, code) == 0
    assert max(most) == 2 and len(records(asked.folder)) == 6
    assert all("runtime.threads=4" in log.read_text() for log in asked.folder.rglob("log.txt"))


def test_the_time_is_estimated_from_what_has_run(request_of, launch, code, capsys):
    assert go(request_of(seeds=(0,), rows=("plain",)), launch, code) == 0
    assert "about" not in capsys.readouterr().out
    assert go(request_of(rows=("plain",)), launch, code) == 0
    said = capsys.readouterr().out
    assert "2 runs: 1 done, 0 to go on with, 1 to start; about" in said
    assert re.search(r"with 1 at once, [\d.e-]+ core-hours\n", said) and re.search(
        r"\ncost +[\d.e-]+ core-hours\n", said
    )


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_ends_the_runs_and_a_killed_caller_leaves_them_to_themselves(
    request_of, launch, code, write_table, how, monkeypatch, capsys
):
    asked = request_of(seeds=(0,), rows=("plain",))
    words = [str(write_table()), "scale=mini", "rows=plain", f"output_dir={asked.folder}"]
    script = (
        "from detfamily.experiments import ablate, version\n"
        f"request = ablate.read_request({words})\n"
        f"ablate.go(request, {launch!r}, lambda: version.Code('one', 'commit-one'))\n"
    )
    environment = {**os.environ, "STAND_IN": "hang", "PYTHONPATH": str(PACKAGE.parent)}
    caller = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: list(asked.folder.rglob("ready")), 120)
    caller.send_signal(how)
    caller.communicate(timeout=60)
    (folder,) = [file.parent for file in asked.folder.rglob("ready")]
    if how == signal.SIGINT:
        assert caller.returncode == 130
        assert json.loads((folder / "run.json").read_text())["status"] == "cut off"
    else:
        # The run is still there, and no second one may start in its folder.
        assert go(asked, launch, code) == 1
        assert "another call is at it" in capsys.readouterr().out and calls(asked.folder) == 1
        (child,) = [int(file.name) for file in Path("/proc").glob("[0-9]*") if is_run(file, folder)]
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: not is_run(Path(f"/proc/{child}"), folder))
    assert go(asked, launch, code) == 0
    assert [one["status"] for one in records(asked.folder)] == ["finished"] and calls(asked.folder) == 2


def is_run(process: Path, folder: Path) -> bool:
    try:
        return f"output_dir={folder}".encode() in (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def test_the_real_training_is_run_and_evaluated(request_of, tmp_path, monkeypatch, code):
    small = (
        "data.train_size=16",
        "data.val_size=4",
        f"data.root={tmp_path / 'shapes'}",
        "data.image_size=64",
        "data.sides=[10,40]",
        "schedule.epochs=1",
        "schedule.images_per_epoch=8",
        "schedule.total_batch_size=4",
        "runtime.num_workers=0",
        "runtime.threads=1",
    )
    asked = request_of(seeds=(0,), rows=("plain", "no NMS"), further=small)
    assert go(asked, version=code) == 0
    found = {one["row"]: one for one in records(asked.folder)}
    assert found["plain"]["images_seen"] == found["no NMS"]["images_seen"] == 8
    assert found["plain"]["AP"] is not None and found["no NMS"]["AP"] is not None
    assert found["plain"]["memory_gib"] > 0.1 and len(found["plain"]["curve"]) == 1
    assert not any("data.root" in word for word in found["plain"]["overrides"])
