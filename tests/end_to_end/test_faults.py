"""What happens to a run on a real machine: killed, told to leave, a full disk, a broken image; one process and two.

Importing torch takes longer than these runs do, so one process imports it and forks the commands.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from detfamily.data.loader import Stream
from detfamily.engine import checkpoint
from detfamily.tracking.files import read_rows

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

SERVER = """
import json, os, resource, signal, sys, traceback
import detfamily.engine.evaluate, detfamily.engine.train
from detfamily.cli import main

def run(task):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(task[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(task["environment"])
    if task["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest_file"],) * 2)
    code = 99
    try:
        code = main(task["words"])
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    task = json.loads(line)
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if child == 0:
            run(task)
        print(child, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with open(task["code"] + ".part", "w") as file:
            file.write(str(code))
        os.rename(task["code"] + ".part", task["code"])
        os._exit(0)
"""

CLOCKS = ("seconds", "images_per_second", "seconds_left")
STATE = (
    *("model", "ema", "optimizer", "scaler", "epoch", "steps_done", "step", "images_seen", "plan", "meter", "windows"),
    *("not_finite", "rng", "best", "metrics", "label_map"),
)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.003)


class Started:
    """A process that was started, and what it says."""

    def __init__(self, pid: int, files: dict[str, Path]) -> None:
        self.pid, self.files = pid, files

    def text(self, name: str) -> str:
        return self.files[name].read_text()

    @property
    def ended(self) -> bool:
        return self.files["code"].exists()

    def wait(self) -> int:
        """The exit code; minus the signal that ended it."""
        wait_for(lambda: self.ended)
        return int(self.text("code"))

    def kill(self, number: int) -> None:
        if not self.ended:
            os.kill(self.pid, number)


class Machine:
    """Runs commands of ``detfamily``, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *words: str, environment: dict[str, str] | None = None, largest_file: int = 0) -> Started:
        self.count += 1
        files = {name: self.folder / f"{self.count}.{name}" for name in ("out", "err", "code")}
        task = {"words": words, "environment": environment or {}, "largest_file": largest_file}
        task |= {name: str(file) for name, file in files.items()}
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        return Started(int(self.server.stdout.readline()), files)

    def start_two(self, *words: str) -> list[Started]:
        """Two processes of one run, as ``torchrun`` starts them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [self.start(*words, environment={**both, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    made = Machine(tmp_path_factory.mktemp("machine"))
    yield made
    made.server.kill()
    made.server.wait()


BATCH, STEPS, EPOCHS = 2, 8, 3


def words(root: Path, *more: str) -> list[str]:
    """A run with all that has a state: dropout, averaged weights, moving statistics, random augmentation."""
    return [
        *("train", "family=deformable_detr", "backbone=small", "backbone.stem_width=8", "backbone.widths=[8,16,16,16]"),
        *("data=shapes", f"data.root={root}", f"data.train_size={BATCH * STEPS}", "data.val_size=3"),
        *("data.image_size=96", "data.sides=[16,48]", "data.objects=[1,3]", "augmentation=shapes"),
        *("model.embed_dim=32", "model.num_heads=4", "model.ffn_dim=16", "model.num_queries=5", "model.dropout=0.2"),
        *("encoder.num_layers=1", "decoder.num_layers=2", "drop_epochs=[2]", f"schedule.epochs={EPOCHS}"),
        *(f"schedule.total_batch_size={BATCH}", "optimizer.ema_decay=0.9", "optimizer.lr=1e-3", "tracking.log_every=2"),
        *("runtime.num_workers=0", "runtime.threads=1", "runtime.device=cpu", "evaluation.pictures=0"),
        *("checkpoint.every=2", *more),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="module")
def undisturbed(machine, root, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to, and that never saved in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    started = machine.start(*words(root, f"output_dir={folder}", "checkpoint.every_seconds=inf"))
    assert started.wait() == 0, started.text("err")
    return folder


def leaves(value, prefix=""):
    """All values of nested containers, by path."""
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, list | tuple):
        value = enumerate(value)
    else:
        yield prefix, value
        return
    for key, one in value:
        yield from leaves(one, f"{prefix}/{key}")


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Bit for bit: every checkpoint with all that it holds, every row, the detections."""
    for name in ("last.pt", "best.pt", "epoch_0002.pt"):
        one, other = (checkpoint.load(folder / name) for folder in (ours, theirs))
        for key in STATE:
            first, second = dict(leaves(one[key])), dict(leaves(other[key]))
            assert first.keys() == second.keys(), f"{name}: {key}"
            for path, value in first.items():
                same = torch.equal(value, second[path]) if isinstance(value, torch.Tensor) else value == second[path]
                assert same, f"{name}: {key}{path} differs"
    for name in ("metrics.jsonl", "train_steps.jsonl"):
        assert rows_of(ours / name) == rows_of(theirs / name), name
    tables = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in (ours, theirs)]
    assert len(tables[0]) == len(tables[1]) == len(rows_of(ours / "metrics.jsonl"))
    assert (ours / "results_val.json").read_bytes() == (theirs / "results_val.json").read_bytes()
    assert not list(ours.glob(".*"))


