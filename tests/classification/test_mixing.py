"""Mixup and CutMix: the pixels say what the shares say, and the loss is that of soft targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detfamily.classification.classifier import Scores
from detfamily.classification.criterion import SoftmaxLoss
from detfamily.classification.mixing import Mixing, Shares, paste
from detfamily.criterion import Normalizer


def constant(values) -> torch.Tensor:
    """Images of one value each, so that the mean of a mixed one tells its shares."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 20, 30).clone()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_pixels_are_mixed_by_the_shares(mixup, cutmix):
    torch.manual_seed(0)
    values, labels, kinds = [1.0, 2.0, 5.0], torch.tensor([7, 8, 9]), set()
    for _ in range(40):
        pixels = constant(values)
        mixed, shares = Mixing(mixup, cutmix)(pixels, labels)
        assert torch.equal(pixels, constant(values)) and sum(shares.weights) == pytest.approx(1)
        assert shares.labels.tolist() == [[7, 8, 9], [9, 8, 7]]
        own, other = shares.weights
        for image, value, partner in zip(mixed, values, values[::-1], strict=True):
            assert image.mean().item() == pytest.approx(own * value + other * partner)
        kinds.add(bool(mixed[0].unique().numel() > 1))  # CutMix leaves two values, mixup one
    assert (True in kinds) == (cutmix > 0) and (mixup == 0 or False in kinds)


def test_boxes_are_as_large_as_asked_for_and_cut_off_at_the_border():
    torch.manual_seed(0)
    pixels, shares = constant([0.0, 1.0]), []
    for _ in range(50):
        mixed, own = paste(pixels, 0.75)
        rows, columns = (mixed[0, 0].any(axis) for axis in (1, 0))
        assert mixed[0, 0, rows][:, columns].all() and rows.sum() <= 10 and columns.sum() <= 15
        shares.append(own)
    assert min(shares) == pytest.approx(1 - 10 * 14 / 600) and max(shares) > min(shares)


def test_some_batches_are_left_alone():
    torch.manual_seed(0)
    pixels, labels = constant([0.0, 1.0]), torch.tensor([0, 1])
    found = [Mixing(probability=0.3)(pixels, labels)[1] is None for _ in range(200)]
    assert 110 < sum(found) < 170
    assert Mixing(probability=0.0)(pixels, labels)[0] is pixels


@pytest.mark.parametrize("arguments", [{"mixup": -1}, {"mixup": 0, "cutmix": 0}, {"probability": 2}, {"switch": -0.1}])
def test_numbers_out_of_range(arguments):
    with pytest.raises(ValueError, match="expected"):
        Mixing(**arguments)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_with_soft_targets(batch, smoothing):
    labels = torch.tensor([0, 1, 3, 3])
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    shares = Shares(torch.stack([labels, labels.flip(0)]), (0.3, 0.7))
    _, targets = batch(labels)
    found = SoftmaxLoss(smoothing)(Scores(logits, shares), targets).total
    off = smoothing / 5
    hot = torch.full((4, 5), off, dtype=torch.float64)
    hot.scatter_(1, labels[:, None], 1 - smoothing + off)
    soft = 0.3 * hot + 0.7 * hot.flip(0)
    expected = -(soft * F.log_softmax(logits.double(), 1)).sum(1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_is_divided_by_the_images_of_the_whole_step(batch):
    """Two processes, two micro-batches of two images each: gradients are averaged over them, and summed in one."""
    labels = torch.tensor([0, 1])
    _, targets = batch(labels)
    scores = Scores(torch.randn(2, 4))
    alone = SoftmaxLoss(0.0)(scores, targets).total
    part = SoftmaxLoss(0.0)(scores, targets, Normalizer(torch.ones(8), world_size=2)).total
    assert part.item() == pytest.approx(alone.item() / 2)
