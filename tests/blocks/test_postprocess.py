from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detfamily.blocks.postprocess import PerQuery, SigmoidScores, SoftmaxScores, TopK
from detfamily.structures import Detections, Images, Predictions

LAYERS, BATCH, QUERIES, COLUMNS = 2, 2, 9, 4
SIZES = ((100, 200), (480, 37))


def predictions() -> dict[str, Predictions]:
    torch.manual_seed(0)
    boxes = 0.3 + 0.4 * torch.rand(LAYERS, BATCH, QUERIES, 4)
    return {"match": Predictions(2 * torch.randn(LAYERS, BATCH, QUERIES, COLUMNS), boxes)}


def images() -> Images:
    pixels, mask = torch.zeros(BATCH, 3, 32, 32), torch.zeros(BATCH, 32, 32, dtype=torch.bool)
    return Images(pixels, mask, ((32, 32),) * BATCH, SIZES, tuple(range(BATCH)))


def pixels_of(box: Tensor, size: tuple[int, int]) -> list[float]:
    cx, cy, w, h = box.tolist()
    height, width = size
    return [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]


def compare(found: list[Detections], expected: list[list[tuple[float, int, list[float]]]]) -> None:
    assert len(found) == len(expected)
    for ours, rows in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.scores, torch.tensor([score for score, _, _ in rows]))
        assert ours.labels.tolist() == [label for _, label, _ in rows]
        boxes = torch.tensor([box for _, _, box in rows]).view(-1, 4)
        torch.testing.assert_close(ours.boxes_xyxy, boxes, rtol=1e-5, atol=1e-3)


def naive_per_query(layer: int, override_empty: bool) -> list[list[tuple[float, int, list[float]]]]:
    said = predictions()["match"]
    expected = []
    for image in range(BATCH):
        rows = []
        for query in range(QUERIES):
            logits = said.logits[layer, image, query].tolist()
            total = sum(math.exp(x) for x in logits)
            label = max(range(COLUMNS - 1), key=logits.__getitem__)
            if override_empty or logits[label] > logits[-1]:
                box = pixels_of(said.boxes[layer, image, query], SIZES[image])
                rows.append((math.exp(logits[label]) / total, label, box))
        expected.append(rows)
    return expected


@pytest.mark.parametrize("layer", [-1, 0, 1])
@pytest.mark.parametrize("override_empty", [True, False])
def test_per_query_as_a_naive_loop(layer: int, override_empty: bool) -> None:
    expected = naive_per_query(layer, override_empty)
    assert override_empty == all(len(rows) == QUERIES for rows in expected)
    compare(PerQuery(SoftmaxScores(), layer, None, override_empty)(predictions(), images()), expected)


@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("num_select", [1, 10, 36, 100])
def test_top_k_as_a_naive_loop(num_select: int, layer: int) -> None:
    said = predictions()["match"]
    expected = []
    for image in range(BATCH):
        rows = [
            (
                1 / (1 + math.exp(-float(said.logits[layer, image, query, label]))),
                label,
                pixels_of(said.boxes[layer, image, query], SIZES[image]),
            )
            for query in range(QUERIES)
            for label in range(COLUMNS)
        ]
        expected.append(sorted(rows, key=lambda row: -row[0])[:num_select])
    compare(TopK(SigmoidScores(), num_select, layer)(predictions(), images()), expected)


@pytest.mark.parametrize("iou", [0.2, 0.5, 1.0])
def test_suppression_as_a_naive_loop(iou: float) -> None:
    everything = TopK(SigmoidScores(), num_select=36)(predictions(), images())
    kept = TopK(SigmoidScores(), num_select=36, nms_iou=iou)(predictions(), images())
    for before, after in zip(everything, kept, strict=True):
        overlaps = box_iou(before.boxes_xyxy, before.boxes_xyxy)
        chosen: list[int] = []
        for index in range(36):  # best first
            rivals = [one for one in chosen if before.labels[one] == before.labels[index]]
            if all(overlaps[one, index] <= iou for one in rivals):
                chosen.append(index)
        assert after.scores.tolist() == before.scores[chosen].tolist()
        assert after.labels.tolist() == before.labels[chosen].tolist()
        assert after.boxes_xyxy.tolist() == before.boxes_xyxy[chosen].tolist()
        assert (len(chosen) < 36) == (iou < 1)


def test_per_query_with_suppression_keeps_the_best_of_equal_boxes() -> None:
    logits = torch.tensor([[[[5.0, 0.0, 0.0], [6.0, 0.0, 0.0], [0.0, 5.0, 0.0]]]])
    said = {"match": Predictions(logits, torch.full((1, 1, 3, 4), 0.5))}
    one = Images(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool), ((8, 8),), ((8, 8),), (0,))
    (found,) = PerQuery(SoftmaxScores(), nms_iou=0.5)(said, one)
    assert sorted(found.labels.tolist()) == [0, 1]
    assert float(found.scores.max()) == pytest.approx(math.exp(6) / (math.exp(6) + 2))


def test_one_class() -> None:
    said = {"match": Predictions(torch.randn(1, 1, 5, 1), torch.rand(1, 1, 5, 4))}
    one = Images(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool), ((8, 8),), ((8, 8),), (0,))
    (found,) = TopK(SigmoidScores(), num_select=100)(said, one)
    assert len(found.scores) == 5 and not found.labels.any()
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)


def test_settings_that_make_no_sense() -> None:
    for nms_iou in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match=r"postprocess\.nms_iou=.*expected a number in \(0, 1\]"):
            TopK(SigmoidScores(), nms_iou=nms_iou)
    with pytest.raises(ValueError, match=r"postprocess\.num_select=0: expected 1 or more"):
        TopK(SigmoidScores(), num_select=0)
    with pytest.raises(ValueError, match="needs a 'no object' column"):
        PerQuery(SigmoidScores(), override_empty=False)
    for layer in (LAYERS, -LAYERS - 1):
        with pytest.raises(ValueError, match=rf"postprocess\.layer={layer}: the decoder has layers 0 to 1"):
            TopK(SigmoidScores(), layer=layer)(predictions(), images())
