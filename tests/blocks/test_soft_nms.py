from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detfamily.blocks.soft_nms import soft_nms


def naive(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, min_score: float) -> list[float]:
    """Figure 2 of the paper, one box after the other."""
    left = {index: score for index, score in enumerate(scores.tolist()) if score >= min_score}
    overlaps = box_iou(boxes, boxes).tolist()
    result = [0.0] * len(boxes)
    while left:
        best = max(left, key=left.__getitem__)
        result[best] = left.pop(best)
        for index in list(left):
            if labels[index] == labels[best] and overlaps[best][index] >= iou:
                left[index] *= 1 - overlaps[best][index]
            if left[index] < min_score:
                del left[index]
    return result


def crowded(seed: int, n: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """Two images of boxes that lie in heaps, so that they lower one another in long chains."""
    rng = torch.Generator().manual_seed(seed)
    heaps = torch.rand(2, 8, 2, generator=rng, dtype=torch.float64)
    heap = torch.randint(8, (2, n), generator=rng)
    low = heaps.gather(1, heap[..., None].expand(-1, -1, 2))
    low = low + 0.1 * torch.rand(2, n, 2, generator=rng, dtype=torch.float64)
    high = low + 0.4 + 0.1 * torch.rand(2, n, 2, generator=rng, dtype=torch.float64)
    scores = torch.rand(2, n, generator=rng, dtype=torch.float64) ** 3
    return torch.cat([low, high], -1), scores, torch.randint(3, (2, n), generator=rng)


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("min_score", [1e-3, 0.05])
def test_as_the_papers_loop(iou: float, min_score: float) -> None:
    boxes, scores, labels = crowded(seed=int(iou * 10))
    ours = soft_nms(boxes, scores, labels, iou, min_score)
    for image in range(2):
        expected = naive(boxes[image], scores[image], labels[image], iou, min_score)
        torch.testing.assert_close(ours[image], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    lowered = (ours < scores) & (ours > 0)
    assert bool(lowered.any()) == (iou < 1)


def test_equal_boxes() -> None:
    boxes = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0]]])
    scores = torch.tensor([[0.5, 0.5, 0.4, 0.3, 0.3]])
    left = soft_nms(boxes, scores, torch.tensor([[0, 0, 1, 0, 0]]), 0.8)
    torch.testing.assert_close(left, torch.tensor([[0.5, 0.0, 0.4, 0.3, 0.3]]))  # one stays, and all without area


def test_images_do_not_meet() -> None:
    boxes, scores, labels = crowded(seed=3)
    alone = [soft_nms(b[None], s[None], n[None], 0.8) for b, s, n in zip(boxes, scores, labels, strict=True)]
    assert torch.equal(soft_nms(boxes, scores, labels, 0.8), torch.cat(alone))


def test_nothing_to_suppress() -> None:
    nothing = soft_nms(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64), 0.8)
    assert nothing.shape == (2, 0)
