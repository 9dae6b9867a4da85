"""Tables of classifiers: every row composed, as published and on the miniature, and built small, with one step."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import yaml

from detfamily.classification.build import build_classifier
from detfamily.config import build, compose, groups, to_container, validate
from detfamily.engine.optim import AdamW, clip_gradients
from detfamily.engine.runtime import plan
from detfamily.errors import ConfigError
from detfamily.experiments.runner import Run
from detfamily.experiments.scale import Variant, variants
from detfamily.experiments.table import Table, read_table, table_files
from detfamily.experiments.task import CLASSIFICATION
from detfamily.experiments.version import Code
from detfamily.structures import Images, Targets

ROOT = Path(__file__).resolve().parents[2]
FILES = [file for file in table_files(ROOT / "experiments") if "task" in yaml.safe_load(file.read_text())]
NAMES = [f"{file.parent.name}/{file.stem}" for file in FILES]
CLASSES = 5

each_table = pytest.mark.parametrize("file", FILES, ids=NAMES)


def rows() -> list:
    found = [(file, row["label"]) for file in FILES for row in yaml.safe_load(file.read_text())["rows"]]
    return [pytest.param(file, label, id=f"{file.parent.name}/{file.stem}/{label}") for file, label in found]


@functools.cache
def table(file: Path) -> Table:
    return read_table(file)


@functools.cache
def on(file: Path, scale: str) -> dict[str, Variant]:
    return variants(table(file), scale, ["data.root=."] if scale == "imagenet" else [])


@functools.cache
def step(words: tuple[str, ...]) -> tuple[float, float]:
    """Loss and gradient norm of one step on the miniature, made smaller still."""
    cfg = compose("classify", [*words, "backbone.embed_dim=24", "data.root=."])
    validate(cfg)
    assert plan(build(cfg.schedule), build(cfg.runtime), 1, 8000).total_batch_size == cfg.schedule.total_batch_size
    torch.manual_seed(0)
    classifier = build_classifier(cfg, CLASSES, pretrained=False).train()
    with torch.no_grad():
        for one in classifier.parameters():  # some weights start at zero, and hide what lies before them
            one.add_(0.02 * torch.randn_like(one))
    recipe: AdamW = build(cfg.optimizer)
    optimizer = recipe.build(classifier)
    sizes = ((64, 64),) * 2
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    images = Images(pixels, torch.zeros(2, 64, 64, dtype=torch.bool), sizes, sizes, (7, 8))
    box = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    targets = Targets.from_lists([torch.tensor([1]), torch.tensor([4])], [box, box], [7, 8])
    total = build(cfg.criterion)(classifier(images, targets), targets).total
    total.backward()
    idle = [name for name, one in classifier.named_parameters() if one.requires_grad and one.grad is None]
    assert total.isfinite() and not idle
    norm = clip_gradients(classifier.parameters(), recipe.clip_norm)
    assert norm.isfinite() and norm > 0
    optimizer.step()
    return total.item(), norm.item()


def test_every_table_is_there():
    """DAT: tables 2, 6 and 7, figure 4 of the paper; the way from there to DAT++, of which only the ends are known."""
    assert {name: len(table(file).rows) for name, file in zip(NAMES, FILES, strict=True)} == {
        "dat/against_swin": 6,
        "dat/offset_range": 14,
        "dat/offsets": 8,
        "dat/roadmap": 5,
        "dat/stages": 5,
    }


@each_table
def test_a_table_is_well_formed(file):
    one = table(file)
    assert one.task is CLASSIFICATION
    recipe = compose("classify", [f"experiment={one.base}", "data.root=."])
    # Where there are several baselines, the recipe may be none of them.
    (published,) = [row for row in one.rows if not row.overrides]
    known = {entry["top1"] for entry in to_container(recipe)["published"]}
    assert published.label == one.baseline or len(one.baselines) > 1
    assert any(abs(published.published["top1"] - figure) < 0.05 for figure in known)
    assert all(row.published or row.note for row in one.rows)


@each_table
def test_no_two_rows_are_the_same(file):
    for scale in ("imagenet", "mini"):
        found = on(file, scale)
        assert len({one.identity for one in found.values()}) == len(found)
        assert not any(one.remark for one in found.values())


@pytest.mark.parametrize(("file", "label"), rows())
def test_a_row_composes_builds_and_steps(file, label):
    assert on(file, "imagenet")[label].config["data"]["_target_"].endswith("ImageFolders")
    variant = on(file, "mini")[label]
    assert variant.images == 24_000
    step(variant.overrides)


@each_table
def test_rows_compute_different_things(file):
    """From the same random numbers, a switch that nothing reads would give the same step."""
    found = [step(one.overrides) for one in on(file, "mini").values()]
    assert len(set(found)) == len(found)


def test_runs_of_a_table_are_those_of_its_task(tmp_path):
    file = FILES[NAMES.index("dat/stages")]
    variant = on(file, "mini")["none"]
    run = Run("dat/stages", "mini", variant, 3, Code("a", "b"), tmp_path)
    assert run.words()[0] == "classify" and {"seed=3", "resume=auto"} <= set(run.words())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "segmentation"}, "task: there is no task 'segmentation': valid names: classification, detection"),
        ({"base": "detr_r50_300ep"}, "there is no experiment 'detr_r50_300ep'"),
        ({"task": "detection"}, "there is no experiment 'dat_t'"),
        ({"rows": [{"label": "a", "overrides": [], "published": {"AP": 1}}]}, "unknown key 'AP'"),
        (
            {"rows": [{"label": "a", "overrides": []}, {"label": "b", "overrides": [], "weights_of": "a"}]},
            "weights_of: only detectors can be evaluated in other ways",
        ),
    ],
)
def test_mistakes_in_a_table_are_named(tmp_path, change, words):
    content = yaml.safe_load(FILES[-1].read_text()) | {"baseline": "a"} | change
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=words):
        read_table(tmp_path / "table.yaml")


def test_the_scales_are_those_of_the_task():
    assert groups()["classify/scale"] == ["imagenet", "mini"]
    with pytest.raises(ConfigError, match="there is no scale 'coco': valid names: imagenet, mini"):
        variants(table(FILES[0]), "coco")
