"""From predictions to detections in pixels of the original images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from detfamily.blocks.boxes import to_xyxy
from detfamily.blocks.soft_nms import soft_nms
from detfamily.structures import Detections, Images, Predictions


class SoftmaxScores(nn.Module):
    """Probabilities of the classes next to "no object", whose column is dropped."""

    def forward(self, logits: Tensor) -> Tensor:
        """(..., K + 1) -> (..., K)"""
        return logits.softmax(-1)[..., :-1]


class SigmoidScores(nn.Module):
    """Probabilities of the classes, each on its own."""

    def forward(self, logits: Tensor) -> Tensor:
        """(..., K) -> (..., K)"""
        return logits.sigmoid()


class PerQuery(nn.Module):
    """One detection per query, its best class, in the order of the queries (DETR's ``PostProcess``).

    Args:
        scores: from logits to probabilities.
        layer: which decoder layer answers; -1 is the last.
        nms_iou: suppress boxes of one class that overlap more than this; None for no suppression.
        override_empty: a query that says "no object" answers with its best class all the same (DETR, section 4); False
            drops such queries. Only heads with a "no object" column say it.
    """

    def __init__(
        self, scores: nn.Module, layer: int = -1, nms_iou: float | None = None, override_empty: bool = True
    ) -> None:
        super().__init__()
        _check(scores, nms_iou, override_empty)
        self.scores = scores
        self.layer = layer
        self.nms_iou = nms_iou
        self.override_empty = override_empty

    def forward(self, predictions: Mapping[str, Predictions], images: Images) -> list[Detections]:
        """The detections of each image."""
        logits, boxes = _layer(predictions["match"], self.layer)
        scores, labels = self.scores(logits).max(-1)
        boxes_xyxy = _to_pixels(boxes, images)
        kept = torch.ones_like(labels, dtype=torch.bool)
        if not self.override_empty:
            kept = logits.argmax(-1) < logits.shape[-1] - 1
        found = zip(scores, labels, boxes_xyxy, kept, strict=True)
        return [_nms(Detections(s[k], n[k], b[k]), self.nms_iou) for s, n, b, k in found]


class TopK(nn.Module):
    """The best pairs of query and class, best first (Deformable DETR's ``PostProcess``).

    Args:
        scores: from logits to probabilities.
        num_select: pairs taken; 100 in Deformable DETR, 300 in DAB-DETR and DINO. Fewer where there are fewer.
        layer: which decoder layer answers; -1 is the last.
        nms_iou: suppress boxes of one class that overlap more than this; None for no suppression.
        soft_nms_iou: lower the scores of boxes of one class that overlap by this or more (``soft_nms``), and drop those
            that have nothing left; None for no suppression. Co-DINO: 0.8.
        max_detections: the best ones that are left after suppression; None for all of them. Co-DINO: 300.
        clip: cut boxes off at the edges of the image, before suppression (Co-DETR).
    """

    def __init__(
        self,
        scores: nn.Module,
        num_select: int = 100,
        layer: int = -1,
        nms_iou: float | None = None,
        soft_nms_iou: float | None = None,
        max_detections: int | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__()
        _check(scores, nms_iou, override_empty=True)
        _check_iou(soft_nms_iou, "soft_nms_iou")
        if nms_iou is not None and soft_nms_iou is not None:
            raise ValueError(
                f"postprocess.nms_iou={nms_iou} and postprocess.soft_nms_iou={soft_nms_iou}: expected one of them, "
                "and null for the other"
            )
        if num_select < 1:
            raise ValueError(f"postprocess.num_select={num_select}: expected 1 or more")
        if max_detections is not None and max_detections < 1:
            raise ValueError(f"postprocess.max_detections={max_detections}: expected 1 or more, or null for all")
        self.scores = scores
        self.num_select = num_select
        self.layer = layer
        self.nms_iou = nms_iou
        self.soft_nms_iou = soft_nms_iou
        self.max_detections = max_detections
        self.clip = clip

    def forward(self, predictions: Mapping[str, Predictions], images: Images) -> list[Detections]:
        """The detections of each image."""
        logits, boxes = _layer(predictions["match"], self.layer)
        all_scores = self.scores(logits)
        classes = all_scores.shape[-1]
        scores, index = all_scores.flatten(1).topk(min(self.num_select, all_scores[0].numel()))
        query, labels = index // classes, index % classes
        boxes_xyxy = _to_pixels(boxes, images, self.clip).gather(1, query[..., None].expand(-1, -1, 4))
        if self.soft_nms_iou is None:
            found = zip(scores, labels, boxes_xyxy, strict=True)
            kept = [_nms(Detections(s, n, b), self.nms_iou) for s, n, b in found]
        else:
            kept = _soft_nms(scores, labels, boxes_xyxy, self.soft_nms_iou)
        return kept if self.max_detections is None else [_first(one, self.max_detections) for one in kept]


def _check(scores: nn.Module, nms_iou: float | None, override_empty: bool) -> None:
    _check_iou(nms_iou, "nms_iou")
    if not override_empty and not isinstance(scores, SoftmaxScores):
        raise ValueError("postprocess.override_empty=false needs a 'no object' column: classification=softmax")


def _check_iou(iou: float | None, name: str) -> None:
    if iou is not None and not 0 < iou <= 1:
        raise ValueError(f"postprocess.{name}={iou}: expected a number in (0, 1], or null for no suppression")


def _layer(predictions: Predictions, layer: int) -> tuple[Tensor, Tensor]:
    depth = len(predictions.logits)
    if not -depth <= layer < depth:
        raise ValueError(f"postprocess.layer={layer}: the decoder has layers 0 to {depth - 1}")
    return predictions.logits[layer], predictions.boxes[layer]


def _to_pixels(boxes: Tensor, images: Images, clip: bool = False) -> Tensor:
    """(B, N, 4) cx, cy, w, h in (0, 1) to corners in original pixels; officially cut off at the edges only by some."""
    boxes_xyxy = to_xyxy(boxes) * _corners(images.canvas_sizes or images.original_sizes, boxes)
    return torch.minimum(boxes_xyxy.clamp(min=0), _corners(images.original_sizes, boxes)) if clip else boxes_xyxy


def _corners(sizes: Sequence[tuple[float, float]], like: Tensor) -> Tensor:
    """(B, 1, 4) width, height, width, height."""
    rows = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=like.dtype)
    return rows.to(like.device, non_blocking=True)[:, None]


def _nms(detections: Detections, iou: float | None) -> Detections:
    if iou is None:
        return detections
    kept = batched_nms(detections.boxes_xyxy, detections.scores, detections.labels, iou)
    return Detections(detections.scores[kept], detections.labels[kept], detections.boxes_xyxy[kept])


def _soft_nms(scores: Tensor, labels: Tensor, boxes_xyxy: Tensor, iou: float) -> list[Detections]:
    """(B, N) scores and labels, (B, N, 4) boxes to the detections that have any score left, best first."""
    scores, order = soft_nms(boxes_xyxy, scores, labels, iou).sort(descending=True, stable=True)
    labels, boxes_xyxy = labels.gather(1, order), boxes_xyxy.gather(1, order[..., None].expand(-1, -1, 4))
    counts = (scores > 0).sum(-1).tolist()
    found = zip(scores, labels, boxes_xyxy, counts, strict=True)
    return [_first(Detections(s, n, b), count) for s, n, b, count in found]


def _first(detections: Detections, count: int) -> Detections:
    return Detections(detections.scores[:count], detections.labels[:count], detections.boxes_xyxy[:count])
