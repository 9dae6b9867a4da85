"""What the rows of a table train, and what they are judged by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One kind of training.

    Attributes:
        command: of detfamily, whose primary config has the same name.
        metrics: what is measured, shares of 1; the first is what rows are compared by.
        label: the first one in words.
        others: the heading of the report's table of the others.
        published: the scale on which the recipes are as published.
        model: what is trained, in words.
    """

    command: str
    metrics: tuple[str, ...]
    label: str
    others: str
    published: str
    model: str

    @property
    def metric(self) -> str:
        """What rows are compared by."""
        return self.metrics[0]


DETECTION = Task("train", ("AP", "AP50", "AP75", "APs", "APm", "APl"), "AP", "By size and overlap", "coco", "detector")
CLASSIFICATION = Task("classify", ("top1", "top5"), "top-1", "Among the first five", "imagenet", "classifier")

TASKS = {"detection": DETECTION, "classification": CLASSIFICATION}
"""By what a table says under ``task``; it need not say detection."""
