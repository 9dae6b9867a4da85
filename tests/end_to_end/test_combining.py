"""docs/combining.md: the diff of its new query idea applies, and the result trains."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("backbone=small", "backbone.stem_width=4", "backbone.widths=[8,8,8,8]"),
    *("model.embed_dim=32", "model.num_heads=4", "model.ffn_dim=24", "encoder.num_layers=1", "decoder.num_layers=2"),
)
STEP = """
import sys, torch
from detfamily.build import build_criterion, build_detector
from detfamily.config import compose
from detfamily.structures import Images, Targets

cfg = compose("train", sys.argv[1:])
detector, criterion = build_detector(cfg, 5), build_criterion(cfg)
pixels = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
images = Images(pixels, torch.zeros(1, 96, 96, dtype=torch.bool), ((96, 96),), ((96, 96),), (0,))
targets = Targets.from_lists([torch.tensor([1])], [torch.tensor([[0.5, 0.5, 0.2, 0.3]])])
criterion(detector(images, targets), targets).total.backward()
assert all(one.grad is not None for one in detector.parameters())
print(detector.query_source.reference.points.tolist())
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the page's diff."""
    folder = tmp_path_factory.mktemp("patched")
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "docs" / "combining.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (folder / "idea.diff").write_text(diff, encoding="utf-8")
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}  # no repository around it
    subprocess.run(["git", "apply", "idea.diff"], cwd=folder, env=outside, check=True, capture_output=True, text=True)
    assert (folder / "configs" / "query_source" / "grid_points.yaml").is_file()
    return folder


def step(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STEP, *overrides, "query_source=grid_points", *SMALL]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("overrides", [("family=deformable_detr", "decoder=refine"), ("family=conditional_detr",)])
def test_the_new_idea_trains_a_step_with_denoising(patched: Path, overrides: tuple[str, ...]) -> None:
    done = step(patched, *overrides, "denoising=dn", "model.num_queries=4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]")


def test_a_number_of_queries_that_is_no_square_is_refused(patched: Path) -> None:
    done = step(patched, "family=deformable_detr", "decoder=refine", "model.num_queries=6")
    assert done.returncode != 0 and "a grid needs a square number, such as 4" in done.stderr
