"""The training loop, for every family and every task.

From top to bottom: ``train`` sets a run up, ``Trainer.train`` goes through the epochs, ``train_epoch`` through the
steps, ``train_step`` through the micro-batches of one optimiser step. What is a detector's alone stands at the end, in
``DetectorTrainer``; ``detfamily.classification`` has what is a classifier's.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from detfamily.attention.ms_deform import MSDeformAttention
from detfamily.build import build_criterion, build_detector, build_postprocess, unread, with_num_classes
from detfamily.checkpoints.transfer import Initial, Report, read_initial, start_from
from detfamily.config import build, to_container, validate
from detfamily.criterion import Losses, Normalizer
from detfamily.data.loader import naming_lost_workers, train_loader, validation_loader
from detfamily.detector import Detector
from detfamily.engine import checkpoint
from detfamily.engine.collapse import collapse_words
from detfamily.engine.diagnosis import NOTHING, StepRecord, diagnose, tensors
from detfamily.engine.distributed import World, join
from detfamily.engine.evaluate import (
    Evaluation,
    answering,
    draw_examples,
    evaluate_model,
    evaluation_batch_size,
    new_evaluator,
)
from detfamily.engine.interrupt import Interruption
from detfamily.engine.meter import LossMeter
from detfamily.engine.optim import (
    AdamW,
    Ema,
    FiniteGuard,
    RunningStatistics,
    clip_gradients,
    gated_step,
    load_moments,
    moments,
    set_lr,
)
from detfamily.engine.run import (
    BEST,
    LAST,
    check_plan,
    concerns,
    find_start,
    frozen_at_random,
    label_words,
    listing,
    make_folder,
    parameter_words,
    write_config,
)
from detfamily.engine.runtime import Runtime, plan, rng_state, seed_all, set_rng_state
from detfamily.engine.schedule import Schedule
from detfamily.engine.sharding import share_out, whole_state
from detfamily.errors import CheckpointError, ConfigError, DataError, NonFiniteError, nearest, require_at_least
from detfamily.evaluation.coco_metrics import Backend
from detfamily.files import remove_parts
from detfamily.ops import backends
from detfamily.structures import Batch
from detfamily.tracking.console import ProgressBar
from detfamily.tracking.files import EPOCHS, read_rows
from detfamily.tracking.tracker import RunInfo, Tracker
from detfamily.tracking.trackers import Trackers
from detfamily.visualize.curves import plot_curves
from detfamily.visualize.examples import draw_attention
from detfamily.visualize.explain import Request
from detfamily.visualize.look import attentions_of


def train(cfg: DictConfig) -> dict[str, float]:
    """Train a detector, evaluate it after each epoch, and leave all results in the run folder.

    Under ``torchrun`` every process calls this, and the total batch is shared among them.

    Args:
        cfg: composed from ``train.yaml``.

    Returns:
        The numbers of the last epoch: AP, AP50, ... as fractions, loss, images_seen, ...

    Raises:
        ConfigError, DataError, CheckpointError: something is wrong with what was asked for; before any work.
        DataError: in the middle of the run, an image is missing or broken; ``last.pt`` holds the last finished step.
        CheckpointError, OutputError: in the middle of the run, a file cannot be written; those of before are intact.
        NonFiniteError: a loss or gradient was not finite, and ``runtime.on_non_finite`` is ``stop``.
        ElsewhereError: another process has one of these errors, or is gone.
        SystemExit: after Ctrl-C or SIGTERM; ``last.pt`` holds the state after the last finished step.
    """
    return run(DetectorTrainer, cfg)


def run(trainer: type[Trainer], cfg: DictConfig) -> dict[str, float]:
    """Check a config, set this process up, and train; as ``train``."""
    validate(cfg)
    runtime: Runtime = build(cfg.runtime)
    runtime.apply()
    with join(runtime.device_type) as world, Interruption() as interruption:
        made = trainer(cfg, runtime, world, interruption)
        with naming_lost_workers():
            return made.train()


class Result(Protocol):
    """How good a model is on a validation set."""

    def numbers(self) -> dict[str, float]:
        """Name -> number, as they are tracked."""
        ...

    def table(self) -> str:
        """The numbers for people."""
        ...

    def write(self, folder: Path) -> object:
        """Write ``metrics.json``, and what else there is."""
        ...


class Trainer:
    """One training run, in one process of possibly several.

    A task is a subclass; it says what the network, its criterion and its evaluation are.

    Args:
        cfg: composed from the task's primary config, and validated.
        runtime: built from it, and applied.
        world: the processes.
        interruption: what a signal wishes.

    Attributes:
        metric: of the evaluation, by which the best weights are kept; larger is better.
        net: the network, not wrapped for several processes.
    """

    metric: str

    def __init__(self, cfg: DictConfig, runtime: Runtime, world: World, interruption: Interruption) -> None:
        self.cfg, self.runtime, self.world, self.interruption = cfg, runtime, world, interruption
        self.device = runtime.torch_device(world.local_rank)
        self.start = find_start(cfg, world)
        state = checkpoint.load_run(self.start.checkpoint) if self.start.checkpoint else None
        given = None if state is not None or cfg.init_from is None else self.read_initial()
        self.schedule: Schedule = build(cfg.schedule)
        self.recipe: AdamW = build(cfg.optimizer)
        self.check_settings()

        with world.main_first():
            self.data = build(cfg.data)
        self.train_set = self.data.train(build(cfg.augmentation.train))
        self.val_set = self.data.validation(build(cfg.augmentation.test))
        self.plan = plan(self.schedule, runtime, world.size, len(self.train_set))
        self.config = to_container(with_num_classes(cfg, self.data.label_map.num_classes))

        seed_all(cfg.seed)
        self.initial: Report | None = None
        self.net = self._starting_net(state, given).to(self.device)
        self.criterion = self.build_criterion().to(self.device)
        self.ema = None if self.recipe.ema_decay is None else Ema(self.net, self.recipe.ema_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=runtime.precision == "fp16")
        self.statistics = RunningStatistics(self.net)
        self.guard = FiniteGuard(
            world, runtime.on_non_finite == "skip", scaled=runtime.precision == "fp16", explain=self.explain
        )
        self.meter = LossMeter(world)
        if runtime.compile:
            self.net.compile()
        self.whole: nn.Module | None = None
        self.model = self._spread(self.net)
        self.optimizer = self.recipe.build(self.net)
        # From here on the processes draw different numbers (dropout, noise); their weights are the main one's.
        seed_all(cfg.seed + world.rank)

        self.train_loader = train_loader(
            self.train_set,
            self.plan.batch_size_per_device,
            runtime.num_workers,
            cfg.seed,
            self.plan.images_per_epoch,
            world.rank,
            world.size,
        )
        self.val_batch_size = evaluation_batch_size(cfg, world)
        self.val_loader = validation_loader(
            self.val_set, self.val_batch_size, runtime.num_workers, world.rank, world.size
        )
        members = _trackers(cfg)  # made everywhere, so that a wrong setting ends all processes
        self.trackers = Trackers(members if world.is_main else [])

        self.epoch, self.steps_done = 0, 0
        self.best: float | None = None
        self.evaluation: Result | None = None
        self.judged: StepRecord | None = None
        self.failure: DataError | None = None
        self.stop_wanted = self.save_wanted = False
        self.saved_at = time.monotonic()
        if state is not None:
            self.load_state_dict(state)

    @property
    def step(self) -> int:
        """Optimiser steps since the start of the run."""
        return self.epoch * self.plan.steps_per_epoch + self.steps_done

    @property
    def images_seen(self) -> int:
        return self.step * self.plan.total_batch_size

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """All epochs, from where the run stands."""
        self.announce()
        numbers: dict[str, float] = {}
        completed = False
        try:
            while self.epoch < self.plan.epochs:
                started = time.perf_counter()
                numbers = self.train_epoch()
                if (self.epoch + 1) % self.cfg.evaluation.every == 0 or self.epoch + 1 == self.plan.epochs:
                    numbers |= self.evaluate()
                self.epoch, self.steps_done = self.epoch + 1, 0
                self.meter.reset()
                numbers["seconds_left"] = (time.perf_counter() - started) * (self.plan.epochs - self.epoch)
                self.trackers.log_epoch(numbers, self.epoch, self.step)
                self.draw_epoch()
                self.keep(numbers.get(self.metric))
            numbers = self.finish(numbers)
            completed = True
            return numbers
        finally:
            self.train_loader.close()
            self.val_loader.close()
            self.trackers.finish(completed)

    def train_epoch(self) -> dict[str, float]:
        """The steps of an epoch that are still to do; returns its training numbers."""
        self.model.train()
        self.train_loader.set_position(self.epoch, self.steps_done * self.plan.total_batch_size)
        batches = iter(self.train_loader)
        started, first = time.perf_counter(), self.steps_done
        steps, label = self.plan.steps_per_epoch, f"epoch {self.epoch + 1}/{self.plan.epochs}"
        with ProgressBar(label, steps - first, shown=self.world.is_main) as bar:
            while self.steps_done < steps:
                self.train_step(self.fetch(batches))
                self.steps_done += 1
                bar.advance(self.log_step())
                if self.stop_wanted and self.steps_done < steps:
                    self.leave()
                if self.save_wanted:
                    self.guard.look()
                    self.save([LAST])
        self.meter.read()
        self.guard.look()
        seconds = time.perf_counter() - started
        numbers = {**self.meter.epoch(), "lr": self.recipe.lr * self.factor(self.step - 1), "seconds": seconds}
        numbers["images_seen"] = self.images_seen
        if steps > first:
            numbers["images_per_second"] = (steps - first) * self.plan.total_batch_size / seconds
        if self.device.type == "cuda":
            numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return numbers

    def fetch(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of a step; empty if an image is not to be had, which the processes then tell each other."""
        try:
            return list(islice(batches, self.plan.accumulation))
        except DataError as error:
            self.failure = error
            return []

    def train_step(self, batches: list[Batch]) -> None:
        """One optimiser step from all its micro-batches."""
        normalizer, image_ids = self.meet(batches)
        record = StepRecord.of(batches, normalizer)
        self.statistics.remember()
        total: Tensor | None = None
        for index, batch in enumerate(batches):
            with self.averaging_gradients(index == len(batches) - 1):
                losses = self.forward(
                    batch.to(self.device, non_blocking=True), normalizer, self.guard.flags if index == 0 else None
                )
                self.scaler.scale(losses.total).backward()
            if index == 0:
                self.guard.look(losses.ride)
            total = losses.total.detach() if total is None else total + losses.total.detach()
            self.meter.add(losses.parts)
        assert total is not None
        self.check_reached()
        norm = self.update(total, image_ids)
        self.judged = record
        self.meter.add({"loss": total, "gradient_norm": norm})
        self.meter.step_done()

    def forward(self, batch: Batch, normalizer: Normalizer, ride: Tensor | None) -> Losses:
        """The losses of a micro-batch: the model in the chosen precision, the criterion in the heads' float32."""
        with self.runtime.autocast():
            predictions = self.model(batch.images, batch.targets)
        try:
            losses: Losses = self.criterion(predictions, batch.targets, normalizer, ride)
            return losses
        except NonFiniteError:  # left to the guard, so that all processes learn of it, and at the same point
            return Losses(_poisoned(tensors(predictions)), {}, {})

    def update(self, total: Tensor, image_ids: list[int]) -> Tensor:
        """Clip, and move the weights unless something is not finite; returns the gradients' norm."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.net.parameters(), self.recipe.clip_norm)
        finite = self.guard.board(total, norm, self.step + 1, image_ids)
        self.statistics.settle(finite)
        set_lr(self.optimizer, self.factor(self.step))
        gated_step(self.optimizer, finite)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.net)
        return norm

    def meet(self, batches: list[Batch]) -> tuple[Normalizer, list[int]]:
        """What all processes must know of a step: object counts, images, the wishes to stop or save, missing images.

        This travels between the hosts, so that the device need not wait, and every process stops after the same step.
        """
        size = self.plan.batch_size_per_device * self.plan.accumulation
        counts = [count for batch in batches for count in batch.targets.counts] or [0] * size
        ids = [one for batch in batches for one in batch.images.image_ids] or [0] * size
        wishes = [self.failure is not None, self.interruption.wanted, self.save_due()]
        rows = self.world.gather_numbers([*map(float, wishes), *counts, *ids])
        failed, self.stop_wanted, self.save_wanted = (any(row[index] for row in rows) for index in range(3))
        if failed:
            self.leave_for_want_of_images()
        everyone = torch.tensor([count for row in rows for count in row[3 : 3 + size]], dtype=torch.float32)
        normalizer = Normalizer(everyone.to(self.device, non_blocking=True), self.world.size)
        return normalizer, [int(one) for row in rows for one in row[3 + size :]]

    def explain(self) -> str:
        """Words about what was not finite in the step that the guard judged last; a call of all processes."""
        assert self.judged is not None
        mine = diagnose(
            self.net,
            self.criterion,
            self.judged,
            self.device,
            self.runtime.autocast,
            self.scaler.get_scale() if self.scaler.is_enabled() else 1.0,
        )
        found = [words for words in self.world.gather_objects(mine) if words]
        return self.world.from_main(found[0] if found else NOTHING)

    def averaging_gradients(self, last: bool) -> AbstractContextManager[Any]:
        """Let the processes average their gradients in the last backward of a step only."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def factor(self, step: int) -> float:
        return self.schedule.factor(step, self.plan.steps_per_epoch, self.plan.total_steps)

    def check_reached(self) -> None:
        """After the first backward: every parameter that is to be trained must have got a gradient."""
        if self.step > 0:
            return
        idle = [name for name, one in self.net.named_parameters() if one.requires_grad and one.grad is None]
        if not idle:
            return
        words = f"no loss reaches {len(idle)} trainable parameters ({', '.join(idle[:4])}{', ...' * (len(idle) > 4)})"
        if self.world.size > 1:
            raise ConfigError(f"{words}; several processes need a gradient for each: freeze them or take them away")
        self.world.say(f"warning: {words}; they stay as they are")

    # -- evaluation and reports ---------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Evaluate the averaged weights where there are some, else the trained ones."""
        self.world.share_buffers(self.net)
        if self.ema is not None:  # its averages of running statistics drift apart as those themselves do
            self.world.share_buffers(self.ema.model)
        if self.whole is not None:  # the processes evaluate different numbers of images, so none may wait for another
            self.whole.load_state_dict(whole_state(self.net))
        self.evaluation = self.measure()
        if self.evaluation is None:
            self.leave()
        assert self.evaluation is not None
        return self.evaluation.numbers()

    @property
    def evaluated(self) -> nn.Module:
        if self.ema is not None:
            return self.ema.model
        return self.net if self.whole is None else self.whole

    def announce(self) -> None:
        """Make the run folder, and say what is going to be done."""
        if self.world.is_main:
            make_folder(self.start.folder)
            remove_parts(self.start.folder)
            write_config(self.start.folder, self.config)
        resumed_at = self.step if self.start.resumed else None
        self.trackers.start(
            RunInfo(str(self.cfg.name), self.start.folder, self.config, self.plan.epochs, resumed_at, self.epoch)
        )
        chosen = self.plan
        rows = [
            ("data", self.data.describe()),
            ("labels", label_words(self.data.label_map.names)),
            ("model", parameter_words(self.net)),
            ("device", self.runtime.describe(self.world.size)),
            ("batch", chosen.describe_batch()),
            (
                "length",
                f"{chosen.epochs} epochs x {chosen.steps_per_epoch} steps = {chosen.total_steps} steps, "
                f"{chosen.total_images} images",
            ),
            ("optimizer", self.recipe.describe(self.net)),
            ("schedule", self.schedule.describe(chosen.total_steps)),
            ("run folder", str(self.start.folder)),
        ]
        if any(isinstance(module, MSDeformAttention) for module in self.net.modules()):
            rows.insert(4, ("sampling op", backends.describe(self.device.type)))
        if self.start.checkpoint is not None:
            rows.append(("resumed", f"{self.start.checkpoint}, after step {self.step}, {self.images_seen} images"))
        if self.initial is not None:
            rows += self.initial.rows
        self.world.say(f"training {self.cfg.name}\n{listing(rows)}")
        for words in (*(() if self.initial is None else self.initial.warnings), *self.concerns()):
            self.world.say(f"warning: {words}")

    def log_step(self) -> str | None:
        """Look at the loss every ``tracking.log_every`` steps; returns words for the progress bar."""
        if self.step % self.cfg.tracking.log_every:
            return None
        numbers = self.meter.read()
        lr = self.recipe.lr * self.factor(self.step - 1)
        self.trackers.log_step({**numbers, "lr": lr, "images_seen": self.images_seen}, self.step)
        return f"loss {numbers.get('loss', float('nan')):.3f}"

    def finish(self, numbers: dict[str, float]) -> dict[str, float]:
        """Write and show the final results."""
        if self.evaluation is None:  # resumed where nothing was left to train
            numbers = {**numbers, **self.evaluate()}
        assert self.evaluation is not None
        if not self.world.is_main:
            return numbers
        folder = self.start.folder
        self.evaluation.write(folder)
        self.world.say(self.evaluation.table())
        if history := read_rows(folder / EPOCHS):
            plot_curves(history, folder / "curves.png")
            self.trackers.log_image("curves", folder / "curves.png", self.step)
        self.draw(folder)
        best = "" if self.best is None else f" (best {self.metric} {100 * self.best:.1f}: {folder / BEST})"
        self.world.say(f"results     {folder}{best}")
        return numbers

    # -- state --------------------------------------------------------------------------------------------------------

    def keep(self, value: float | None) -> None:
        """Write the checkpoints that are due after an epoch, in which the metric was this, if it was measured."""
        better = value is not None and (self.best is None or value > self.best)
        self.best = value if better else self.best
        names = [BEST] * better
        if self.cfg.checkpoint.every and self.epoch % self.cfg.checkpoint.every == 0:
            names.append(f"epoch_{self.epoch:04}.pt")
        # The last one says that the epoch is done, the others with it: a run killed in between writes them again.
        self.save([*names, LAST])

    def save_due(self) -> bool:
        """Whether it is time to save in the middle of an epoch; the main process' clock decides."""
        return self.world.is_main and time.monotonic() - self.saved_at >= self.cfg.checkpoint.every_seconds

    def save(self, names: list[str]) -> None:
        """Write the present state under these names; a call of all processes."""
        state, failure = self.state_dict(), None
        try:
            for name in names if self.world.is_main else ():
                checkpoint.save(self.start.folder / name, state)
        except CheckpointError as error:
            failure = error
        if any(row[0] for row in self.world.gather_numbers([failure is not None])):
            self.world.end_together(failure)
        self.saved_at = time.monotonic()

    def leave_for_want_of_images(self) -> None:
        """Save after the last finished step, and end with the error of the process that lacks an image."""
        self.guard.look()
        self.save([LAST])
        if self.failure is not None:
            self.failure = type(self.failure)(
                f"{self.failure}\nthe {self.step} steps before it are saved; when this is repaired, go on with "
                f"resume=auto output_dir={self.start.folder}"
            )
        self.world.end_together(self.failure)

    def leave(self) -> None:
        """Save after the last finished step, and end the process as its signal asks."""
        self.guard.look()
        self.save([LAST])
        self.world.say(
            f"stopped after step {self.step} of {self.plan.total_steps}; go on with "
            f"resume=auto output_dir={self.start.folder}"
        )
        raise SystemExit(self.interruption.exit_code)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on; see ``checkpoint`` for the layout."""
        return {
            "config": self.config,
            "template": OmegaConf.to_container(self.cfg, resolve=False),
            "label_map": self.data.label_map.state_dict(),
            "model": whole_state(self.net),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": moments(self.net, self.optimizer),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "steps_done": self.steps_done,
            "step": self.step,
            "images_seen": self.images_seen,
            "plan": self._shape_of_plan(),
            "meter": self.meter.state_dict(),
            "windows": self.world.gather_objects(self.meter.window()),
            "not_finite": self.guard.in_a_row,
            "rng": self.world.gather_objects(rng_state()),
            "best": self.best,
            "metrics": None if self.evaluation is None else self.evaluation.numbers(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; the weights are in the model already.

        Raises:
            CheckpointError: it belongs to another plan.
        """
        assert self.start.checkpoint is not None
        check_plan(state, self._shape_of_plan(), self.start.checkpoint)
        load_moments(self.net, self.optimizer, state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"] or {"updates": 0, "model": state["model"]})
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.steps_done, self.best = state["epoch"], state["steps_done"], state["best"]
        self.meter.load_state_dict(state["meter"], state.get("windows", ()))
        self.guard.in_a_row = state.get("not_finite", 0)
        changed = checkpoint.differences(state["config"], self.config, lambda node: node in checkpoint.RUN_NODES)
        for words in changed:
            if not words.startswith(("output_dir", "resume", "init_", "name")):
                self.world.say(f"resumed with another setting: {words}")
        if len(state["rng"]) == self.world.size:
            set_rng_state(state["rng"][self.world.rank])
        else:
            self.world.say(
                f"resumed with {self.world.size} processes instead of {len(state['rng'])}: random numbers start anew"
            )

    def _starting_net(self, state: dict[str, Any] | None, given: Initial | None) -> nn.Module:
        """The network with the weights that it starts from: a checkpoint's, or what its backbone was pretrained to."""
        # Weights without a backbone fit only in part, if that is asked for: then it starts as it would without them.
        pretrained = state is None and (given is None or (self.cfg.init_partial and not given.has_backbone))
        net = self.build_net(pretrained)
        if state is not None:
            source = self.start.checkpoint
            assert source is not None
            checkpoint.check_same_model(state["config"], self.config, source)
            if state["label_map"] != self.data.label_map.state_dict():
                raise CheckpointError(f"{source} was trained on other classes than the data set has now")
            checkpoint.load_weights(net, state["model"], source)
        elif given is not None:
            self.initial = self.start_from(given, net)
        return net

    def _spread(self, model: nn.Module) -> nn.Module:
        if self.runtime.sharding == "full":
            self.whole = copy.deepcopy(model).requires_grad_(False)
            return cast("nn.Module", share_out(model, self.device.type, self.world.size))
        if self.world.size == 1:
            return model
        # Buffers are shared before evaluations instead of before each forward: those of frozen norms never change.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
        settings: dict[str, Any] = {name: False}
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **settings)

    def _check_sharding(self) -> None:
        for bad, words in (
            (self.world.size == 1, "needs several processes, which torchrun starts; this is one"),
            (self.recipe.ema_decay is not None, "keeps no averaged weights: optimizer.ema_decay=null"),
            (self.runtime.precision == "fp16", "has no scaled gradients: runtime.precision=bf16"),
            (self.runtime.compile, "is not compiled: runtime.compile=false"),
        ):
            if bad:
                raise ConfigError(f"runtime.sharding=full {words}")

    def _shape_of_plan(self) -> dict[str, int]:
        return {"total_batch_size": self.plan.total_batch_size, "steps_per_epoch": self.plan.steps_per_epoch}

    # -- what a task says ---------------------------------------------------------------------------------------------

    def build_net(self, pretrained: bool) -> nn.Module:
        """The network; with ``pretrained`` its backbone has the weights that the config names."""
        raise NotImplementedError

    def build_criterion(self) -> nn.Module:
        """Called as ``criterion(outputs of the network, targets, normalizer, ride)``; gives ``Losses``."""
        raise NotImplementedError

    def read_initial(self) -> Initial:
        """The weights of ``init_from``."""
        raise NotImplementedError

    def start_from(self, given: Initial, net: nn.Module) -> Report:
        """Put such weights into the network."""
        raise NotImplementedError

    def measure(self) -> Result | None:
        """Evaluate; None if a signal came meanwhile, in any process."""
        raise NotImplementedError

    def concerns(self) -> list[str]:
        """What may ruin the run, in a sentence each."""
        raise NotImplementedError

    def draw(self, folder: Path) -> None:
        """Leave pictures of what the network does in the run folder, at the end."""

    def draw_epoch(self) -> None:
        """Leave pictures of what the network does after an epoch."""

    def check_settings(self) -> None:
        """Refuse plain values that no constructor sees.

        Raises:
            ConfigError: names the setting.
        """
        cfg = self.cfg
        for key, value, least in (
            ("evaluation.every", cfg.evaluation.every, 1),
            ("checkpoint.every", 1 if cfg.checkpoint.every is None else cfg.checkpoint.every, 1),
            ("checkpoint.every_seconds", cfg.checkpoint.every_seconds, 0),
            ("tracking.log_every", cfg.tracking.log_every, 1),
        ):
            require_at_least(least, key, value)
        if self.runtime.sharding == "full":
            self._check_sharding()
        if not str(cfg.name) or "/" in str(cfg.name):
            raise ConfigError(f"name is {cfg.name!r}; expected a name, as the run folder is called after it")


