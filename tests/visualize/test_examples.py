"""Pictures during training: when they are asked for, where they go, and what they leave alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from detfamily.config import compose
from detfamily.engine.train import train
from detfamily.errors import ConfigError
from detfamily.tracking.trackers import Trackers

ROOT = Path(__file__).resolve().parents[2]
TINY = """
family=deformable_detr backbone=small backbone.stem_width=8 backbone.widths=[8,16,16,16] data=shapes
data.train_size=8 data.val_size=3 data.image_size=96 data.sides=[16,48] data.objects=[1,4] model.embed_dim=32
model.num_heads=4 model.ffn_dim=32 model.num_queries=10 encoder.num_layers=1 decoder.num_layers=2 drop_epochs=[]
schedule.epochs=3 schedule.total_batch_size=4 runtime.num_workers=0 runtime.threads=1 runtime.device=cpu
evaluation.pictures=0 augmentation=shapes model.dropout=0.1
""".split()


@pytest.fixture(autouse=True)
def torch_as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def run(root: Path, folder: Path, *words: str) -> dict:
    train(compose("train", [*TINY, f"data.root={root}", f"output_dir={folder}", *words]))
    return torch.load(folder / "last.pt", weights_only=True)


def leaves(value, prefix=""):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, one in items:
        yield from leaves(one, f"{prefix}/{key}")
    if not isinstance(value, dict | list | tuple):
        yield prefix, value


def test_pictures_come_when_they_are_asked_for_and_change_nothing_else(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    monkeypatch.setattr(
        Trackers, "log_image", lambda self, name, path, step: sent.append((name, path.parent.name, step))
    )
    plain = run(root, tmp_path / "plain")
    assert not (tmp_path / "plain" / "visualization").exists() and [name for name, *_ in sent] == ["curves"]
    sent.clear()
    drawn = run(root, tmp_path / "drawn", "visualization.every=2")
    first, second = (dict(leaves({key: one[key] for key in ("model", "optimizer", "rng", "step", "meter", "best")}))
                     for one in (plain, drawn))  # fmt: skip
    assert first.keys() == second.keys()
    for path, value in first.items():
        same = torch.equal(value, second[path]) if isinstance(value, torch.Tensor) else value == second[path]
        assert same, f"{path} differs"

    pictures = sorted((tmp_path / "drawn" / "visualization").rglob("*"))
    names = [path.relative_to(tmp_path / "drawn").as_posix() for path in pictures if path.is_file()]
    assert len(names) == 2 and all(name.startswith("visualization/epoch_0002/") for name in names)
    assert all(Image.open(tmp_path / "drawn" / name).format == "PNG" for name in names)
    ids = [Path(name).stem for name in names]
    assert sent == [*((f"visualization/{one}", "epoch_0002", 4) for one in ids), ("curves", "drawn", 6)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["visualization.every=1", "visualization.what=[backbone]"],
            "what=backbone: this detector has no attention there",
        ),
        (["visualization.every=1", "visualization.what=[box]"], "what='box': did you mean 'boxes'"),
        (["visualization.every=0"], "visualization.every is 0; expected at least 1"),
        (["visualization.images=0"], "visualization.images is 0; expected at least 1"),
        (["visualization.queries=0"], "visualization.queries is 0; expected at least 1"),
    ],
)
def test_mistakes_are_named_before_any_work(words: list[str], message: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(root, tmp_path / "run", *words)
    assert message in str(caught.value) and not (tmp_path / "run").exists()


def test_wandb_gets_them(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    words = [
        *TINY,
        "schedule.epochs=1",
        "visualization.every=1",
        "visualization.what=[boxes]",
        "visualization.images=1",
    ]
    words += ["tracking=wandb", "tracking.wandb.mode=offline", f"data.root={root}", f"output_dir={folder}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "detfamily", "train", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (picture,) = (folder / "visualization" / "epoch_0001").glob("*.png")
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    (kept,) = log.parent.glob("files/media/images/visualization/*.png")
    assert kept.read_bytes() == picture.read_bytes()
