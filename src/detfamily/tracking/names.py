"""What a number is called where training and epochs share one list."""

from __future__ import annotations

from detfamily.tracking.tracker import Metrics

TRAIN = "train/"


def of_step(metrics: Metrics) -> dict[str, float]:
    """Numbers of training steps: "train/loss", beside the epoch's mean, "loss".

    >>> of_step({"loss": 9.5, "match/5/giou": 0.7})
    {'train/loss': 9.5, 'train/match/5/giou': 0.7}
    """
    return {TRAIN + name: value for name, value in metrics.items()}
