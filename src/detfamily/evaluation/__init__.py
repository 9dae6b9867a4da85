"""How good detections are: COCO's metrics, and COCO's results files."""

from detfamily.evaluation.coco_metrics import (
    BACKENDS,
    COCO_AREA_RANGES,
    Backend,
    CocoEvaluator,
    CocoMetrics,
    GroundTruth,
    MetricSettings,
    compute_metrics,
)
from detfamily.evaluation.results import evaluate_results, read_results, write_results

__all__ = [
    "BACKENDS",
    "COCO_AREA_RANGES",
    "Backend",
    "CocoEvaluator",
    "CocoMetrics",
    "GroundTruth",
    "MetricSettings",
    "compute_metrics",
    "evaluate_results",
    "read_results",
    "write_results",
]
