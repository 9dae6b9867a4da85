"""The classifier: a backbone, the mean over its last map, a linear head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from detfamily.classification.mixing import Mixing, Shares
from detfamily.errors import ConfigError, DataError
from detfamily.structures import Images, Targets


@dataclass(frozen=True)
class Scores:
    """What a classifier says.

    Attributes:
        logits: (B, K).
        shares: what the images were mixed of; None where each shows its own class.
    """

    logits: Tensor
    shares: Shares | None = None


class Classifier(nn.Module):
    """Pixels -> (mixing) -> backbone -> mean over the last map -> linear head.

    The form of Swin (arXiv 2103.14030) and DAT (arXiv 2201.00520), whose norm before the mean is that of the map which
    the backbone gives; the head starts as PyTorch draws it.

    Args:
        normalize: from uint8 pixels to the backbone's input.
        backbone: (B, 3, H, W) -> maps, of which the last is read; its ``channels`` lists theirs.
        num_classes: columns K of the head.
        mixing: mixes images and their classes, in training; None leaves them alone.

    Raises:
        ConfigError: the backbone gives several maps, so that some would be without use.
    """

    def __init__(
        self, normalize: nn.Module, backbone: nn.Module, num_classes: int, mixing: Mixing | None = None
    ) -> None:
        super().__init__()
        channels = list(cast("Sequence[int]", backbone.channels))
        if len(channels) != 1:
            raise ConfigError(f"model.stages has {len(channels)} maps, and a classifier reads one: model.stages=[5]")
        self.normalize = normalize
        self.backbone = backbone
        self.mixing = mixing
        self.head = nn.Linear(channels[0], num_classes)

    def forward(self, images: Images, targets: Targets | None = None) -> Scores:
        """Scores of a batch of images of one size.

        Args:
            images: the batch.
            targets: their classes, one label each; only read where images are mixed.

        Raises:
            DataError: images of different sizes, or an image with no or several labels.
        """
        if images.padded:
            raise DataError(f"images of different sizes in one batch ({images.sizes}): augmentation must end in one")
        pixels, shares = self.normalize(images.pixels, None), None
        if self.training and self.mixing is not None and targets is not None:
            pixels, shares = self.mixing(pixels, labels_of(targets))
        (features,) = self.backbone(pixels)
        return Scores(self.head(features.mean((2, 3))), shares)


def labels_of(targets: Targets) -> Tensor:
    """(B,) the class of each image.

    Raises:
        DataError: an image has no label, or several.
    """
    for image, count in zip(targets.image_ids, targets.counts, strict=True):
        if count != 1:
            raise DataError(f"image {image} has {count} labels; in classification each image has one")
    return targets.labels[:, 0]
