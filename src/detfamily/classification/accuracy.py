"""How often a classifier is right: top-1 and top-5 on a validation set."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.classification.classifier import Scores, labels_of
from detfamily.data.loader import Loader
from detfamily.engine.distributed import World
from detfamily.engine.evaluate import go_through
from detfamily.engine.runtime import Runtime
from detfamily.files import write_text_atomically
from detfamily.structures import Batch

METRICS = ("top1", "top5")


@dataclass(frozen=True)
class Accuracy:
    """How good a classifier is on a validation set.

    Attributes:
        top1: share of the images whose class has the highest score.
        top5: share of those whose class is among the five highest.
        val_loss: mean cross-entropy, without label smoothing.
        images: how many.
    """

    top1: float
    top5: float
    val_loss: float
    images: int

    def numbers(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5, "val_loss": self.val_loss}

    def table(self) -> str:
        shares = f"top-1 {100 * self.top1:.2f}  top-5 {100 * self.top5:.2f}"
        return f"{shares}  loss {self.val_loss:.3f}  ({self.images} images)"

    def write(self, folder: Path) -> Path:
        """Write the numbers; returns the path."""
        path = folder / "metrics.json"
        write_text_atomically(path, json.dumps(asdict(self), indent=2) + "\n")
        return path


def is_among(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """(B,) bool: whether the class of each image is among its ``count`` highest scores.

    Args:
        logits: (B, K); with fewer classes than ``count``, all are.
        labels: (B,) int64.
        count: 1 or more.
    """
    highest = logits.topk(min(count, logits.shape[1]), dim=1).indices
    return (highest == labels[:, None]).any(1)


@torch.inference_mode()
def measure(
    model: nn.Module, loader: Loader, runtime: Runtime, world: World, stopped: Callable[[], bool] = lambda: False
) -> Accuracy | None:
    """Evaluate a classifier; each process takes its share of the images.

    Args:
        model: on its device; it is put into evaluation mode, and back.
        loader: this process' share of the validation set.
        runtime: says the device and the precision.
        world: the processes.
        stopped: asked between batches whether to give up.

    Returns:
        The accuracy, in every process; None if any process was stopped.

    Raises:
        DataError: an image is missing or broken, in any process.
    """
    sums = torch.zeros(4, device=runtime.torch_device(world.local_rank), dtype=torch.float64)

    def consume(batch: Batch) -> None:
        with runtime.autocast():
            scores: Scores = model(batch.images)
        logits, labels = scores.logits.float(), labels_of(batch.targets)
        right = [is_among(logits, labels, most).sum() for most in (1, 5)]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        count = torch.tensor(len(labels))
        sums.add_(torch.stack([one.to(sums) for one in (*right, loss, count)]))

    if not go_through(model, loader, consume, runtime, world, stopped):
        return None
    top1, top5, loss, images = world.sum(sums).tolist()
    return Accuracy(top1 / images, top5 / images, loss / images, int(images))
