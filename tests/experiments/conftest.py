"""Tables of our own, and a stand-in for ``detfamily`` whose runs take no time and whose results are known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from detfamily.experiments.ablate import Request
from detfamily.experiments.runner import Run
from detfamily.experiments.scale import Variant
from detfamily.experiments.table import Row, Table, read_table
from detfamily.experiments.version import Code

TABLE = {
    "title": "A comparison",
    "claim": "More is better.",
    "source": "nowhere, table 1",
    "base": "deformable_detr_r50",
    "baseline": "plain",
    "rows": [
        {"label": "plain", "overrides": [], "published": {"AP": 43.8, "APs": 26.4}},
        {"label": "refined, well", "overrides": ["decoder=refine"], "published": {"AP": 45.4}},
        {
            "label": "no NMS",
            "overrides": ["postprocess.num_select=50"],
            "weights_of": "plain",
            "difference": {"AP": -1},
        },
    ],
}

STAND_IN = r"""
import json, os, signal, sys, time
command, *words = sys.argv[1:]
given = dict(word.split("=", 1) for word in words)
folder = given["output_dir"]
os.makedirs(folder, exist_ok=True)
print("called:", *sys.argv[1:], flush=True)
if command == "evaluate":
    assert os.path.exists(given["checkpoint"])
    json.dump({"AP": 0.05, "AP50": 0.1, "APs": -1}, open(f"{folder}/metrics.json", "w"))
    sys.exit()
seed, refined = int(given["seed"]), given.get("decoder") == "refine"
mode = os.environ.get("STAND_IN", "")
if mode == "fail" and refined and seed == 1:
    print("ValueError: the planted fault")
    sys.exit(3)
file = f"{folder}/metrics.jsonl"
done = len(open(file).readlines()) if os.path.exists(file) else 0
for epoch in range(done + 1, 4):
    ap = (0.1 + 0.01 * seed + (0.02 if refined else 0)) * epoch / 3
    row = {"epoch": epoch, "step": epoch, "images_seen": 100 * epoch, "AP": ap, "images_per_second": 50.0 + epoch}
    with open(file, "a") as log:
        log.write(json.dumps(row) + "\n")
    if mode == "die" and refined and seed == 1 and epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "hang" or mode == "hang once" and not os.path.exists(f"{folder}/ready"):
        open(f"{folder}/ready", "w").close()
        while True:
            time.sleep(0.05)
open(f"{folder}/last.pt", "w").close()
numbers = {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2, "APs": -1, "APm": ap, "APl": ap}
json.dump(numbers, open(f"{folder}/metrics.json", "w"))
"""


@pytest.fixture
def write_table(tmp_path):
    """Write a table, with changes of its top level."""

    def write(**changes) -> Path:
        file = tmp_path / "paper" / "table.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump({**TABLE, **changes}))
        return file

    return write


@pytest.fixture
def table(write_table) -> Table:
    return read_table(write_table())


@pytest.fixture
def launch(tmp_path) -> list[str]:
    """How the stand-in is called."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return [sys.executable, "-S", str(script)]


@pytest.fixture
def request_of(table, tmp_path):
    """A request as ``read_request`` makes it."""

    def make(**changes) -> Request:
        fields = {
            "table": table,
            "scale": "mini",
            "seeds": (0, 1),
            "rows": tuple(table.labels),
            "jobs": 1,
            "folder": tmp_path / "runs",
            "further": (),
        }
        return Request(**{**fields, **changes})

    return make


@pytest.fixture
def run_of(tmp_path):
    """A run that the stand-in can do, without a config."""

    def make(label: str = "plain", seed: int = 0, source: Run | None = None) -> Run:
        row = Row(label, (), weights_of=source.variant.row.label if source else None)
        overrides = ("decoder=refine",) if label == "refined" else ()
        config = {"schedule": {"epochs": 3}, "runtime": {"device": "cpu"}, "tracking": {}}
        variant = Variant(row, overrides, config, f"c{len(label)}")
        return Run("paper/table", "mini", variant, seed, Code("one", "commit-one"), tmp_path / "runs", source)

    return make
