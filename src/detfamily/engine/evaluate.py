"""Evaluation: the validation set through a model, a checkpoint on any data set, a results file without a model."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from detfamily.auxiliary.branch import Branch
from detfamily.build import build_detector, build_postprocess
from detfamily.config import build, compose, configs_dir, groups, to_container, validate
from detfamily.data.batches import collate
from detfamily.data.labels import LabelMap
from detfamily.data.loader import Loader, validation_loader
from detfamily.detector import Detector
from detfamily.engine.checkpoint import load_model, load_weights
from detfamily.engine.collapse import QuerySpread
from detfamily.engine.distributed import World, join
from detfamily.engine.run import label_words, listing, parameter_words
from detfamily.engine.runtime import Runtime
from detfamily.errors import CheckpointError, ConfigError, DataError
from detfamily.evaluation.coco_metrics import CocoEvaluator, CocoMetrics
from detfamily.evaluation.results import evaluate_results, write_results
from detfamily.files import write_text_atomically
from detfamily.structures import Batch, Detections, Images, Predictions
from detfamily.tracking.console import ProgressBar
from detfamily.visualize.boxes import draw_comparison

_NEEDED_NODES = (
    *("name", "family_name", "model", "backbone", "classification", "decoder", "detector", "criterion", "postprocess"),
    *("data", "augmentation", "schedule", "runtime", "evaluation"),
)
"""What every config has, so that a stored one without it is damaged."""

Postprocess = Callable[[dict[str, Predictions], Images], list[Detections]]


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on a validation set.

    Attributes:
        metrics: COCO's numbers.
        results: COCO's results form of all detections; in the main process.
        batch_size: images computed at once. It belongs to the AP: padding to a common size changes what these
            detectors answer.
        query_spread: how much the queries' boxes differ within an image, a share of it (see ``collapse``).
    """

    metrics: CocoMetrics
    results: list[dict[str, Any]]
    batch_size: int
    query_spread: float

    def numbers(self) -> dict[str, float]:
        """The twelve numbers, "AP/name" of each class that has objects, and the spread of the queries that answer."""
        per_class = {f"AP/{name}": value for name, value in self.metrics.per_class.items() if value >= 0}
        spread = {} if math.isnan(self.query_spread) else {"query_spread": self.query_spread}
        return {**self.metrics.stats, **per_class, **spread}

    def table(self) -> str:
        return f"{self.metrics.table()}\n(evaluated in batches of {self.batch_size})"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write COCO's results json and the numbers; return both paths."""
        results, metrics = folder / "results_val.json", folder / "metrics.json"
        write_results(results, self.results)
        write_numbers(metrics, {**self.numbers(), "batch_size": self.batch_size})
        return results, metrics


@torch.inference_mode()
def detect(
    model: nn.Module,
    postprocess: Postprocess,
    images: Images,
    runtime: Runtime,
    spread: QuerySpread | None = None,
) -> list[Detections]:
    """Detections of a batch, in pixels of the original images, on the model's device; ``spread`` sees the boxes."""
    with runtime.autocast():
        predictions = model(images)
    if isinstance(model, Branch):
        return cast("list[Detections]", predictions)
    if spread is not None:
        spread.update(predictions["match"])
    found: list[Detections] = postprocess(predictions, images)
    return found


