"""TensorBoard: scalars, pictures and the config, in the run folder's ``tensorboard``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from detfamily.tracking.names import of_step
from detfamily.tracking.tracker import Metrics, RunInfo, Tracker

FOLDER = "tensorboard"


class TensorBoardTracker(Tracker):
    """Writes event files; ``tensorboard --logdir runs`` shows them.

    Numbers of training lie in ``steps`` over the optimiser step, named as in ``train_steps.jsonl`` behind "train/";
    those of epochs in ``epochs`` over the epoch, named as in ``metrics.jsonl``, with the pictures. A resumed run adds
    event files to the earlier ones, and declares void what these have after its step.

    Args:
        patience: the longest, in seconds, that the end of a run waits for the files to be written.

    Raises:
        ValueError: a patience that is not positive.
    """

    def __init__(self, patience: float = 30.0) -> None:
        if not patience > 0:
            raise ValueError(f"patience is {patience}; expected a number of seconds above 0")
        self.patience = patience
        self._steps: Any = None
        self._epochs: Any = None

    def start(self, run: RunInfo) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"it cannot be imported ({error}): pip install 'detfamily[tensorboard]'") from None

        def writer(name: str, done: int | None) -> Any:
            purge = None if run.resumed_at is None or done is None else done + 1
            place = str(run.folder / FOLDER / name)
            return SummaryWriter(place, purge_step=purge, flush_secs=30)  # type: ignore[no-untyped-call]

        self._steps, self._epochs = writer("steps", run.resumed_at), writer("epochs", run.epochs_done)
        self._epoch = run.epochs_done
        config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        self._epochs.add_text("config", textwrap.indent(config, "    "), self._epoch)  # indented: shown as it is
        self._epochs.flush()

    def log_step(self, metrics: Metrics, step: int) -> None:
        for name, value in of_step(metrics).items():
            self._steps.add_scalar(name, value, step)

    def log_epoch(self, metrics: Metrics, epoch: int, step: int) -> None:
        self._epoch = epoch
        for name, value in metrics.items():
            self._epochs.add_scalar(name, value, epoch)
        # A checkpoint follows: what a run that goes on from it will not send again should be on the disk by then.
        self._steps.flush()
        self._epochs.flush()

    def log_image(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._epochs.add_image(name, pixels, self._epoch, dataformats="HWC")

    def finish(self, completed: bool = True) -> None:
        for writer in (self._steps, self._epochs):
            if writer is not None:
                writer.close()
