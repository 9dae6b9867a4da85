from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from detfamily.engine.distributed import World, join
from detfamily.errors import DataError

SCRIPT = """
import json, sys, torch
from torch import nn
from detfamily.engine.distributed import join
from detfamily.errors import DataError, DetfamilyError, ElsewhereError

found = {}
for repeat in range(2):  # a process may have several runs, one after the other
    with join("cpu") as world:
        found["rank"], found["size"] = world.rank, world.size
        found["numbers"] = world.gather_numbers([world.rank, 10 + world.rank])
        found["objects"] = world.gather_objects({"rank": world.rank})
        found["from_main"] = world.from_main(f"said by {world.rank}")
        found["minimum"] = world.minimum(torch.tensor([world.rank, -world.rank])).tolist()
        model = nn.BatchNorm1d(1)
        model.running_mean.fill_(world.rank + 5.0)
        world.share_buffers(model)
        found["buffer"] = model.running_mean.item()
        with world.main_first():
            found["seen"] = open(sys.argv[1]).read() if not world.is_main else open(sys.argv[1], "w").write("x")
        world.barrier()
        world.say("once")
    found["left"] = not torch.distributed.is_initialized()
with join("cpu") as world:
    try:
        world.end_together(DataError("image 7 is gone") if world.rank == 1 else None)
    except DetfamilyError as error:
        found["ended_by"] = f"{type(error).__name__}: {error}"
try:
    with join("cpu") as world:
        if world.is_main:
            raise DataError("nobody else knows")
        world.barrier()
except (DataError, ElsewhereError) as error:
    found["lost"] = type(error).__name__
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, by rank, and all they printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("two")
    processes = []
    for rank in range(2):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", SCRIPT, str(folder / "file")]
        processes.append(subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True))
    outs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(out.splitlines()[-1]) for out in outs], outs


def test_both_know_each_other(two):
    found, _ = two
    assert [(one["rank"], one["size"]) for one in found] == [(0, 2), (1, 2)]
    assert all(one["left"] for one in found)


def test_what_is_gathered_and_shared(two):
    found, _ = two
    for one in found:
        assert one["numbers"] == [[0, 10], [1, 11]]
        assert one["from_main"] == "said by 0"
        assert one["minimum"] == [0, -1]
        assert one["buffer"] == 5.0
    assert [one["objects"] for one in found] == [[{"rank": 0}, {"rank": 1}], []]


def test_the_main_process_goes_first_and_speaks_alone(two):
    found, outs = two
    assert found[1]["seen"] == "x"
    assert [out.count("once") for out in outs] == [2, 0]


def test_an_error_of_one_ends_all_and_is_said_once(two):
    found, _ = two
    assert found[0]["ended_by"] == "DataError: image 7 is gone"
    assert found[1]["ended_by"] == "ElsewhereError: another process has met an error"


def test_a_process_that_is_gone_is_noticed(two):
    found, _ = two
    assert [one["lost"] for one in found] == ["DataError", "ElsewhereError"]


def test_one_process_needs_nobody(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with join("cpu") as world:
        assert world == World() and world.is_main
        assert world.gather_numbers([1, 2]) == [[1, 2]]
        assert world.gather_objects("a") == ["a"] and world.from_main("b") == "b"
        assert world.minimum(torch.ones(1)).item() == 1
        with world.main_first():
            world.barrier()
        world.say("hello")
        with pytest.raises(DataError, match="mine"):
            world.end_together(DataError("mine"))
    assert capsys.readouterr().out == "hello\n"
