"""Runs as actors of a Ray of this machine."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from detfamily.errors import ConfigError
from detfamily.experiments import hold, runner
from detfamily.experiments.launchers import ray as module
from detfamily.experiments.launchers.ray import RayLauncher, RayOptions, actor_name
from detfamily.experiments.notes import read_job, read_state
from detfamily.experiments.runner import Runner
from detfamily.experiments.version import Code

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray():
    found = pytest.importorskip("ray")
    found.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="detfamily")
    yield found
    found.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "POLL", 0.05)
    monkeypatch.setattr(module, "GRACE", 1.0)
    monkeypatch.setattr(hold, "SETTLE", 0.0)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def through(ray, launch, said):
    """A runner, as a call of the command makes it; the cluster is there already, and outlives it."""

    def make(*runs, mode: str = "") -> Runner:
        launcher = RayLauncher(RayOptions(num_cpus=1))
        # The workers have the environment of the cluster, so the stand-in is told by its command.
        command = ["env", f"STAND_IN={mode}", *launch] if mode else launch
        return Runner(runs, len(runs), said.append, launch=command, code=lambda: Code("one", "x"), launcher=launcher)

    return make


def wait_for(condition, seconds=300.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def calls(run) -> int:
    return (run.folder / "log.txt").read_text().count("called:")


def test_runs_are_actors_that_go_away(ray, run_of, through):
    plain, refined = run_of("plain"), run_of("refined")
    evaluated = run_of("no NMS", source=plain)
    assert through(plain, refined, evaluated).go() == {}
    assert [one.status() for one in (plain, refined, evaluated)] == ["finished"] * 3
    state = read_state(plain.folder)
    assert state["devices"] == "1 thread of CPU" and state["core_hours"] > 0 and not read_job(plain.folder)
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor(actor_name(plain.folder.resolve()), namespace="detfamily")


def test_relative_paths_start_where_the_caller_is(run_of, through, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = replace(run_of(), root=Path("runs"))
    assert through(run).go() == {} and (tmp_path / run.folder / "metrics.json").is_file()


def test_a_failing_run_is_named(run_of, through):
    run = run_of("refined", 1)
    assert "exit status 3; ValueError: the planted fault" in through(run, mode="fail").go()[run.name]
    assert run.status() == "failed" and calls(run) == 1


def test_the_caller_leaves_and_the_same_command_picks_the_run_up(run_of, through, said):
    run = run_of()
    first = through(run, mode="hang")
    first._start(run)
    wait_for((run.folder / "ready").exists)
    with pytest.raises(SystemExit):
        first._leave(130)
    assert run.status() == "running" and read_job(run.folder)["launcher"] == "ray"
    second = through(run)
    second._start(run)
    second.waiting.clear()
    assert any("of Ray has it" in line for line in said)
    second.running[0].job.stop()
    assert second.go() == {} and run.status() == "finished" and calls(run) == 2
    assert any("stopped by a signal; once more" in line for line in said)


def test_a_worker_that_dies_is_replaced(run_of, through, said):
    run = run_of()
    caller = through(run, mode="hang once")
    caller._start(run)
    caller.waiting.clear()
    wait_for((run.folder / "ready").exists)
    caller.running[0].job.kill()
    assert caller.go() == {} and run.status() == "finished" and calls(run) == 2
    assert any("is gone (ActorDiedError); once more" in line for line in said)


def test_a_cluster_that_is_not_there_is_an_error(monkeypatch):
    found = pytest.importorskip("ray")
    monkeypatch.setattr(found, "is_initialized", lambda: False)

    def refuse(**words):
        raise ConnectionError(f"nobody at {words['address']}")

    monkeypatch.setattr(found, "init", refuse)
    with pytest.raises(ConfigError, match=r"ray.address=10.0.0.1:6379: nobody at 10.0.0.1:6379; ray.address=null"):
        RayLauncher(RayOptions(address="10.0.0.1:6379"))
