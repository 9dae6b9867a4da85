"""What numbers are called: which say how good a model is, and where training and epochs share one list."""

from __future__ import annotations

from detfamily.tracking.tracker import Metrics

TRAIN = "train/"

HEADLINES = ("AP", "top1")
"""The number by which weights are compared, of detectors and of classifiers: a share, larger is better."""


def headline(metrics: Metrics) -> tuple[str, float] | None:
    """The name of that number, and its value, where it was measured."""
    return next(((name, metrics[name]) for name in HEADLINES if metrics.get(name, -1) >= 0), None)


def of_step(metrics: Metrics) -> dict[str, float]:
    """Numbers of training steps: "train/loss", beside the epoch's mean, "loss".

    >>> of_step({"loss": 9.5, "match/5/giou": 0.7})
    {'train/loss': 9.5, 'train/match/5/giou': 0.7}
    """
    return {TRAIN + name: value for name, value in metrics.items()}
