"""The command line: ``detfamily COMMAND [overrides]``."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from detfamily import __version__
from detfamily.errors import DetfamilyError, ElsewhereError, LostWorkerError, nearest

FAILED = 2
INTERRUPTED = 130
OPTIONS = ("--help", "--cfg", "--version")


@dataclass(frozen=True)
class Command:
    """One command: composes a config, checks it, and hands it to one function.

    Attributes:
        name: what is typed.
        summary: one line of help.
        config: the primary config, a file of the configs folder; None for a command that has no settings.
        function: ``module:function`` that takes the config, or the words where there is none; imported when the
            command runs.
        examples: overrides to show.
        composed: False where the function takes the overrides as they are, because the config that they change lies
            in a checkpoint; ``config`` then only says which groups there are.
        assumed: overrides that come before those typed: what must be given, and this command has no use for.
    """

    name: str
    summary: str
    config: str | None
    function: str
    examples: tuple[str, ...]
    composed: bool = True
    assumed: tuple[str, ...] = ()

    def run(self, overrides: Sequence[str]) -> None:
        """Compose, check, run."""
        from detfamily.config import compose, validate

        given: object = list(overrides)
        if self.composed and self.config:
            given = compose(self.config, [*self.assumed, *overrides])
            validate(given)
        module, _, function = self.function.partition(":")
        getattr(importlib.import_module(module), function)(given)

    def print_config(self, overrides: Sequence[str]) -> None:
        """Print the config that a run with these overrides would have, as YAML."""
        from omegaconf import OmegaConf

        from detfamily.config import compose, to_container, validate

        if self.config is None:
            raise DetfamilyError(f"{self.name} has no settings")
        if not self.composed:
            raise DetfamilyError(f"{self.name} has no config of its own: it is the one inside the checkpoint")
        cfg = compose(self.config, [*self.assumed, *overrides])
        print(OmegaConf.to_yaml(OmegaConf.create(to_container(cfg))), end="")
        validate(cfg)


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "train",
            "train a detector; evaluates after every epoch and leaves checkpoints, logs and pictures",
            "train",
            "detfamily.engine.train:train",
            (
                "family=deformable_detr data=coco data.root=/data/coco",
                "experiment=overfit data=coco_mini data.root=/data/coco_mini",
                "family=detr backbone=resnet101 schedule.epochs=150 optimizer.lr=5e-5",
            ),
        ),
        Command(
            "classify",
            "train a backbone as a classifier of images, or evaluate one; ImageNet's layout, or generated shapes",
            "classify",
            "detfamily.classification.train:classify",
            (
                "backbone=swin_t data.root=/data/imagenet",
                "data=shapes backbone=small schedule.epochs=5 schedule.total_batch_size=32",
                "backbone=swin_t data.root=/data/imagenet init_from=swin_tiny.pth evaluate_only=true",
            ),
        ),
        Command(
            "evaluate",
            "evaluate a checkpoint, or a results file in COCO's format, on a data set",
            "train",
            "detfamily.engine.evaluate:evaluate",
            (
                "checkpoint=runs/detr/best.pt",
                "checkpoint=runs/detr/best.pt data=coco data.root=/data/coco evaluation.batch_size=1",
                "results=detections.json data=coco data.root=/data/coco",
            ),
            composed=False,
        ),
        Command(
            "predict",
            "detect objects in an image, a folder or a pattern of files; leaves drawn images and one json",
            "train",
            "detfamily.predict.command:predict",
            (
                "checkpoint=runs/detr/best.pt source=photo.jpg",
                "checkpoint=runs/detr/best.pt source=photos threshold=0.3 output_dir=found",
                "checkpoint=runs/detr/best.pt 'source=photos/**/*.png' device=cuda batch_size=8 draw=false",
            ),
            composed=False,
        ),
        Command(
            "visualize",
            "draw what a detector looks at: sampling points, attention maps, boxes layer by layer",
            "train",
            "detfamily.visualize.command:visualize",
            (
                "checkpoint=runs/dino/best.pt source=photo.jpg",
                "checkpoint=runs/detr/best.pt source=photos what=[boxes,cross_attention] layer=-1 queries=4",
                "checkpoint=runs/dino/best.pt source=photo.jpg what=encoder_attention place=[120,80] level=1",
            ),
            composed=False,
        ),
        Command(
            "check-data",
            "name every bad image and box of a data set, and say what it holds; status 1 if something is wrong",
            "train",
            "detfamily.data.check.command:check_data",
            (
                "data=coco data.root=/data/coco",
                "data=coco data.root=/data/coco family=detr check.limit=0 check.report=problems.json",
            ),
        ),
        Command(
            "convert",
            "turn an official checkpoint into ours, for evaluate and init_from, or ours into an official one",
            "train",
            "detfamily.convert:convert",
            (
                "detr-r50-e632da11.pth detr.pt",
                "r50_deformable_detr-checkpoint.pth deformable.pt",
                "boats.pth boats.pt categories=/data/boats/annotations/train.json backbone.dilation=true",
                "runs/deformable_detr/best.pt official.pth",
            ),
            composed=False,
        ),
        Command(
            "import-data",
            "write COCO json files for a data set in the layout of VOC or YOLO",
            "import-data",
            "detfamily.data.importers.command:import_data",
            (
                "format=voc root=/data/VOC2012",
                "format=yolo root=/data/birds output=/data/birds/coco",
            ),
        ),
        Command(
            "ablate",
            "run the rows of an ablation table with several seeds, as far as they are not done; one results file",
            "train",
            "detfamily.experiments.ablate:ablate",
            (
                "experiments/deformable_detr/variants.yaml scale=mini seeds=3",
                "experiments/detr/encoder_depth.yaml scale=coco data.root=/data/coco 'rows=0 layers,6 layers'",
                "experiments/deformable_detr/attention.yaml scale=mini seeds=2 jobs=2 schedule.epochs=5",
                "experiments/deformable_detr/variants.yaml scale=coco data.root=/data/coco launcher=slurm",
            ),
            composed=False,
        ),
        Command(
            "rehearse",
            "take every row of tables through one step of training and a small evaluation, and say which fail",
            "train",
            "detfamily.experiments.rehearse:rehearse",
            (
                "jobs=2",
                "experiments/dino experiments/co_detr/heads.yaml",
                "experiments/detr/encoder_depth.yaml scale=coco data.root=/data/coco 'rows=0 layers,6 layers'",
            ),
            composed=False,
        ),
        Command(
            "sweep",
            "try values of settings: proposed by Optuna, drawn by W&B, or a grid; resumable, a table of all trials",
            "train",
            "detfamily.sweeps.command:sweep",
            (
                "experiments/sweeps/learning_rate.yaml trials=6",
                "experiments/sweeps/learning_rate.yaml method=wandb trials=6 jobs=2",
                "experiments/sweeps/optimizer_grid.yaml method=grid schedule.epochs=5",
            ),
            composed=False,
        ),
        Command(
            "report",
            "write the results of an ablation table beside the published ones; without one, a page over all tables",
            None,
            "detfamily.experiments.report:report",
            (
                "experiments",
                "experiments/deformable_detr/variants.yaml",
                "runs/ablate/deformable_detr/variants-mini",
            ),
        ),
        Command(
            "info",
            "show what a model consists of, its parameters and GFLOPs, and the published figures beside them",
            "train",
            "detfamily.info.command:info",
            (
                "experiment=deformable_detr_r50",
                "family=dab_detr backbone=resnet101 data=coco info.size=[800,1333]",
                "info.table=true",
            ),
            assumed=("data.root=.",),
        ),
        Command(
            "matrix",
            "take a step of families x attentions x backbones: what goes together, and what it costs",
            "train",
            "detfamily.matrix.command:matrix",
            (
                "backbones=[resnet18,swin_t]",
                "families=[detr,dino] attentions=[dense,ms_deform,[ms_deform,dense]] backbones=[resnet18] jobs=2",
                "'families=[detr,\"deformable_detr decoder=refine\"]' columns=neck size=[256,256]",
                "columns=cross_attention backbones=[small] model.num_points=2",
            ),
            composed=False,
        ),
        Command(
            "doctor",
            "show what is installed and which code computes the op, and check it; status 1 if it is wrong",
            None,
            "detfamily.doctor:doctor",
            (),
        ),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for an error that the user can act on, 130 for Ctrl-C.

    Args:
        arguments: the words after ``detfamily``; those of this process by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Waiting threads spin, by default for so long that training becomes up to ten times slower where other processes
    # want the cores, too. This many turns keep the full speed of an idle machine (none at all would cost a third).
    # OpenMP reads it when torch is imported, which happens below.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        _dispatch(words)
    except DetfamilyError as error:
        if os.environ.get("DETFAMILY_DEBUG") == "1":
            raise
        if speaker := _speaker(error):
            print(f"{speaker}: " + str(error).replace("\n", "\n  "), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("detfamily: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _speaker(error: DetfamilyError) -> str | None:
    """Who reports an error, or None: of the processes that ``torchrun`` starts, one on each machine at the most."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return "detfamily"
    alike = os.environ.get("LOCAL_RANK", rank) != "0" and not isinstance(error, LostWorkerError)
    return None if alike or isinstance(error, ElsewhereError) else f"detfamily, process {rank}"


