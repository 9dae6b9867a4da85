"""How many parameters the rows of a table train, counted from their configurations: no run has to say it."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from detfamily.config import compose
from detfamily.errors import ConfigError
from detfamily.experiments.results import Record, task_of
from detfamily.experiments.task import DETECTION

PARAMS = "params_m"


def with_parameters(records: Iterable[Record]) -> list[Record]:
    """The same records, each with the millions of parameters that its run trains.

    A figure that is there already is kept: it was counted with the code of its time. It is None for classifiers, and
    where the configuration of an old run is none any more.
    """
    return [one if PARAMS in one else {**one, PARAMS: _parameters(one)} for one in records]


def _parameters(record: Record) -> float | None:
    return _count(tuple(record["overrides"])) if task_of(record) is DETECTION else None


@functools.lru_cache(maxsize=256)
def _count(overrides: tuple[str, ...]) -> float | None:
    # Here, so that reports of runs whose figures are known do not wait for torch.
    from detfamily.info.classes import columns_of
    from detfamily.info.cost import count_parameters, shapes_only

    try:
        cfg = compose("train", ["data.root=.", *overrides])
        cfg.published = []  # Columns are those of the run's own data, not of the recipe's published model.
        trained = count_parameters(shapes_only(cfg, columns_of(cfg)[0])).trained
    except ConfigError:
        return None
    return round(trained / 1e6, 4)