def evaluate_model(
    model: nn.Module,
    loader: Loader,
    postprocess: Postprocess,
    evaluator: CocoEvaluator,
    batch_size: int,
    runtime: Runtime,
    world: World,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate a model on a validation set; each process takes its share of the images.

    Args:
        model: on its device; it is put into evaluation mode, and back.
        loader: this process' share.
        postprocess: predictions -> detections.
        evaluator: with nothing in it yet.
        batch_size: the loader's, to be told with the numbers.
        runtime: says the device and the precision.
        world: the processes.
        stopped: asked between batches whether to give up.

    Returns:
        The evaluation, in every process; None if any process was stopped.

    Raises:
        DataError: an image is missing or broken, in any process.
    """
    spread = QuerySpread(world)

    def consume(batch: Batch) -> None:
        evaluator.update(batch.images.image_ids, detect(model, postprocess, batch.images, runtime, spread))

    if not go_through(model, loader, consume, runtime, world, stopped):
        return None
    shares = world.gather_objects(evaluator.results())
    for share in shares[1:]:
        evaluator.extend(share)
    metrics = world.from_main(evaluator.summarize() if world.is_main else None)
    assert metrics is not None
    return Evaluation(metrics, evaluator.results() if world.is_main else [], batch_size, spread.read())


def go_through(
    model: nn.Module,
    loader: Loader,
    consume: Callable[[Batch], object],
    runtime: Runtime,
    world: World,
    stopped: Callable[[], bool],
) -> bool:
    """Show a model this process' share of a validation set; a call of all processes.

    Args:
        model: is put into evaluation mode, and back.
        loader: of the share.
        consume: called with each batch, on the device.
        runtime: says the device.
        world: the processes.
        stopped: asked between batches whether to give up.

    Returns:
        False if any process was stopped.

    Raises:
        DataError: an image is missing or broken, in any process.
    """
    was_training, device = model.training, runtime.torch_device(world.local_rank)
    model.eval()
    failure = None
    with ProgressBar("evaluating", len(loader), shown=world.is_main) as bar:
        try:
            for batch in loader:
                if stopped():
                    break
                consume(batch.to(device, non_blocking=True))
                bar.advance()
        except DataError as error:
            failure = error
    model.train(was_training)
    rows = world.gather_numbers([failure is not None, stopped()])
    if any(row[0] for row in rows):
        world.end_together(failure)
    return not any(row[1] for row in rows)


def draw_examples(
    model: nn.Module,
    dataset: Any,
    postprocess: Postprocess,
    names: dict[int, str],
    runtime: Runtime,
    path: Path,
    count: int,
    batch_size: int,
) -> None:
    """Draw what a model finds in the first images of a data set, beside what is there.

    Args:
        model: on its device.
        dataset: gives samples by index, and by ``load`` as they are on disk.
        postprocess: predictions -> detections.
        names: label -> class name.
        runtime: says the device and the precision.
        path: the PNG.
        count: number of images.
        batch_size: images computed at once.
    """
    was_training = model.training
    model.eval()
    device = runtime.torch_device()
    stored = [dataset.load(index) for index in range(min(count, len(dataset)))]
    found: list[Detections] = []
    for first in range(0, len(stored), batch_size):
        samples = [dataset[index] for index in range(first, min(first + batch_size, len(stored)))]
        images = collate(samples).images.to(device)
        found += [one.cpu() for one in detect(model, postprocess, images, runtime)]
    model.train(was_training)
    truths = [(sample.boxes, sample.labels) for sample in stored]
    draw_comparison([sample.image for sample in stored], truths, found, names, path)


def evaluate(overrides: Sequence[str]) -> dict[str, float]:
    """``detfamily evaluate``: a checkpoint on its own or another data set, or a results file without a model.

    ``checkpoint=PATH`` rebuilds the model from the config and the labels that the checkpoint carries; every further
    override of ``detfamily train`` is applied on top of that config (``data=coco data.root=...``,
    ``evaluation.batch_size=1``, ``postprocess.num_select=300``). ``results=PATH data=...`` scores COCO's results json.
    ``output_dir`` is where ``results_val.json`` and ``metrics.json`` go; by default a new folder beside the checkpoint.

    Returns:
        The numbers: AP, AP50, ... as fractions, and "AP/name" of each class.

    Raises:
        ConfigError: neither or both of checkpoint and results, or an override that cannot be applied.
        CheckpointError: the checkpoint is missing, broken, or does not fit the overridden model.
        DataError: the data set or the results file is missing or broken.
    """
    own, others = split_overrides(overrides, ("checkpoint", "results", "output_dir"))
    if (own["checkpoint"] is None) == (own["results"] is None):
        raise ConfigError(
            "say what to evaluate, one of the two: checkpoint=runs/NAME/best.pt, or results=FILE.json data=..."
        )
    if own["results"] is not None:
        return _evaluate_file(Path(own["results"]), own["output_dir"], others)
    return _evaluate_checkpoint(Path(own["checkpoint"]), own["output_dir"], others)


def _evaluate_checkpoint(path: Path, output_dir: str | None, overrides: Sequence[str]) -> dict[str, float]:
    loaded = load_model(path)
    cfg = on_top_of(loaded.config, overrides)
    validate(cfg)
    label_map = LabelMap.from_state_dict(loaded.label_map)
    runtime: Runtime = build(cfg.runtime)
    runtime.apply()
    with join(runtime.device_type) as world:
        with world.main_first():
            data = build(cfg.data)
        branch = cfg.evaluation.get("branch")  # files of before have none
        detector = restore_detector(cfg, label_map.num_classes, loaded.weights, path, branch)
        model = answering(detector, branch).to(runtime.torch_device(world.local_rank))
        size = evaluation_batch_size(cfg, world)
        dataset = data.validation(build(cfg.augmentation.test))
        rows = [
            ("checkpoint", str(path)),
            ("data", data.describe()),
            ("labels", label_words(label_map.names)),
            ("model", parameter_words(model)),
            ("device", runtime.describe(world.size)),
            ("batch", f"{size} images at once"),
        ]
        world.say(f"evaluating {cfg.name}\n{listing(rows)}")
        label_map = by_name(label_map, data.label_map, world)
        evaluation = evaluate_model(
            model,
            validation_loader(dataset, size, runtime.num_workers, world.rank, world.size),
            build_postprocess(cfg),
            new_evaluator(cfg, data, label_map),
            size,
            runtime,
            world,
        )
        assert evaluation is not None
        if world.is_main:
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            folder = Path(output_dir) if output_dir else path.parent / f"evaluate-{path.stem}-{stamp}"
            folder.mkdir(parents=True, exist_ok=True)
            files = evaluation.write(folder)
            world.say(f"{evaluation.table()}\nresults in {files[0]}, numbers in {files[1]}")
        return evaluation.numbers()


def restore_detector(
    cfg: DictConfig, num_classes: int, weights: Mapping[str, Tensor], source: str | Path, branch: str | None = None
) -> Detector:
    """A detector as its training left it, but for auxiliary heads, unless one of them is to answer.

    Args:
        cfg: that of its training; auxiliary heads are taken from it.
        num_classes: columns of the class head.
        weights: its state dict.
        source: the checkpoint, for messages.
        branch: the auxiliary head that is to answer; None for the decoder.

    Raises:
        CheckpointError: the weights do not fit.
    """
    if branch is None and cfg.get("auxiliary") is not None:
        cfg.auxiliary = None
        weights = {name: one for name, one in weights.items() if not name.startswith("auxiliary.")}
    detector = build_detector(cfg, num_classes, pretrained=False)
    load_weights(detector, weights, source)
    return detector


def answering(detector: Detector, branch: str | None) -> nn.Module:
    """What is evaluated: the detector, or one of its auxiliary heads."""
    return detector if branch is None else Branch(detector, branch)


def _evaluate_file(results: Path, output_dir: str | None, overrides: Sequence[str]) -> dict[str, float]:
    if not any(one.partition("=")[0] == "data" for one in overrides):
        raise ConfigError("results=... needs the data set that it is about, e.g. data=coco data.root=/path/to/coco")
    cfg = compose("train", overrides)
    data = build(cfg.data)
    metrics = evaluate_results(data.validation_annotations, results, data.area_ranges, cfg.evaluation.backend)
    print(f"{results} against {data.validation_annotations}\n{metrics.table()}")
    numbers = {**metrics.stats, **{f"AP/{name}": value for name, value in metrics.per_class.items() if value >= 0}}
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_numbers(Path(output_dir) / "metrics.json", numbers)
    return numbers


def by_name(trained: LabelMap, present: LabelMap, world: World) -> LabelMap:
    """The classes that a model was trained on, with the category ids of another data set.

    Names decide: two data sets may number the same classes differently, or different classes alike. Columns of classes
    that the data set does not have stand for nothing, and their detections are dropped.

    Raises:
        DataError: not one class in common.
    """
    if trained == present:
        return trained
    ids = {name: one for name, one in zip(present.names, present.category_ids, strict=True) if name is not None}
    common = {name for name in trained.names if name in ids}
    if not common:
        raise DataError(
            f"the checkpoint knows {label_words(trained.names)}; the data set has {label_words(present.names)}: "
            "not one class in common"
        )
    for words, names in (
        ("the data set does not have, so they are left out", set(trained.names) - common - {None}),
        ("the checkpoint does not know, so they are missed", set(ids) - common),
    ):
        if names:
            world.say(f"warning: classes that {words}: {label_words(sorted(str(name) for name in names))}")
    return LabelMap(
        tuple(ids[name] if name in common and name is not None else None for name in trained.names),
        tuple(name if name in common else None for name in trained.names),
    )


def new_evaluator(cfg: DictConfig, data: Any, label_map: LabelMap) -> CocoEvaluator:
    """An empty evaluator of a data set, for a model that knows these labels."""
    return CocoEvaluator(data.validation_annotations, label_map, data.area_ranges, cfg.evaluation.backend)


def evaluation_batch_size(cfg: DictConfig, world: World) -> int:
    """Images that a process evaluates at once: the setting, else as many as it trains on at once."""
    share = cfg.schedule.total_batch_size // world.size
    choices = (cfg.evaluation.batch_size, cfg.runtime.batch_size_per_device, max(1, share))
    size = int(next(one for one in choices if one is not None))
    if size < 1:
        raise ConfigError(f"evaluation.batch_size is {size}; expected 1 or more, or null for as in training")
    return size


def split_overrides(overrides: Sequence[str], own: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Tell a command's own fields from the overrides of the config that it works on.

    Returns:
        the own fields, parsed, None where not given; the other overrides.
    """
    mine = [one for one in overrides if one.partition("=")[0] in own]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "own.yaml").write_text("".join(f"{name}: null\n" for name in own), encoding="utf-8")
        parsed = to_container(compose("own", mine, configs=Path(folder)))
    return parsed, [one for one in overrides if one not in mine]