def _dispatch(words: list[str]) -> None:
    options = ["--help" if word == "-h" else word for word in words if word.startswith("-")]
    rest = [word for word in words if not word.startswith("-")]
    for option in options:
        if option in ("-m", "--multirun"):
            raise DetfamilyError(f"there is no {option}: all combinations of some values are a sweep, method=grid")
        if option not in OPTIONS:
            raise DetfamilyError(f"unknown option {option!r}: {nearest(option, OPTIONS)}; settings are key=value")
    if "--version" in options:
        print(f"detfamily {__version__}")
    elif not rest:
        print(overview())
    elif rest[0] not in COMMANDS:
        raise DetfamilyError(f"unknown command {rest[0]!r}: {nearest(rest[0], COMMANDS)}")
    elif "--help" in options:
        print(command_help(COMMANDS[rest[0]]))
    elif "--cfg" in options:
        COMMANDS[rest[0]].print_config(rest[1:])
    else:
        COMMANDS[rest[0]].run(rest[1:])


def overview() -> str:
    """The text of ``detfamily --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS.values()]
    return "\n".join(
        [
            "usage: detfamily COMMAND [GROUP=CHOICE | FIELD=VALUE ...]",
            "",
            *lines,
            "",
            "  detfamily COMMAND --help   what there is to choose from, and examples",
            "  detfamily COMMAND --cfg    print the config of a run and stop",
            "  detfamily --version",
            "",
            "DETFAMILY_DEBUG=1 shows where in the code an error comes from.",
        ]
    )


def command_help(command: Command) -> str:
    """The text of ``detfamily COMMAND --help``: groups and choices as they lie in the configs folder."""
    from detfamily.config import groups_of

    if command.config is None:
        return f"detfamily {command.name}: {command.summary}"
    found = groups_of(command.config)
    lines = [f"detfamily {command.name}: {command.summary}"]
    lines += ["", "Groups and their choices (GROUP=CHOICE):"] if found else []
    width = max(map(len, found), default=0)
    for group, choices in found.items():
        text = textwrap.wrap("  ".join(choices), 116 - width, break_long_words=False, break_on_hyphens=False)
        lines += [f"  {group if row == 0 else '':<{width}}  {part}" for row, part in enumerate(text)]
    lines += ["", f"Fields (FIELD=VALUE): detfamily {command.config} --cfg lists all of them.", "", "Examples:"]
    return "\n".join([*lines, *(f"  detfamily {command.name} {example}" for example in command.examples)])
