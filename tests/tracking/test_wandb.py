"""Weights & Biases as it is, offline and against a server on this machine; each run in a process of its own."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from detfamily.tracking import wandb as wandb_tracker
from detfamily.tracking.files import FilesTracker, read_rows
from detfamily.tracking.tracker import RunInfo
from detfamily.tracking.trackers import Trackers
from detfamily.tracking.wandb import WandbTracker

pytest.importorskip("wandb")

KEY = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parents[2]
FEW_MINUTES = 120  # A run that hangs fails the test; no run needs this.

DRIVER = """
import json, os, resource, signal, sys, time, urllib.request
from pathlib import Path
from PIL import Image
from detfamily.tracking import wandb as module
from detfamily.tracking.files import FilesTracker
from detfamily.tracking.tracker import RunInfo
from detfamily.tracking.trackers import Trackers

folder, first, last, fault, settings = Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4], json.loads(sys.argv[5])
module.MARGIN = 2.0 if fault == "stopped" else 60.0
folder.mkdir(exist_ok=True)
wandb = module.WandbTracker(**settings)
trackers = Trackers([FilesTracker(), wandb])
if fault == "disk full":  # for files of this size
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

def wait(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise SystemExit("waited in vain")

def settled(step):
    wait(lambda: wandb._sent["train/step"] >= step)

def logs():
    return sum(one.stat().st_size for one in folder.glob(f"wandb/*run-*/run-*.wandb"))

before = logs()
trackers.start(RunInfo("toy", folder, {"seed": 7, "model": {"_target_": "a.B"}}, 4, first or None, first // 10))
for step in range(first + 1, last + 1):
    many = {f"match/{layer}/giou": 1 / (step + layer) for layer in range(60)}
    trackers.log_step({"loss": float("nan") if step == 3 else 1 / step, **many}, step)
    if step % 10 == 0:
        ap = {10: 0.25, 20: 0.5, 30: 0.375, 40: 0.125}[step]
        trackers.log_epoch({"loss": 2 / step, "AP": ap, "AP/traffic light": ap / 2, "AP/a.b*": 0.75}, step // 10, step)
    if step == 15 and fault.isdigit():
        settled(15)
        urllib.request.urlopen(os.environ["WANDB_BASE_URL"] + "/control/" + fault)
    if step == 15 and fault in ("died", "stopped"):
        settled(15)
        os.kill(wandb._service.pid, signal.SIGKILL if fault == "died" else signal.SIGSTOP)
    if step == last and fault == "killed":
        settled(last)
        wait(lambda: logs() > before + 30_000)
        os.kill(wandb._service.pid, signal.SIGKILL)  # it may find the time to write what it has
        os.kill(os.getpid(), signal.SIGKILL)
Image.linear_gradient("L").save(folder / "curves.png")
(folder / "config.yaml").write_text("seed: 7")
for name in {"best": ["best.pt", "last.pt"], "last": ["last.pt"]}.get(fault, []):
    (folder / name).write_bytes(name.encode() * 1000)
trackers.log_image("curves", folder / "curves.png", last)
trackers.finish(fault != "failed")
print("the end")
"""


def run(folder, first=0, last=40, fault="", url=None, key=KEY, **settings):
    """Drive a run of 10 steps an epoch in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(folder.parent), "PYTHONPATH": str(ROOT / "src"), "WANDB_API_KEY": key}
    environment |= {"WANDB_BASE_URL": url} if url else {}
    settings = {"mode": "online" if url else "offline", "init_timeout": 4.0, "finish_timeout": 1.5} | settings
    words = [sys.executable, "-c", DRIVER, str(folder), str(first), str(last), fault, json.dumps(settings)]
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=FEW_MINUTES, stdin=subprocess.DEVNULL
    )
    if fault != "killed":
        assert done.returncode == 0 and "the end" in done.stdout, done.stderr
    return done


def records(folder):
    """All records of the logs in a run folder, in the order of the processes, as wandb itself reads them."""
    found = []
    for log in sorted(folder.glob("wandb/*run-2*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        words = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(log)]
        text = subprocess.run(words, capture_output=True, text=True, timeout=FEW_MINUTES, check=False).stdout
        found += [json.loads(line) for line in text.splitlines()]
    return found


def logged(folder):
    return [one["history"]["item"] for one in records(folder) if one["type"] == "history"]


def numbers(rows):
    """Rows of a history as those of the files: (rows of steps, rows of epochs)."""
    plain = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
    plain = [
        {name: None if value == "NaN" or value != value else value for name, value in row.items()} for row in plain
    ]
    steps = [
        {name.removeprefix("train/"): value for name, value in row.items()} for row in plain if "train/step" in row
    ]
    return steps, [row for row in plain if "epoch" in row]


def assert_complete(rows, folder, last=40):
    """Every row of the run's files is there once, with its values, and there are no others."""
    steps, epochs = numbers(rows)
    assert steps == read_rows(folder / "train_steps.jsonl") and [row["step"] for row in steps] == [*range(1, last + 1)]
    assert epochs == read_rows(folder / "metrics.jsonl") and [row["epoch"] for row in epochs] == [1, 2, 3, 4]


def assert_once(rows, last=40):
    """As ``assert_complete``, where the order is that of several processes."""
    counts = Counter((name, row[name]) for row in rows for name in ("train/step", "epoch") if name in row)
    assert counts == {("train/step", step): 1 for step in range(1, last + 1)} | {
        ("epoch", one): 1 for one in range(1, 5)
    }


def warnings(done):
    return [line for line in done.stdout.splitlines() if line.startswith("warning")]


def sync_command(done):
    (found,) = re.findall(r"wandb sync .*?(?=\)?$)", done.stdout, re.MULTILINE)
    return shlex.split(found)


def test_an_offline_run_holds_what_was_logged(tmp_path):
    folder = tmp_path / "run"
    done = run(folder, project="p", entity="e", group="g", tags=["a", "b"], notes="n")
    found = records(folder)
    rows = [one["history"]["item"] for one in found if one["type"] == "history"]
    assert_complete(rows[:-1], folder)
    assert [row.get("AP/traffic light") for row in rows if "epoch" in row] == [0.125, 0.25, 0.1875, 0.0625]

    (begun,) = [one["run"] for one in found if one["type"] == "run"]
    assert begun["run_id"] == (folder / "wandb_id.txt").read_text().strip()
    assert (begun["project"], begun["entity"], begun["run_group"]) == ("p", "e", "g")
    assert (begun["display_name"], begun["tags"], begun["notes"]) == ("toy", ["a", "b"], "n")
    config = {key: value for key, value in begun["config"]["update"].items() if key != "_wandb"}
    assert config == {"seed": 7, "model": {"_target_": "a.B"}}

    axes = [one["metric"] for one in found if one["type"] == "metric"]
    axes = {one.get("name", one.get("glob_name")): one.get("step_metric") for one in axes}
    assert axes["train/*"] == "train/step"
    assert axes["AP"] == axes["AP/traffic light"] == axes["loss"] == "epoch"

    summary = {}
    for one in found:
        summary |= one["summary"]["update"] if one["type"] == "summary" else {}
    assert summary["best_AP"] == 0.5 and summary["best_epoch"] == 2 and summary["AP"] == 0.125
    (image,) = folder.glob("wandb/offline-run-*/files/media/images/*.png")
    assert image.read_bytes() == (folder / "curves.png").read_bytes()
    assert rows[-1]["curves.path"] == f"media/images/{image.name}"

    assert not warnings(done) and sync_command(done)[2:] == [str(one.parent) for one in folder.glob("wandb/o*/*.wandb")]
    (ended,) = [one["exit"] for one in found if one["type"] == "exit"]
    assert ended.get("exit_code", 0) == 0
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY not in done.stdout + done.stderr and not any(KEY.encode() in text for text in texts)


@pytest.mark.parametrize("kept", ["best", "last"])
def test_an_offline_run_has_its_weights_as_an_artifact(tmp_path, kept):
    folder = tmp_path / "run"
    done = run(folder, fault=kept, artifact=True)
    assert not warnings(done)
    (found,) = [one["artifact"] for one in records(folder) if one["type"] == "artifact"]
    assert found["type"] == "model" and found["name"] == f"model-{(folder / 'wandb_id.txt').read_text().strip()}"
    files = {one["path"]: one for one in found["manifest"]["contents"]}
    assert files.keys() == {f"{kept}.pt", "config.yaml"}
    weights = files[f"{kept}.pt"]
    assert int(weights["size"]) == 7000 and Path(weights["local_path"]) == folder / f"{kept}.pt"
    digest = hashlib.md5((folder / f"{kept}.pt").read_bytes()).digest()
    assert weights["digest"] == base64.b64encode(digest).decode()


def test_without_weights_or_where_a_run_failed_there_is_no_artifact(tmp_path):
    for name, settings in (("none", {"artifact": True}), ("failed", {"artifact": True}), ("best", {})):
        run(tmp_path / name, fault=name, **settings)
        assert not [one for one in records(tmp_path / name) if one["type"] == "artifact"]


def test_a_killed_run_goes_on_under_its_id_and_nothing_is_lost_or_there_twice(tmp_path):
    folder = tmp_path / "run"
    assert run(folder, last=27, fault="killed").returncode < 0
    assert logged(folder)  # most of it: what was last was lost, or not, with the process
    done = run(folder, first=20)
    found = records(folder)
    assert_complete([one["history"]["item"] for one in found if one["type"] == "history"][:-1], folder)
    (begun,) = [one["run"] for one in found if one["type"] == "run"]  # the log that was cut off is set aside ...
    (aside,) = folder.glob("wandb/offline-run-*/*.incomplete")  # ... under the same id
    assert aside.name == f"run-{begun['run_id']}.wandb.incomplete"
    assert sync_command(done)[2:] == [str(one.parent) for one in folder.glob("wandb/offline-run-*/*.wandb")]


def test_a_run_that_was_stopped_goes_on_under_its_id_and_both_parts_are_sent(tmp_path, serve):
    folder, server = tmp_path / "run", serve()
    run(folder, last=27, fault="failed")
    (ended,) = [one["exit"] for one in records(folder) if one["type"] == "exit"]
    assert ended["exit_code"] == 1
    done = run(folder, first=20)
    words = sync_command(done)
    assert len(words) == 4  # both processes' folders
    sync(words, tmp_path, server)
    assert_once(server.history)
    assert server.summary["best_AP"] == 0.5 and server.summary["best_epoch"] == 2
    sync(words, tmp_path, server)
    assert_once(server.history)


def sync(words, home, server):
    environment = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(home)}
    words = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=FEW_MINUTES)
    assert done.returncode == 0, done.stderr


def test_an_online_run_is_at_the_server_and_a_killed_one_goes_on_there(tmp_path, serve):
    server = serve()
    folder = tmp_path / "run"
    run(folder, last=27, fault="killed", url=server.url)
    done = run(folder, first=20, url=server.url)
    assert not warnings(done) and f"{server.url}/me/detfamily/runs/" in done.stdout
    assert_complete(server.history[:-1], folder)
    assert server.summary["best_AP"] == 0.5
    assert {one["name"] for one in server.runs} == {(folder / "wandb_id.txt").read_text().strip()}
    (image,) = [body for name, body in server.uploads.items() if name.endswith(".png")]
    assert image == (folder / "curves.png").read_bytes()


def test_whatever_happens_to_wandb_the_run_goes_on_and_nothing_is_lost(tmp_path, serve):
    """All faults at once, as they consist of waiting: a thread and a server each."""
    checks = {
        **{fault: without_a_server for fault in ("refused", "unauthorized", "broken", "slow")},
        **{fault: with_a_server_that_fails_later for fault in ("500", "401")},
        "slow replies": with_slow_replies,
        "died": with_a_program_that_dies,
        "stopped": with_a_program_that_hangs,
        "no key": without_a_key,
        "disk full": with_a_full_disk,
    }
    with ThreadPoolExecutor(4) as pool:
        done = {
            fault: pool.submit(check, tmp_path / fault.replace(" ", "_"), serve(), fault)
            for fault, check in checks.items()
        }
    errors = {fault: one.exception() for fault, one in done.items() if one.exception()}
    assert not errors, "\n".join(f"{fault}: {error!r}" for fault, error in errors.items())


def without_a_server(folder, server, fault):
    url = server.url if fault != "refused" else "http://127.0.0.1:9"  # nobody listens there
    server.delay = 6.0 if fault == "slow" else 0.0
    server.status = {"unauthorized": 401, "broken": 500}.get(fault, 200)
    done = run(folder, url=url)
    (warning,) = warnings(done)
    assert warning.startswith("warning: wandb: CommError") and "kept in its folder" in warning
    assert_complete(logged(folder)[:-1], folder)
    if fault == "unauthorized":
        server.status = 200
        sync(sync_command(done), folder.parent, server)
        assert_complete(server.history[:-1], folder)


def with_a_server_that_fails_later(folder, server, fault):
    done = run(folder, fault=fault, url=server.url)
    assert len(warnings(done)) == (fault == "500")  # wandb says that of 401 itself
    assert len(server.history) < 20
    server.status = 200
    sync(sync_command(done), folder.parent, server)
    assert_complete(server.history[:-1], folder)


def with_slow_replies(folder, server, fault):
    server.delay = 0.7
    done = run(folder, url=server.url, init_timeout=30.0, finish_timeout=30.0)
    assert not warnings(done)
    assert_complete(server.history[:-1], folder)


def with_a_program_that_dies(folder, server, fault):
    done = run(folder, fault=fault, url=server.url)
    (warning,) = warnings(done)
    assert "ConnectionResetError" in warning and "kept in its folder" in warning
    assert_once(logged(folder))


def with_a_program_that_hangs(folder, server, fault):
    done = run(folder, fault=fault, url=server.url, init_timeout=4.0, finish_timeout=0.5)
    (warning,) = warnings(done)
    assert "left alone" in warning
    assert [row["step"] for row in read_rows(folder / "train_steps.jsonl")] == [*range(1, 41)]


def without_a_key(folder, server, fault):
    done = run(folder, url=server.url, key="")
    (warning,) = warnings(done)
    assert "no API key: wandb login" in warning
    assert_complete(logged(folder)[:-1], folder)


def with_a_full_disk(folder, server, fault):
    done = run(folder, fault=fault)
    (warning,) = warnings(done)
    assert "is the disk full?" in warning
    assert [row["step"] for row in read_rows(folder / "train_steps.jsonl")] == [*range(1, 41)]


def test_a_missing_wandb_is_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers = Trackers([FilesTracker(), WandbTracker(mode="online")])
    trackers.start(RunInfo("toy", tmp_path, {}, 1))
    trackers.log_step({"loss": 1.0}, 1)
    trackers.log_epoch({"loss": 1.0}, 1, 1)
    trackers.finish()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: wandb: ImportError: it cannot be imported") and "pip install wandb" in line
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize(("mode", "said"), [("disabled", None), (None, "disabled")])
def test_disabled_does_nothing(tmp_path, monkeypatch, capsys, mode, said):
    monkeypatch.setitem(sys.modules, "wandb", None)  # it is not even imported
    monkeypatch.setenv("WANDB_MODE", said or "online")
    trackers = Trackers([WandbTracker(mode=mode)])
    trackers.start(RunInfo("toy", tmp_path, {}, 1))
    trackers.log_epoch({"AP": 1.0}, 1, 1)
    trackers.log_image("curves", tmp_path, 1)
    trackers.finish()
    assert capsys.readouterr().out == "" and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["init_timeout", "finish_timeout"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_timeout_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        WandbTracker(**{name: value})


def test_patience_covers_both_timeouts():
    assert WandbTracker(init_timeout=7, finish_timeout=5).patience == 12 + wandb_tracker.MARGIN
