"""The limits within which golden values have to be met, and what several tests compare with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from detfamily.structures import Detections, Images

Head = TypeVar("Head", bound=nn.Module)


def check_output(found: Tensor, stored: Tensor) -> None:
    assert found.shape == stored.shape
    if stored.numel():
        assert (found - stored).abs().max() <= 3e-5 * stored.abs().max().clamp(min=1)


def check_loss(found: Tensor, stored: Tensor) -> None:
    assert (found - stored).abs() <= 2e-5 * stored.abs() + 1e-6


def check_gradient(found: Tensor | None, stored: Tensor, name: str) -> None:
    assert found is not None and found.shape == stored.shape, name
    most = stored.abs().max()
    assert (found - stored).abs().max() <= (1e-4 if most < 1e-5 else 2e-4 * most + 1e-6), name


def overlap(a: list[float], b: list[float]) -> float:
    """IoU of two boxes (x0, y0, x1, y1)."""
    shared = math.prod(max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return shared / (sum((one[2] - one[0]) * (one[3] - one[1]) for one in (a, b)) - shared)


def detections(
    levels: Iterable[tuple[Tensor, Tensor, Tensor]],
    images: Images,
    image: int,
    nms_iou: float,
    per_level: int,
    num_select: int,
    min_score: float = 0.0,
) -> list[tuple[float, int, list[float]]]:
    """Score, label and box of what should be found: a loop over pairs of box and class.

    Levels are scores (n, K), boxes (n, 4) or (n, K, 4), and factors (n,).
    """
    (height, width), (original_height, original_width) = images.sizes[image], images.original_sizes[image]
    pairs: list[tuple[float, int, list[float]]] = []
    for scores, boxes, factors in levels:
        of_level = []
        for row in range(len(scores)):
            for label in range(scores.shape[1]):
                box = (boxes[row] if boxes.dim() == 2 else boxes[row, label]).tolist()
                box = [min(max(one, 0.0), (width, height)[axis % 2]) for axis, one in enumerate(box)]
                score = scores[row, label].item()
                if score > min_score:
                    of_level.append((score, score * factors[row].item(), label, box))
        pairs += [one[1:] for one in sorted(of_level, key=lambda one: -one[0])[:per_level]]
    kept: list[tuple[float, int, list[float]]] = []
    for score, label, box in sorted(pairs, key=lambda one: -one[0]):
        real = box[2] > box[0] and box[3] > box[1]
        if real and all(overlap(box, other) <= nms_iou for _, same, other in kept if same == label):
            kept.append((score, label, box))
    stretch = [original_width / width, original_height / height]
    return [(score, label, [one * stretch[i % 2] for i, one in enumerate(box)]) for score, label, box in kept][
        :num_select
    ]


def check_detections(found: Detections, wanted: list[tuple[float, int, list[float]]]) -> None:
    assert wanted and found.labels.tolist() == [label for _, label, _ in wanted]
    torch.testing.assert_close(found.scores, torch.tensor([score for score, _, _ in wanted]).to(found.scores))
    torch.testing.assert_close(found.boxes_xyxy, torch.tensor([box for *_, box in wanted]).to(found.boxes_xyxy))


def scatter_weights(head: Head) -> Head:
    """Weights in float64 that make the head say something different of every anchor."""
    torch.manual_seed(1)
    for parameter in head.double().parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head


def check_against_naive(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], maps: Sequence[Tensor], head: nn.Module
) -> None:
    """Losses of a head, and the gradients of each to the maps and the weights, where both have one."""
    assert set(found) == set(wanted)
    leaves = [*maps, *head.parameters()]
    for name, loss in found.items():
        torch.testing.assert_close(loss, wanted[name], rtol=1e-5, atol=1e-8)
        own = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        if not wanted[name].requires_grad:  # the loop met nothing
            assert not any(one is not None and one.any() for one in own)
            continue
        naive = torch.autograd.grad(wanted[name], leaves, retain_graph=True, allow_unused=True)
        for ours, theirs, leaf in zip(own, naive, leaves, strict=True):
            ours, theirs = (torch.zeros_like(leaf) if one is None else one for one in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
