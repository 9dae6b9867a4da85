"""What a classifier's wrong answers cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.classification.classifier import Scores, labels_of
from detfamily.criterion import Losses, Normalizer
from detfamily.structures import Targets


class SoftmaxLoss(nn.Module):
    """Cross-entropy of the softmax over the classes; of mixed images by their shares.

    Args:
        label_smoothing: the share of the target that all classes get alike (arXiv 1512.00567).

    Raises:
        ValueError: a share out of range.
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"criterion.label_smoothing={label_smoothing}: expected at least 0, less than 1")
        self.label_smoothing = label_smoothing

    def forward(
        self, scores: Scores, targets: Targets, normalizer: Normalizer | None = None, ride: Tensor | None = None
    ) -> Losses:
        """The mean over the images of the whole optimiser step, as far as this batch adds to it.

        Args:
            scores: of the batch.
            targets: with one label for each image.
            normalizer: counts of the whole step; None for a step of this batch alone.
            ride: not taken along, as nothing travels to the host here.
        """
        labels = labels_of(targets)
        if normalizer is None:
            normalizer = Normalizer(torch.ones(len(labels), device=labels.device))
        logits = scores.logits.float()
        if scores.shares is None:
            total = self._sum(logits, labels)
        else:
            pairs = zip(scores.shares.weights, scores.shares.labels, strict=True)
            total = torch.stack([weight * self._sum(logits, mixed) for weight, mixed in pairs]).sum()
        return Losses(total / normalizer.num_boxes(), {}, {})

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
