"""Who is at a run folder: on this machine by the lock, on others by the lease."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from detfamily.experiments import hold
from detfamily.experiments.hold import LEASE, Hold, is_held


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(hold, "SETTLE", 0.0)
    monkeypatch.setattr(hold, "BEAT", 0.0)


def elsewhere(folder, age: float) -> None:
    """The lease of another machine, renewed so many seconds ago."""
    (folder / LEASE).write_text(json.dumps({"machine": "another", "host": "node7", "pid": 1, "token": "theirs"}))
    then = time.time() - age
    os.utime(folder / LEASE, (then, then))


def test_only_one_holds_a_folder(tmp_path):
    mine = Hold.take(tmp_path)
    assert mine is not None and is_held(tmp_path) and Hold.take(tmp_path) is None
    mine.release()
    assert not is_held(tmp_path) and not (tmp_path / LEASE).exists()
    again = Hold.take(tmp_path)
    assert again is not None
    again.release()


def test_a_child_keeps_the_lock_of_a_parent_that_is_gone(tmp_path):
    mine = Hold.take(tmp_path)
    child = subprocess.Popen([sys.executable, "-Sc", "input()"], stdin=subprocess.PIPE, pass_fds=(mine.handle,))
    os.close(mine.handle)  # as when the parent is killed: the lease stays
    assert is_held(tmp_path) and Hold.take(tmp_path) is None
    child.communicate(b"\n", timeout=60)
    assert not is_held(tmp_path), "the lease of a process of this machine outlives it, and says nothing"


def test_another_machine_is_at_it_for_as_long_as_it_renews_its_lease(tmp_path):
    elsewhere(tmp_path, age=hold.STALE / 2)
    assert is_held(tmp_path) and Hold.take(tmp_path) is None
    elsewhere(tmp_path, age=2 * hold.STALE)
    assert not is_held(tmp_path)
    mine = Hold.take(tmp_path)
    assert mine is not None and json.loads((tmp_path / LEASE).read_text())["token"] == mine.token
    mine.release()


def test_dates_are_those_of_the_file_system(tmp_path, monkeypatch):
    elsewhere(tmp_path, age=0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert is_held(tmp_path)


def test_a_lease_is_renewed_until_another_machine_takes_over(tmp_path):
    mine = Hold.take(tmp_path)
    os.utime(tmp_path / LEASE, (1, 1))
    assert mine.beat() and (tmp_path / LEASE).stat().st_mtime > 1
    elsewhere(tmp_path, age=0)
    assert not mine.beat() and mine.lost
    mine.release()
    assert json.loads((tmp_path / LEASE).read_text())["token"] == "theirs", "it is not ours to remove"


def test_without_locks_the_lease_alone_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(hold, "_lock", lambda handle: None)
    mine = Hold.take(tmp_path)
    assert mine is not None and Hold.take(tmp_path) is None
    mine.release()
    assert not is_held(tmp_path)
