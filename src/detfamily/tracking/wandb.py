"""Weights & Biases. Its faults cost the training neither numbers nor time: see ``WandbTracker``."""

from __future__ import annotations

import inspect
import os
import shlex
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from detfamily.files import write_text_atomically
from detfamily.tracking.files import EPOCHS, STEPS, read_rows
from detfamily.tracking.names import TRAIN, headline, of_step
from detfamily.tracking.tracker import Metrics, RunInfo, Tracker
from detfamily.tracking.trackers import warn, words_of
from detfamily.tracking.wandb_log import is_complete, last_values

Mode = Literal["online", "offline", "disabled"]

ID_FILE = "wandb_id.txt"
WEIGHTS = ("best.pt", "last.pt")
"""What an artifact holds of them: the first that is there."""
MARGIN = 10.0
"""Seconds for wandb's own program to start, and to end."""
_STEP, _EPOCH = TRAIN + "step", "epoch"
_NEITHER = {_STEP: 0.0, _EPOCH: 0.0}


class WandbTracker(Tracker):
    """Sends a run to Weights & Biases, or keeps it in the run folder's ``wandb`` for ``wandb sync``.

    Numbers of training are drawn over "train/step" and named "train/loss"; those of epochs are drawn over "epoch" and
    have the names of ``metrics.jsonl``: "loss", "AP", "AP/cat". The summary has "best_AP" and "best_epoch"; of
    a classifier "best_top1".

    A run folder is one run there: its id lies in ``wandb_id.txt``, and a resumed run goes on under it. What the
    place has already (by its own account: the server's, or that of the logs in the folder) is not sent again; what it
    lacks, because the process before was killed, comes from the files of the run.

    When no server answers, or it refuses, the run goes on offline under the same id. It also does when the program of
    wandb dies, once. The end of the run then names the command that sends everything.

    Args:
        mode: ``online``, ``offline``, ``disabled``; None: what WANDB_MODE says, else online.
        project: None: what WANDB_PROJECT says, else "detfamily".
        entity: user or team; None: what WANDB_ENTITY says, else that of the key.
        group: runs that belong together, such as the seeds of a comparison.
        tags: words to find the run by.
        notes: a text about the run.
        init_timeout: the longest, in seconds, to wait for the server at the start.
        finish_timeout: the longest, in seconds, to wait for what is still to be sent at the end.
        artifact: whether a run that came to its end also sends its best weights (``best.pt``; ``last.pt`` where nothing
            was measured) and its ``config.yaml``, as an artifact of type "model".

    Raises:
        ValueError: a timeout that is not positive.
    """

    def __init__(
        self,
        mode: Mode | None = None,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        init_timeout: float = 60.0,
        finish_timeout: float = 60.0,
        artifact: bool = False,
    ) -> None:
        for name, value in (("init_timeout", init_timeout), ("finish_timeout", finish_timeout)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; expected a number of seconds above 0")
        self.mode, self.project, self.entity = mode, project, entity
        self.group, self.tags, self.notes = group, list(tags), notes
        self.init_timeout, self.finish_timeout, self.artifact = init_timeout, finish_timeout, artifact
        self.patience = init_timeout + finish_timeout + MARGIN
        self._run: Any = None
        self._service: Any = None
        self._online = self._fell_back = self._abandoned = False
        self._sent = dict(_NEITHER)
        self._best: tuple[str, float, int] | None = None
        self._axes: set[str] = set()

    # -- the calls of the interface -----------------------------------------------------------------------------------

    def start(self, run: RunInfo) -> None:
        mode = self.mode or os.environ.get("WANDB_MODE") or "online"
        if mode == "disabled":
            return
        self._info = run
        self._folder = run.folder.resolve()
        file = self._folder / ID_FILE
        self._keep_id(file.read_text(encoding="utf-8").strip() if file.exists() else uuid.uuid4().hex[:8])
        if mode in ("offline", "dryrun"):  # the latter is wandb's older word
            self._open(online=False)
        else:
            try:
                self._open(online=True)
            except ImportError:
                raise
            except Exception as error:
                self._go_offline(error)

    def log_step(self, metrics: Metrics, step: int) -> None:
        self._send({**of_step(metrics), _STEP: step}, _STEP)

    def log_epoch(self, metrics: Metrics, epoch: int, step: int) -> None:
        self._send({**metrics, _EPOCH: epoch, "step": step}, _EPOCH)

    def log_image(self, name: str, path: Path, step: int) -> None:
        if self._run is None:
            return
        import wandb

        self._attempt(lambda: self._run.log({name: wandb.Image(str(path))}))

    def finish(self, completed: bool = True) -> None:
        if self._run is None:
            return
        if self.artifact and completed:
            self._attempt(self._keep_weights)
        folder, url = self._piece(), self._run.url
        try:
            self._run.finish(exit_code=0 if completed else 1)
        except Exception as error:
            self._close()
            if self._abandoned:
                raise
            warn(self, error, f"to send what is missing: {_sync([folder])}")
            return
        self._close()
        if self._online:
            print(f"wandb       {url} (if it lacks anything: {_sync([folder])})", flush=True)
            return
        if not is_complete(self._log_in(folder)):
            raise OSError(f"its log in {folder} was not written to the end: is the disk full?")
        print(f"wandb       kept in the run folder; to send it: {_sync(self._unsent() or [folder])}", flush=True)

    def abandon(self) -> None:
        self._abandoned = True
        if self._service is not None:
            # Without it, whatever waits for it ends with an error, also at the exit of the process.
            with suppress(OSError):
                self._service.kill()

    def _keep_id(self, one: str) -> None:
        """Have it in the folder before anything is logged under it: the process may be killed at any moment."""
        self._id = one
        write_text_atomically(self._folder / ID_FILE, one + "\n")

    # -- the connection -----------------------------------------------------------------------------------------------

    def _open(self, online: bool) -> None:
        """Begin (or go on with) the run at its place, and send what that place lacks."""
        # Reports of wandb's own faults, to its makers: where a server is slow, they hold up the end of the process.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"it cannot be imported ({error}): pip install wandb") from None
        settings = self._settings(wandb, online)
        wandb.setup(settings=settings)
        self._service = _service_of(wandb)
        if online and not _has_key(wandb):
            raise ConnectionError("there is no API key: wandb login, or WANDB_API_KEY")
        before = {} if online else self._in_logs()
        self._run = wandb.init(
            id=self._id,
            resume="allow",
            mode="online" if online else "offline",
            dir=str(self._folder),
            project=self.project or os.environ.get("WANDB_PROJECT") or "detfamily",
            entity=self.entity,
            name=self._info.name,
            group=self.group,
            tags=self.tags or None,
            notes=self.notes,
            config=dict(self._info.config),
            settings=settings,
        )
        self._service, self._online = _service_of(wandb), online
        self._keep_id(self._run.id)  # another one under a sweep of wandb's own
        if online and self._run.resumed:
            before = {name: self._run.summary.get(name) or 0.0 for name in _NEITHER}
        self._sent = {**_NEITHER, **before}
        self._axes = set()
        self._run.define_metric(_STEP)
        self._run.define_metric(_EPOCH)
        self._run.define_metric(TRAIN + "*", step_metric=_STEP)
        if online:
            print(f"wandb       {self._run.url}", flush=True)
        for kind, row in self._rows():
            self._log(row, kind)

    def _settings(self, wandb: Any, online: bool) -> Any:
        wanted = {
            "mode": "online" if online else "offline",
            "silent": True,
            "console": "off",  # it would wrap this process' output
            "init_timeout": self.init_timeout,
            "login_timeout": self.init_timeout,
            "finish_timeout": self.finish_timeout,
            "finish_timeout_raises": True,
            "reinit": "create_new",  # whatever else this process has to do with wandb
        }
        known = getattr(wandb.Settings, "model_fields", wanted)
        return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})

    def _go_offline(self, error: Exception) -> None:
        """Go on in the run folder, after the server or wandb's program has failed."""
        self._fell_back = True
        self._close()
        if self._abandoned:
            raise error
        try:
            self._open(online=False)
        except Exception as second:
            self._close()
            raise error if words_of(error) == words_of(second) else second from error
        warn(self, error, "the run is kept in its folder; the command that sends it comes at the end")

    def _close(self) -> None:
        """Forget the connection, and let wandb's program end: it takes no second run of the same id."""
        import wandb

        self._run = None
        if wandb.run is None:
            with suppress(Exception):
                wandb.teardown()

    # -- what is sent -------------------------------------------------------------------------------------------------

    def _send(self, row: Metrics, kind: str) -> None:
        if self._run is not None:
            self._attempt(lambda: self._log(row, kind))

    def _attempt(self, call: Any) -> None:
        """Do something with the run; if that fails, once more offline."""
        try:
            call()
        except Exception as error:
            if self._fell_back:
                self._close()
                raise
            self._go_offline(error)
            call()

    def _log(self, row: Metrics, kind: str) -> None:
        """Log a row unless the place has it."""
        found = headline(row) if kind == _EPOCH else None
        if found is not None and (self._best is None or found[1] > self._best[1]):
            self._best = (*found, int(row[_EPOCH]))
        if row[kind] <= self._sent[kind]:
            return
        if kind == _EPOCH:
            for name in row.keys() - self._axes - {_EPOCH}:
                if "*" not in name:  # to wandb, a pattern
                    self._run.define_metric(name, step_metric=_EPOCH)
            self._axes |= row.keys()
        self._run.log(dict(row))
        self._sent[kind] = row[kind]
        if kind == _EPOCH and self._best is not None:
            name, value, epoch = self._best
            self._run.summary.update({f"best_{name}": value, "best_epoch": epoch})

    def _keep_weights(self) -> None:
        """Log the artifact. Its files stay where they are, until they are sent: copies would double the weights."""
        import wandb

        weights = next((one for name in WEIGHTS if (one := self._folder / name).is_file()), None)
        if weights is None:
            return
        artifact = wandb.Artifact(f"model-{self._id}", type="model", metadata={"run": self._info.name})
        for file in (weights, self._folder / "config.yaml"):
            if file.is_file():
                artifact.add_file(str(file), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)

    def _rows(self) -> Iterator[tuple[str, Metrics]]:
        """The rows of the run's files in their order, those of epochs behind those of steps."""
        steps = [
            (row["step"], 0, _STEP, {**of_step(_numbers(row, without="step")), _STEP: row["step"]})
            for row in read_rows(self._folder / STEPS)
        ]
        epochs = [(row["step"], 1, _EPOCH, _numbers(row)) for row in read_rows(self._folder / EPOCHS)]
        for *_, kind, row in sorted([*steps, *epochs], key=lambda one: one[:2]):
            yield kind, row

    def _in_logs(self) -> dict[str, float]:
        """How far the logs of this run in the folder got; those that cannot be sent are set aside before."""
        try:
            return last_values([log for folder in self._pieces() if (log := self._usable(folder))], (_STEP, _EPOCH))
        except Exception as error:  # the form of these logs belongs to wandb
            warn(self, error, "what was logged before may be there twice once it is sent")
            return {}

    def _usable(self, folder: Path) -> Path | None:
        """The log of an earlier process, as far as its rows count as kept.

        ``wandb sync`` stumbles at the end of a log that a killed process left, and sends what follows never, and what
        precedes again each time. So such a log is renamed, and the next one has its rows, too, from the run's files;
        unless that command has sent them.
        """
        log = self._log_in(folder)
        if not _is_offline(folder) or is_complete(log):
            return log
        attempted = log.with_name(log.name + ".syncstate").exists()
        aside = log.rename(log.with_name(log.name + ".incomplete"))
        return aside if attempted else None

    def _pieces(self, pattern: str = "*run-*") -> list[Path]:
        """The folders in which processes of this run left their logs, in their order."""
        found = (self._folder / "wandb").glob(f"{pattern}-{self._id}")
        folders = {folder.resolve() for folder in found if self._log_in(folder).exists()}
        return sorted(folders, key=lambda folder: folder.name.removeprefix("offline-"))

    def _unsent(self) -> list[Path]:
        logs = [self._log_in(folder) for folder in self._pieces("offline-run-*")]
        return [log.parent for log in logs if not log.with_name(log.name + ".synced").exists()]

    def _log_in(self, folder: Path) -> Path:
        return folder / f"run-{self._id}.wandb"

    def _piece(self) -> Path:
        return Path(self._run.dir).parent


def _numbers(row: Metrics, without: str = "") -> dict[str, float]:
    """A row of a file; null stands for what json cannot say."""
    return {name: float("nan") if value is None else value for name, value in row.items() if name != without}


def _sync(folders: Sequence[Path]) -> str:
    online = not all(map(_is_offline, folders))
    return shlex.join(["wandb", "sync", *["--include-online"] * online, *map(str, folders)])


def _is_offline(folder: Path) -> bool:
    return folder.name.startswith("offline-")


def _has_key(wandb: Any) -> bool:
    """Whether there is a key or the like. Without one, wandb would ask at the terminal, and the run would wait."""
    if wandb.run is not None or "prompt" not in inspect.signature(wandb.login).parameters:
        return True
    return bool(wandb.login(prompt=False, verify=False))


def _service_of(wandb: Any) -> Any:
    """The process that wandb started for its work, or None where it is not where it used to be."""
    place: Any = wandb.setup()
    for name in ("_connection", "_proc", "_process"):
        place = getattr(place, name, None)
    return place if hasattr(place, "kill") else None
