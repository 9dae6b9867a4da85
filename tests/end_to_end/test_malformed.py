"""What people mistype and what files go through: a clear error and status 2, no traceback, and nothing is begun."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detfamily import cli
from detfamily.engine.train import Trainer

SMALL = "backbone=small data.train_size=4 data.val_size=2 data.image_size=64 schedule.total_batch_size=2"

OVERRIDES = """
family=dertr / family= / experiment=nope / backbone=resnet5 / bakbone=resnet50 / level_embed=3 / schedule=stairs
model.num_querys=3 / model.num_queries=0 / model.num_queries=-5 / model.num_queries=many / model.num_queries=1.5
model.embed_dim=0 / model.embed_dim=7 / model.embed_dim=-8 / model.num_heads=3 / model.num_heads=0 / model.ffn_dim=0
model.dropout=2 / model.dropout=-0.1 / model.num_levels=0 / model.num_classes=7 / model.stages=3 / model.stages=[9]
model.stages=[] / model.stages=[4,3] / encoder.num_layers=-1 / decoder.num_layers=0 / position.temperature=0
cross_attention=nope / query_source=proposals / postprocess.nms_iou=2 / postprocess.num_detections=0
optimizer.lr=-1 / optimizer.lr=nan / optimizer.lr=fast / optimizer.weight_decay=-1 / optimizer.clip_norm=-1
optimizer=sgdd / optimizer.groups.backbone.pattern=[ / optimizer.groups.nothing.lr=1 / drop_epochs=soon
drop_epochs=[-1] / schedule.epochs=0 / schedule.epochs=1.5 / schedule.epochs=-3 / schedule.total_batch_size=0
schedule.total_batch_size=-8 / schedule.images_per_epoch=0 / seed=-1 / seed=abc / name= / name=a/b
resume=auto / resume=missing.pt / resume=text.pt / init_from=missing.pth / init_from=html.pth / init_from=evil.pth
data=imagenet / data=coco / data.image_size=0 / data.image_size=-32 / data.num_train=0 / data.difficulty=7
runtime=fp8 / runtime.precision=fp8 / runtime.threads=0 / runtime.num_workers=-1 / runtime.device=gpu0
runtime.device=cuda:77 / runtime.batch_size_per_device=0 / evaluation.every=0 / evaluation.batch_size=0
evaluation.backend=coco / evaluation.pictures=-1 / checkpoint.every=0 / checkpoint.every_seconds=-1
tracking=wandbb / tracking.log_every=0 / model / =3 / model.=3 / .=3 / +new.thing=1 / ~family / ~model.num_queries
++model=3 / model=3 / hydra.run.dir=x / criterion.matcher.cost_class=-1 / criterion.losses=3 / augmentation=none_such
augmentation.short_sides=[] / -x / --cgf / output_dir=file.txt/run
"""

COMMANDS = """
trian / evaluate / evaluate checkpoint=none.pt / evaluate checkpoint=. / evaluate checkpoint=text.pt
evaluate checkpoint=zip.pt / evaluate checkpoint=cut.pt / evaluate checkpoint=evil.pth / evaluate checkpoint=list.pt
evaluate chekpoint=text.pt / evaluate results=none.json data=coco data.root=nowhere / predict
predict checkpoint=none.pt source=photo.jpg / predict checkpoint=text.pt source=photo.jpg
predict checkpoint=cut.pt source=photo.jpg / predict checkpoint=cut.pt source=nowhere / predict chekpoint=x
convert / convert none.pth out.pt / convert text.pt out.pt / convert html.pth out.pt / convert evil.pth out.pt
convert cut.pt out.pt / convert list.pt out.pt / convert a b c d / check-data data=coco data.root=nowhere
check-data check.limit=-1 data=coco data.root=nowhere / check-data data=cocoo / import-data format=pascal root=.
import-data format=voc root=nowhere / import-data format=yolo root=nowhere / ablate / ablate none.yaml
ablate broken.yaml scale=mini / ablate broken.yaml scale=huge / report / report none.yaml / doctor now
train data=coco data.root=nowhere / train data=coco data.root=file.txt / train data=coco data.root=empty
"""


def split(text: str) -> list[str]:
    """Entries stand between slashes with spaces around them, or lines."""
    return [entry.strip() for line in text.strip().splitlines() for entry in line.split(" / ")]


CALLS = [f"train {SMALL} {override}" for override in split(OVERRIDES)] + split(COMMANDS)


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("planted",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are not what their names say."""
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "text.pt").write_text("no checkpoint")
    (folder / "html.pth").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (folder / "file.txt").write_text("a file")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (folder / "broken.yaml").write_text("rows: [\n")
    (folder / "empty").mkdir()
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("a", "b")
    torch.save({"model": {}, "args": Evil()}, folder / "evil.pth")
    torch.save([1, 2, 3], folder / "list.pt")
    torch.save({"model": {"weight": torch.zeros(1000)}}, folder / "cut.pt")
    (folder / "cut.pt").write_bytes((folder / "cut.pt").read_bytes()[:2000])
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "evil.pth", weights_only=True)
    return folder


def test_there_are_enough_of_them() -> None:
    assert len(set(CALLS)) == len(CALLS) >= 130


@pytest.mark.parametrize("call", CALLS)
def test_malformed(
    call: str,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def begun(self: Trainer) -> None:
        pytest.fail(f"the training of {call!r} has begun")

    monkeypatch.setattr(Trainer, "train_epoch", begun)
    monkeypatch.setenv("DETFAMILY_CACHE", str(tmp_path_factory.getbasetemp() / "images"))
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert cli.main(call.split()) == cli.FAILED
    error = capsys.readouterr().err
    assert "detfamily: " in error and "Traceback" not in error
    assert len(error.rpartition("detfamily: ")[2].strip()) > 15  # it says something
    assert sorted(folder.rglob("*")) == before  # no run folder, and nothing that a file had planted
