"""``detfamily classify``: training and evaluating classifiers, with the loop of ``detfamily.engine.train``."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from omegaconf import DictConfig
from torch import nn

from detfamily.checkpoints.transfer import Initial, Report
from detfamily.classification.accuracy import Accuracy, measure
from detfamily.classification.build import build_classifier
from detfamily.classification.classifier import Classifier
from detfamily.classification.weights import read_initial, start_from
from detfamily.config import build, validate
from detfamily.data.loader import naming_lost_workers, validation_loader
from detfamily.engine.distributed import World, join
from detfamily.engine.evaluate import evaluation_batch_size
from detfamily.engine.run import FROZEN_AT_RANDOM, frozen_at_random, label_words, listing, parameter_words
from detfamily.engine.runtime import Runtime
from detfamily.engine.train import Trainer, run
from detfamily.errors import ConfigError


def classify(cfg: DictConfig) -> dict[str, float]:
    """Train a classifier as ``detfamily.engine.train.train`` does a detector; or evaluate one, with ``evaluate_only``.

    Args:
        cfg: composed from ``classify.yaml``.

    Returns:
        top1 and top5 as fractions, val_loss, and of a training those of its last epoch.

    Raises:
        ConfigError, DataError, CheckpointError: something is wrong with what was asked for; before any work. In the
            middle of a training as in that of a detector.
    """
    return evaluate(cfg) if cfg.evaluate_only else run(ClassifierTrainer, cfg)


class ClassifierTrainer(Trainer):
    """Training of a classifier: softmax cross-entropy, top-1."""

    metric = "top1"

    def build_net(self, pretrained: bool) -> nn.Module:
        return build_classifier(self.cfg, self.data.label_map.num_classes, pretrained and self.cfg.pretrained)

    def build_criterion(self) -> nn.Module:
        criterion: nn.Module = build(self.cfg.criterion)
        return criterion

    def read_initial(self) -> Initial:
        return read_initial(self.cfg.init_from, self.cfg.init_ema)

    def start_from(self, given: Initial, net: nn.Module) -> Report:
        return start_from(cast("Classifier", net), given, self.data.label_map, self.cfg.init_partial)

    def measure(self) -> Accuracy | None:
        return measure(
            self.evaluated, self.val_loader, self.runtime, self.world, stopped=lambda: self.interruption.wanted
        )

    def concerns(self) -> list[str]:
        backbone = self.cfg.backbone if self.cfg.pretrained else {**self.cfg.backbone, "weights": None}
        starts_from_weights = self.start.checkpoint is not None or self.cfg.init_from is not None
        return [FROZEN_AT_RANDOM] * frozen_at_random(backbone, starts_from_weights)


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Evaluate the weights of ``init_from``; with ``output_dir`` the numbers are written there, as ``metrics.json``."""
    validate(cfg)
    if cfg.init_from is None:
        raise ConfigError("evaluate_only=true needs weights: init_from=runs/NAME/best.pt, or an official file")
    runtime: Runtime = build(cfg.runtime)
    runtime.apply()
    with join(runtime.device_type) as world, naming_lost_workers():
        return _evaluate(cfg, runtime, world)


def _evaluate(cfg: DictConfig, runtime: Runtime, world: World) -> dict[str, float]:
    initial = read_initial(cfg.init_from, cfg.init_ema)
    with world.main_first():
        data = build(cfg.data)
    net = build_classifier(cfg, data.label_map.num_classes, pretrained=False)
    report = start_from(net, initial, data.label_map, cfg.init_partial)
    size = evaluation_batch_size(cfg, world)
    dataset = data.validation(build(cfg.augmentation.test))
    rows = [
        ("data", data.describe()),
        ("labels", label_words(data.label_map.names)),
        ("model", parameter_words(net)),
        ("device", runtime.describe(world.size)),
        ("batch", f"{size} images at once"),
        *report.rows,
    ]
    world.say(f"evaluating {cfg.name}\n{listing(rows)}")
    for words in report.warnings:
        world.say(f"warning: {words}")
    loader = validation_loader(dataset, size, runtime.num_workers, world.rank, world.size)
    accuracy = measure(net.to(runtime.torch_device(world.local_rank)), loader, runtime, world)
    assert accuracy is not None
    world.say(accuracy.table())
    if cfg.output_dir is not None and world.is_main:
        world.say(f"numbers in {accuracy.write(Path(str(cfg.output_dir)).expanduser())}")
    return accuracy.numbers()
