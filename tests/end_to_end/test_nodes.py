"""Two nodes, as two agents of torchrun on this machine that find each other by an address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from detfamily.engine.checkpoint import load
from detfamily.files import read_json

RUN = (
    *("family=detr", "backbone=small", "backbone.stem_width=8", "backbone.widths=[8,16,16,16]", "data=shapes"),
    *("augmentation=shapes", "data.train_size=12", "data.val_size=5", "data.image_size=96", "data.sides=[16,48]"),
    *("model.embed_dim=32", "model.num_heads=4", "model.ffn_dim=32", "model.num_queries=10", "encoder.num_layers=1"),
    *("decoder.num_layers=2", "drop_epochs=[]", "schedule.epochs=1", "schedule.total_batch_size=4"),
    *("runtime.num_workers=0", "runtime.threads=1", "runtime.device=cpu", "evaluation.batch_size=1"),
)


def agent(folder: Path, *torchrun: str) -> subprocess.Popen[str]:
    """One torchrun, with one process of ours for each rank that it is told of."""
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", "detfamily", "train", *RUN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DETFAMILY_CACHE": str(folder.parent / "cache")}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, f"output_dir={folder}"], stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(agents: list[subprocess.Popen[str]]) -> list[str]:
    """What each printed; all must end well."""
    try:
        said = [one.communicate(timeout=400) for one in agents]
    finally:
        for one in agents:
            one.kill()
    for one, (_, errors) in zip(agents, said, strict=True):
        assert one.returncode == 0, errors[-3000:]
    return [out for out, _ in said]


@pytest.mark.slow
def test_two_nodes_train_as_two_processes_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}")
    nodes = finish([agent(tmp_path / "nodes", *meeting, f"--node-rank={rank}") for rank in range(2)])
    (one,) = finish([agent(tmp_path / "one", "--standalone", "--nproc-per-node=2")])
    assert "4 = 2 images at once x 2 processes" in nodes[0] and "4 = 2 images at once x 2 processes" in one
    assert nodes[1].strip() == "", "the second node has nothing to say"
    numbers = [read_json(tmp_path / name / "metrics.json") for name in ("nodes", "one")]
    assert numbers[0] == numbers[1]
    weights = [load(tmp_path / name / "last.pt")["model"] for name in ("nodes", "one")]
    assert all(weights[0][name].allclose(weights[1][name], rtol=1e-4, atol=1e-6) for name in weights[0])