def rows_of(path: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in read_rows(path)]


def steps_logged(folder: Path) -> int:
    rows = read_rows(folder / "train_steps.jsonl")
    return rows[-1]["step"] if rows else 0


def kill_at(machine: Machine, command: list[str], folder: Path, step: int, delay: float) -> bool:
    """Start it, and kill -9 it so long after that step; returns whether it still lived."""
    started = machine.start(*command)
    wait_for(lambda: started.ended or steps_logged(folder) >= step)
    time.sleep(delay)
    started.kill(signal.SIGKILL)
    return started.wait() == -signal.SIGKILL


def test_a_run_that_is_killed_three_times_ends_with_the_same_bits(machine, root, undisturbed, tmp_path):
    folder = tmp_path / "run"
    command = words(root, f"output_dir={folder}", "resume=auto", "checkpoint.every_seconds=0.1")
    chance = random.Random()
    for step in sorted(chance.sample(range(1, STEPS * EPOCHS - 5), 3)):
        assert kill_at(machine, command, folder, step, chance.uniform(0, 0.1))
    final = machine.start(*command)
    assert final.wait() == 0, final.text("err")
    assert "resumed" in final.text("out")
    assert_same_run(folder, undisturbed)


@pytest.mark.skipif(os.environ.get("DETFAMILY_SLOW") != "1", reason="takes minutes: DETFAMILY_SLOW=1")
@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_bits(machine, root, tmp_path, family):
    """At any moment of its life, also while it starts, evaluates or saves, and with reading workers."""
    longer = (f"family={family}", "schedule.epochs=8", "schedule.images_per_epoch=40", "runtime.num_workers=1")
    command = [one for one in words(root, *longer, "resume=auto") if one not in ("family=deformable_detr",)]
    assert machine.start(*command, f"output_dir={tmp_path / 'whole'}", "checkpoint.every_seconds=inf").wait() == 0
    folder, chance, killed = tmp_path / "run", random.Random(), 0
    command += [f"output_dir={folder}", "checkpoint.every_seconds=0.1"]
    while killed < 20:
        # 160 steps: about eight more each time, and now and then none at all
        step = steps_logged(folder) + chance.choice([0, 4, 8, 12]) if killed else 0
        killed += kill_at(machine, command, folder, step, chance.uniform(0, 0.3))
        assert steps_logged(folder) < 160, f"it was done after {killed} kills"
    assert machine.start(*command).wait() == 0
    assert_same_run(folder, tmp_path / "whole")


def test_sigterm_saves_and_leaves_and_the_same_command_goes_on(machine, root, undisturbed, tmp_path):
    folder = tmp_path / "run"
    command = words(root, f"output_dir={folder}", "resume=auto", "checkpoint.every_seconds=inf")
    started = machine.start(*command)
    wait_for(lambda: started.ended or steps_logged(folder) >= 3)
    started.kill(signal.SIGTERM)
    started.kill(signal.SIGTERM)  # as a batch system and torchrun both do: not a second wish
    assert started.wait() == 128 + signal.SIGTERM
    saved = checkpoint.load(folder / "last.pt")["step"]
    assert saved >= 3 and f"stopped after step {saved} of 24" in started.text("out")
    assert machine.start(*command).wait() == 0
    assert_same_run(folder, undisturbed)


