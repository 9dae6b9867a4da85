"""Top-1 and top-5 against a loop over sorted scores."""

from __future__ import annotations

import pytest
import torch

from detfamily.classification.accuracy import is_among, measure
from detfamily.classification.classifier import Scores
from detfamily.engine.distributed import World
from detfamily.engine.runtime import Runtime
from detfamily.structures import Batch


@pytest.mark.parametrize(("classes", "count"), [(10, 1), (10, 5), (3, 5), (1, 1)])
def test_a_class_is_among_the_highest_scores(classes, count):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(50, classes, generator=generator)
    labels = torch.randint(classes, (50,), generator=generator)
    naive = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        naive.append(label in sorted(range(classes), key=lambda one: -row[one])[:count])
    assert is_among(logits, labels, count).tolist() == naive


def test_a_validation_set_is_counted_image_by_image(batch):
    """Batches of different size: their means would not do."""
    table = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    pieces = [Batch(*batch(labels[:5])), Batch(*batch(labels[5:]))]
    given = iter([table[:5], table[5:]])

    class Fixed(torch.nn.Module):
        def forward(self, images):
            assert not self.training
            return Scores(next(given))

    model = Fixed().train()
    found = measure(model, pieces, Runtime(device="cpu"), World())
    order = table.argsort(dim=1, descending=True)
    assert found.top1 == sum(int(order[i, 0]) == int(labels[i]) for i in range(7)) / 7
    assert found.top5 == sum(int(labels[i]) in order[i, :5].tolist() for i in range(7)) / 7
    log_shares = table.double().log_softmax(1)
    assert found.val_loss == pytest.approx(-sum(log_shares[i, labels[i]].item() for i in range(7)) / 7, rel=1e-6)
    assert found.images == 7 and model.training


def test_a_signal_gives_up(batch):
    model = torch.nn.Identity()
    assert measure(model, [Batch(*batch(torch.tensor([0])))], Runtime(device="cpu"), World(), lambda: True) is None