class DetectorTrainer(Trainer):
    """Training of a detector: set prediction, COCO's AP."""

    metric = "AP"

    def __init__(self, cfg: DictConfig, runtime: Runtime, world: World, interruption: Interruption) -> None:
        super().__init__(cfg, runtime, world, interruption)
        self.postprocess = build_postprocess(cfg)
        self.collapsed = False
        self.request = Request(cfg.visualization.what, count=cfg.visualization.queries)
        if cfg.visualization.every is not None:
            self.request.kinds(attentions_of(cast("Detector", self.net)))

    def build_net(self, pretrained: bool) -> nn.Module:
        return build_detector(self.cfg, self.data.label_map.num_classes, pretrained=pretrained)

    def build_criterion(self) -> nn.Module:
        return build_criterion(self.cfg)

    def read_initial(self) -> Initial:
        return read_initial(self.cfg.init_from, self.cfg.init_ema)

    def start_from(self, given: Initial, net: nn.Module) -> Report:
        return start_from(net, given, self.config, self.data.label_map, self.cfg.init_partial)

    def measure(self) -> Evaluation | None:
        found = evaluate_model(
            answering(cast("Detector", self.evaluated), self.cfg.evaluation.branch),
            self.val_loader,
            self.postprocess,
            new_evaluator(self.cfg, self.data, self.data.label_map),
            self.val_batch_size,
            self.runtime,
            self.world,
            stopped=lambda: self.interruption.wanted,
        )
        if found is None:
            return None
        words = collapse_words(found.query_spread, int(self.cfg.model.num_queries))
        if words and not self.collapsed:
            self.world.say(f"warning: {words}")
        self.collapsed = words is not None
        return found

    def concerns(self) -> list[str]:
        starts_from_weights = self.start.checkpoint is not None or self.cfg.init_from is not None
        return [
            *unread(self.net),
            *concerns(
                int(self.cfg.model.num_queries) * max(1, int(self.cfg.model.num_patterns)),
                self.train_set.max_objects,
                self.plan.total_steps,
                frozen_at_random(self.cfg.backbone, starts_from_weights),
            ),
        ]

    def draw(self, folder: Path) -> None:
        if not self.cfg.evaluation.pictures:
            return
        names = dict(enumerate(self.data.label_map.name(i) for i in range(self.data.label_map.num_classes)))
        path = folder / "predictions.png"
        draw_examples(
            answering(cast("Detector", self.evaluated), self.cfg.evaluation.branch),
            self.val_set,
            self.postprocess,
            names,
            self.runtime,
            path,
            self.cfg.evaluation.pictures,
            self.val_batch_size,
        )
        self.trackers.log_image("predictions", path, self.step)

    def draw_epoch(self) -> None:
        """Draw what the model looks at, after the epochs that ``visualization`` names."""
        chosen = self.cfg.visualization
        if chosen.every is None or self.epoch % chosen.every or not self.world.is_main:
            return
        pictures = draw_attention(
            cast("Detector", self.evaluated),
            self.val_set,
            cast("nn.Module", self.postprocess.scores),
            self.data.label_map.by_label(),
            self.device,
            self.request,
            self.start.folder / "visualization" / f"epoch_{self.epoch:04}",
            chosen.images,
        )
        for image_id, path in pictures:
            self.trackers.log_image(f"visualization/{image_id}", path, self.step)

    def check_settings(self) -> None:
        super().check_settings()
        drawn = self.cfg.visualization
        require_at_least(0, "evaluation.pictures", self.cfg.evaluation.pictures)
        require_at_least(1, "visualization.every", 1 if drawn.every is None else drawn.every)
        require_at_least(1, "visualization.images", drawn.images)
        require_at_least(1, "visualization.queries", drawn.queries)
        backend, backends_known = self.cfg.evaluation.backend, get_args(Backend)
        if backend not in backends_known:
            raise ConfigError(f"evaluation.backend is {backend!r}: {nearest(str(backend), backends_known)}")


def _trackers(cfg: DictConfig) -> list[Tracker]:
    nodes = [node for node in cfg.tracking.values() if isinstance(node, DictConfig) and "_target_" in node]
    return [build(node) for node in nodes]


def _poisoned(outputs: Iterable[Tensor]) -> Tensor:
    """A loss that makes every gradient NaN, so that all processes see that this step must not count."""
    total = sum((one.sum() for one in outputs if one.requires_grad), torch.zeros(()))
    return total * float("nan")
