"""The classifier's form: a norm by the backbone, the mean, a linear head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detfamily.backbones.small import SmallBackbone
from detfamily.backbones.swin import Swin
from detfamily.blocks.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from detfamily.classification.classifier import Classifier, labels_of
from detfamily.classification.mixing import Mixing
from detfamily.errors import DataError
from detfamily.structures import Images, Targets


def small(mixing: nn.Module | None = None) -> Classifier:
    torch.manual_seed(0)
    return Classifier(Normalize(), SmallBackbone(8, [8, 8, 8, 16], [5]), 5, mixing)


def test_scores_are_the_head_of_the_mean_of_the_last_map(batch):
    classifier = small().eval()
    images, targets = batch(torch.tensor([0, 4]))
    mean, std = (torch.tensor(one, dtype=torch.float64)[:, None, None] for one in (IMAGENET_MEAN, IMAGENET_STD))
    (features,) = classifier.backbone(((images.pixels.double() / 255 - mean) / std).float())
    expected = [
        [sum(features[i, c].mean().item() * row[c].item() for c in range(16)) for row in classifier.head.weight]
        for i in range(2)
    ]
    found = classifier(images, targets)
    assert found.shares is None
    torch.testing.assert_close(found.logits - classifier.head.bias, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_swin_has_its_norm_before_the_mean():
    swin = Swin(12, [1, 1, 1, 1], [1, 1, 2, 2], 7, [5])
    assert [name for name, _ in swin.named_modules() if name.endswith("norm") and name.count(".") == 2] == [
        "stages.3.norm"
    ]


def test_images_are_mixed_in_training_only(batch):
    classifier = small(Mixing())
    images, targets = batch(torch.tensor([0, 4]))
    assert classifier.train()(images, targets).shares is not None
    assert classifier.eval()(images, targets).shares is None


def test_images_of_different_size_are_refused():
    sizes = ((32, 32), (32, 20))
    images = Images(torch.zeros(2, 3, 32, 32).byte(), torch.zeros(2, 32, 32, dtype=torch.bool), sizes, sizes, (0, 1))
    with pytest.raises(DataError, match="different sizes"):
        small()(images)


def test_each_image_has_one_label():
    box = torch.rand(1, 4)
    for counts in ((1, 0), (1, 2)):
        labels = [torch.zeros(count, dtype=torch.int64) for count in counts]
        targets = Targets.from_lists(labels, [box.expand(count, -1) for count in counts], [7, 8])
        with pytest.raises(DataError, match=f"image 8 has {counts[1]} labels"):
            labels_of(targets)
