from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
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


@pytest.mark.parametrize("case", ["co_dino_eval", "co_deformable_eval"])
def test_as_co_detr(goldens: Path, case: str) -> None:
    folder = goldens / "co_detr" / case
    args, io = json.loads((folder / "case.json").read_text())["args"], load_file(folder / "io.safetensors")
    soft = args["test_nms"] == "soft_nms"
    postprocess = TopK(
        SigmoidScores(),
        num_select=args["num_query"] if soft else args["max_per_img"],
        soft_nms_iou=args["test_nms_iou_threshold"] if soft else None,
        max_detections=args["max_per_img"] if soft else None,
        clip=True,
    )
    said = {"match": Predictions(io["synth.pred_logits"][None], io["synth.pred_boxes"][None])}
    sizes = [tuple(io[f"targets.{image}.size"].tolist()) for image in range(BATCH)]
    found = postprocess(said, Images(torch.zeros(BATCH, 3, 8, 8), io["mask"], (), tuple(sizes), (0, 1)))
    for image, one in enumerate(found):
        expected = {key: io[f"post_synth.{image}.{key}"] for key in ("scores", "labels", "boxes")}
        torch.testing.assert_close(one.scores, expected["scores"], rtol=1e-5, atol=1e-6)
        assert one.labels.tolist() == expected["labels"].tolist()
        original = one.boxes_xyxy / io["scale_factor"][image]
        torch.testing.assert_close(original, expected["boxes"], rtol=1e-5, atol=1e-4)


def test_soft_suppression_lowers_scores_and_drops_what_is_left_with_none() -> None:
    logits = torch.tensor([[[[3.0, -9.0], [2.0, -9.0], [1.0, -9.0], [-8.0, 0.0]]]])
    boxes = torch.tensor([[[[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.36], [0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4]]]])
    one = Images(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool), ((8, 8),), ((8, 8),), (0,))
    (found,) = TopK(SigmoidScores(), num_select=8, soft_nms_iou=0.8)({"match": Predictions(logits, boxes)}, one)
    assert found.labels.tolist() == [0, 1, 0]  # best first after lowering
    expected = torch.tensor([3.0, 0.0, 2.0]).sigmoid() * torch.tensor([1.0, 1.0, 0.1])
    torch.testing.assert_close(found.scores, expected)
    (best,) = TopK(SigmoidScores(), 8, soft_nms_iou=0.8, max_detections=2)({"match": Predictions(logits, boxes)}, one)
    assert torch.equal(best.scores, found.scores[:2]) and torch.equal(best.boxes_xyxy, found.boxes_xyxy[:2])


def test_clipping() -> None:
    boxes = torch.tensor([[[[0.1, 0.5, 0.4, 0.5], [0.9, 0.9, 0.4, 0.4]]] * BATCH])
    said = {"match": Predictions(torch.tensor([[[[2.0], [1.0]]] * BATCH]), boxes)}
    for found, (height, width) in zip(TopK(SigmoidScores(), clip=True)(said, images()), SIZES, strict=True):
        expected = torch.tensor([[0, 0.25, 0.3, 0.75], [0.7, 0.7, 1, 1]]) * torch.tensor([width, height] * 2)
        torch.testing.assert_close(found.boxes_xyxy, expected)
    assert TopK(SigmoidScores())(said, images())[0].boxes_xyxy[0, 0] < 0


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
    with pytest.raises(ValueError, match=r"postprocess\.soft_nms_iou=2\.0: expected a number in \(0, 1\]"):
        TopK(SigmoidScores(), soft_nms_iou=2.0)
    with pytest.raises(ValueError, match=r"nms_iou=0\.7 and postprocess\.soft_nms_iou=0\.8: expected one of them"):
        TopK(SigmoidScores(), nms_iou=0.7, soft_nms_iou=0.8)
    with pytest.raises(ValueError, match=r"postprocess\.max_detections=0: expected 1 or more, or null"):
        TopK(SigmoidScores(), max_detections=0)
    with pytest.raises(ValueError, match=r"postprocess\.num_select=0: expected 1 or more"):
        TopK(SigmoidScores(), num_select=0)
    with pytest.raises(ValueError, match="needs a 'no object' column"):
        PerQuery(SigmoidScores(), override_empty=False)
    for layer in (LAYERS, -LAYERS - 1):
        with pytest.raises(ValueError, match=rf"postprocess\.layer={layer}: the decoder has layers 0 to 1"):
            TopK(SigmoidScores(), layer=layer)(predictions(), images())