def on_top_of(stored: dict[str, Any], overrides: Sequence[str]) -> DictConfig:
    """Apply overrides to a stored config, as if it had been composed just now.

    ``group=choice`` takes the node of that name from the config files in place of the stored one; ``field=value``
    changes the stored node, or the newly chosen one.

    Args:
        stored: a checkpoint's config, plain containers with their interpolations.
        overrides: as for ``detfamily train``.

    Raises:
        ConfigError: an unknown group, choice or field, with the nearest names.
        CheckpointError: the stored config is not whole.
    """
    if lacking := [node for node in _NEEDED_NODES if node not in stored]:
        raise CheckpointError(f"the checkpoint is damaged: its config has no {', '.join(lacking)}")
    registry = [group for group in groups() if "/" not in group]
    chosen = {one.partition("=")[0].lstrip("~+") for one in overrides} & set(registry)
    if presets := sorted(chosen & {"family", "experiment"}):
        raise ConfigError(
            f"{presets[0]}=... would change the model, which the checkpoint has settled; override single nodes instead"
        )
    body = {key: value for key, value in stored.items() if key not in chosen}
    # The stored config plays the primary config in a copy of the config folder, so that every rule of composition
    # and every message is that of training.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(configs_dir(), folder, dirs_exist_ok=True)
        defaults: list[Any] = ["_self_", *({group: None} for group in sorted(chosen))]
        text = yaml.safe_dump({"defaults": defaults, **body}, sort_keys=False)
        (Path(folder) / "stored.yaml").write_text(text, encoding="utf-8")
        cfg = compose("stored", overrides, configs=Path(folder))
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    return cfg


def write_numbers(path: Path, numbers: dict[str, float]) -> None:
    """Write numbers as json."""
    write_text_atomically(path, json.dumps(numbers, indent=2) + "\n")