def test_a_full_disk_is_named_and_costs_only_what_came_after_the_last_checkpoint(machine, root, undisturbed, tmp_path):
    folder = tmp_path / "run"
    command = words(root, f"output_dir={folder}", "resume=auto", "checkpoint.every_seconds=0")
    assert kill_at(machine, command, folder, 6, 0)
    before = (folder / "last.pt").read_bytes()
    full = machine.start(*command, largest_file=len(before) // 2)
    assert full.wait() == 2
    (line,) = full.text("err").splitlines()
    path = folder / "last.pt"
    assert line == f"detfamily: cannot write the checkpoint {path}: File too large; last.pt of before is intact"
    assert (folder / "last.pt").read_bytes() == before and not list(folder.glob(".*"))
    assert machine.start(*command).wait() == 0
    assert_same_run(folder, undisturbed)


def image_of_step(root: Path, step: int, within: int = 0) -> Path:
    """The training image that a step reads, one that no step before it has read."""
    files = sorted(root.rglob("train/*.jpg"))
    assert len(files) == BATCH * STEPS
    return files[Stream(len(files), seed=0)[step * BATCH + within].index]


@pytest.fixture
def own_root(machine, tmp_path) -> Path:
    """Images that may be broken."""
    drawn = machine.start(
        *words(tmp_path / "own", f"output_dir={tmp_path / 'draw'}", "schedule.epochs=1", "drop_epochs=[]")
    )
    assert drawn.wait() == 0, drawn.text("err")
    return tmp_path / "own"


def test_an_image_that_breaks_is_named_and_what_came_before_it_is_saved(machine, own_root, undisturbed, tmp_path):
    folder = tmp_path / "run"
    command = words(own_root, f"output_dir={folder}", "resume=auto", "checkpoint.every_seconds=inf")
    file = image_of_step(own_root, STEPS - 1)
    whole = file.read_bytes()
    started = machine.start(*command)
    wait_for(lambda: started.ended or (folder / "config.yaml").exists())
    file.write_bytes(whole[: len(whole) // 2])
    assert started.wait() == 2
    said = started.text("err")
    assert said.startswith("detfamily: image ") and str(file) in said and "Traceback" not in said
    assert f"the {STEPS - 1} steps before it are saved" in said
    assert checkpoint.load(folder / "last.pt")["step"] == STEPS - 1
    file.write_bytes(whole)
    assert machine.start(*command).wait() == 0
    assert_same_run(folder, undisturbed)


def test_two_processes_end_together_when_one_lacks_an_image(machine, own_root, tmp_path):
    folder = tmp_path / "run"
    command = words(own_root, f"output_dir={folder}", "resume=auto", "checkpoint.every_seconds=inf")
    file = image_of_step(own_root, STEPS - 1, within=1)  # the second process reads it
    both = machine.start_two(*command)
    wait_for(lambda: both[0].ended or (folder / "config.yaml").exists())
    file.rename(file.with_suffix(".away"))
    assert [one.wait() for one in both] == [2, 2]
    assert str(file) in both[0].text("err") and "Traceback" not in both[0].text("err")
    assert [both[1].text(name) for name in ("out", "err")] == ["", ""]
    assert checkpoint.load(folder / "last.pt")["step"] == STEPS - 1
    file.with_suffix(".away").rename(file)
    again = machine.start_two(*command)
    assert [one.wait() for one in again] == [0, 0], again[0].text("err")
    assert "resumed" in again[0].text("out") and [again[1].text(name) for name in ("out", "err")] == ["", ""]


def test_the_other_process_notices_that_one_is_gone_and_ends(machine, root, tmp_path):
    folder = tmp_path / "run"
    both = machine.start_two(*words(root, f"output_dir={folder}", "checkpoint.every_seconds=0"))
    wait_for(lambda: both[0].ended or steps_logged(folder) >= 4)
    both[1].kill(signal.SIGKILL)
    assert [one.wait() for one in both] == [2, -signal.SIGKILL]
    assert both[0].text("err") == "detfamily: the connection to another process is gone: it has ended, or was killed\n"
    assert checkpoint.load(folder / "last.pt")["step"] >= 3


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def worker(torchrun: subprocess.Popen, rank: int) -> int:
    """The process id of a rank."""
    for child in children(torchrun.pid):
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return child
    raise AssertionError(f"there is no rank {rank}")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_reading_process_that_is_killed_is_said_and_costs_nothing_that_was_saved(machine, root, tmp_path):
    folder = tmp_path / "run"
    command = words(root, f"output_dir={folder}", "checkpoint.every_seconds=0", "runtime.num_workers=1")
    started = machine.start(*command)
    wait_for(lambda: started.ended or steps_logged(folder) >= 4)
    os.kill(children(started.pid)[0], signal.SIGKILL)  # as the system does when memory runs out
    assert started.wait() == 2
    assert "detfamily: a reading process is gone (DataLoader worker" in started.text("err")
    assert checkpoint.load(folder / "last.pt")["step"] >= 3


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_torchrun_restarts_a_run_that_lost_a_process_and_hands_on_the_wish_to_stop(machine, root, tmp_path):
    """The second of two processes is killed; after the restart torchrun is told to end; later the run goes on."""
    common = words(root, "resume=auto", "checkpoint.every_seconds=0.1")
    whole = machine.start_two(*common, f"output_dir={tmp_path / 'whole'}")
    folder = tmp_path / "run"
    torchrun = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"),
            *("-m", "detfamily", *common, f"output_dir={folder}"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: torchrun.poll() is not None or steps_logged(folder) >= 6)
    os.kill(worker(torchrun, 1), signal.SIGKILL)
    wait_for(lambda: torchrun.poll() is not None or steps_logged(folder) >= 14)
    torchrun.send_signal(signal.SIGTERM)
    out, err = torchrun.communicate(timeout=120)
    assert torchrun.returncode != 0
    assert out.count("training deformable_detr") == 2 and out.count("  resumed ") == 1, err
    saved = checkpoint.load(folder / "last.pt")["step"]
    assert saved >= 14 and f"stopped after step {saved} of 24" in out

    assert [one.wait() for one in whole] == [0, 0], whole[0].text("err")
    rest = machine.start_two(*common, f"output_dir={folder}")
    assert [one.wait() for one in rest] == [0, 0], rest[0].text("err")
    assert_same_run(folder, tmp_path / "whole")
