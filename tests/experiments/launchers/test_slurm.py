"""SLURM's jobs, through the executor of submitit that runs them on this machine, and sbatch's view of them."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from detfamily.errors import ConfigError
from detfamily.experiments import hold, runner
from detfamily.experiments.hold import LEASE, Hold
from detfamily.experiments.launchers import slurm as module
from detfamily.experiments.launchers.base import Order
from detfamily.experiments.launchers.slurm import SlurmLauncher, SlurmOptions
from detfamily.experiments.launchers.work import Work
from detfamily.experiments.notes import JOB, note, note_job, read_job, read_state
from detfamily.experiments.runner import Runner
from detfamily.experiments.version import Code

HERE = SlurmOptions(cluster="local", gpus_per_node=0, time=30, cpus_per_task=1, signal_delay_s=5)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "POLL", 0.05)
    monkeypatch.setattr(module, "ASK", 0.1)
    monkeypatch.setattr(module, "GRACE", 1.0)
    monkeypatch.setattr(hold, "SETTLE", 0.0)
    monkeypatch.delenv("STAND_IN", raising=False)


@pytest.fixture
def cluster():
    pytest.importorskip("submitit")
    return SlurmLauncher(HERE)


@pytest.fixture
def through(launch, cluster, said):
    """A runner, as a call of the command makes it."""

    def make(*runs) -> Runner:
        return Runner(runs, len(runs), said.append, launch=launch, code=lambda: Code("one", "x"), launcher=cluster)

    return make


@pytest.fixture
def said() -> list[str]:
    return []


def wait_for(condition, seconds=300.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
    return found


def worker(run) -> int:
    """The process that SLURM has started for a run."""
    return json.loads((run.folder / LEASE).read_text())["pid"]


# What needs no cluster


def test_without_slurm_it_says_so(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no srun here"):
        SlurmLauncher(SlurmOptions())


def test_sbatch_gets_what_was_typed(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    (tmp_path / "srun").touch(mode=0o755)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\n/bin/cp "$1" "${0%/*}/script"\necho Submitted batch job 4711\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(submitit.SlurmJob, "done", lambda job, force_check=False: True)
    folder = tmp_path / "runs" / "plain" / "seed0"
    folder.mkdir(parents=True)
    options = SlurmOptions(partition="gpu", time=720, gpus_per_node=2, mem_gb=32, setup=["module load cuda"])
    launcher = SlurmLauncher(options)
    assert launcher.processes == 2
    mine = Hold.take(folder)
    note(folder, status="queued")
    job = launcher.start(Order(folder, ("true",)), mine)
    script = (tmp_path / "script").read_text().splitlines()
    wanted = ["partition=gpu", "time=720", "gpus-per-node=2", "mem=32GB", "job-name=detfamily-plain", "signal=USR2@120"]
    assert {f"#SBATCH --{one}" for one in wanted} <= set(script) and "module load cuda" in script
    assert job.words == "job 4711 of SLURM" and read_job(folder)["id"] == "4711"
    assert launcher.leave([job]) == "scancel 4711 ends them; they save first"
    assert Hold.take(folder) is not None, "the folder is the job's"
    assert launcher.attach(folder) is None, "SLURM says that it has ended"


def test_what_sbatch_answers_is_said(tmp_path, monkeypatch, run_of, launch, said):
    pytest.importorskip("submitit")
    (tmp_path / "srun").touch(mode=0o755)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho invalid partition specified >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    run = run_of()
    launcher = SlurmLauncher(SlurmOptions())
    problems = Runner([run], 1, said.append, launch=launch, code=lambda: Code("one", "x"), launcher=launcher).go()
    assert "SLURM does not take it: invalid partition specified" in problems[run.name]
    assert run.status() == "failed" and not hold.is_held(run.folder)


def test_a_job_of_a_cluster_is_not_started_here(run_of, launch, said):
    run = run_of()
    run.folder.mkdir(parents=True)
    note(run.folder, status="queued")
    note_job(run.folder, {"launcher": "slurm", "cluster": "slurm", "id": "4711"})
    problems = Runner([run], 1, said.append, launch=launch, code=lambda: Code("one", "x")).go()
    assert "launcher=slurm has it in its queue" in problems[run.name] and str(run.folder / JOB) in problems[run.name]
    assert run.status() == "queued"


def test_other_code_is_not_run_later(tmp_path):
    note(tmp_path, status="queued")
    assert "the code has changed since it was queued" in Work(Order(tmp_path, ("true",), code="another"))()
    assert read_state(tmp_path)["status"] == "failed"


# Jobs that run


@pytest.mark.slow
def test_runs_are_jobs_and_sources_come_first(run_of, through, said):
    plain, refined = run_of("plain"), run_of("refined")
    evaluated = run_of("no NMS", source=plain)
    assert through(plain, refined, evaluated).go() == {}
    assert [one.status() for one in (plain, refined, evaluated)] == ["finished"] * 3
    state = read_state(plain.folder)
    assert state["devices"] == "1 thread of CPU" and state["core_hours"] > 0 and state["gpu_hours"] is None
    assert state["memory_gib"] > 0 and not read_job(plain.folder)
    assert "runtime.threads=1" in (plain.folder / "log.txt").read_text()
    assert any("job" in line and "starts" in line for line in said)


@pytest.mark.slow
def test_a_failing_job_is_not_started_again(run_of, through, monkeypatch):
    monkeypatch.setenv("STAND_IN", "fail")
    run = run_of("refined", 1)
    assert "exit status 3; ValueError: the planted fault" in through(run).go()[run.name]
    assert run.status() == "failed" and (run.folder / "log.txt").read_text().count("called:") == 1


@pytest.mark.slow
def test_a_job_that_is_preempted_is_queued_again_and_goes_on(run_of, through, monkeypatch):
    monkeypatch.setenv("STAND_IN", "hang once")
    run = run_of()
    caller = through(run)
    caller._start(run)
    caller.waiting.clear()
    wait_for((run.folder / "ready").exists)
    os.kill(worker(run), signal.SIGUSR2)
    assert caller.go() == {} and run.status() == "finished"
    images = [json.loads(line)["images_seen"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert images == [100, 200, 300], "it goes on with the second epoch"
    assert (run.folder / "log.txt").read_text().count("called:") == 2 and not caller.again


@pytest.mark.slow
def test_the_caller_leaves_and_the_same_command_picks_the_job_up(run_of, through, monkeypatch, said):
    monkeypatch.setenv("STAND_IN", "hang")
    run = run_of()
    first = through(run)
    first._start(run)
    first.waiting.clear()
    wait_for((run.folder / "ready").exists)
    with pytest.raises(SystemExit):
        first._leave(130)
    assert any("1 runs go on without this call; kill" in line for line in said)
    assert run.status() == "running"
    second = through(run)
    second._start(run)
    second.waiting.clear()
    assert any("has it" in line for line in said) and len(second.running) == 1
    os.kill(worker(run), signal.SIGTERM)  # scancel: it saves and leaves, and is another time's
    wait_for(lambda: run.status() == "cut off")
    monkeypatch.delenv("STAND_IN")
    assert second.go() == {} and run.status() == "finished"
    assert (run.folder / "log.txt").read_text().count("called:") == 2


@pytest.mark.slow
def test_a_machine_that_dies_costs_nothing_but_its_last_epoch(run_of, through, monkeypatch, said):
    monkeypatch.setenv("STAND_IN", "hang once")
    run = run_of()
    caller = through(run)
    caller._start(run)
    caller.waiting.clear()
    wait_for((run.folder / "ready").exists)
    os.kill(worker(run), signal.SIGKILL)  # its process is told by the kernel
    assert caller.go() == {} and run.status() == "finished"
    assert any("ended without a word" in line and "once more" in line for line in said)
    assert (run.folder / "log.txt").read_text().count("called:") == 2


@pytest.mark.slow
def test_a_real_training_goes_through_submitit(request_of, tmp_path):
    pytest.importorskip("submitit")
    from detfamily.experiments.ablate import go
    from detfamily.experiments.results import collect

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
    )
    asked = request_of(seeds=(0,), rows=("plain", "no NMS"), further=small, options=HERE, jobs=None)
    assert go(asked) == 0
    found = {one["row"]: one for one in collect(asked.folder)}
    assert found["plain"]["status"] == found["no NMS"]["status"] == "finished"
    assert found["plain"]["images_seen"] == 8 and found["plain"]["devices"] == "1 thread of CPU"
