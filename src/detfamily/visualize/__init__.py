"""Pictures: predictions beside ground truth, and the curves of a run."""

from detfamily.visualize.boxes import draw_boxes, draw_comparison, label_color
from detfamily.visualize.curves import plot_curves

__all__ = ["draw_boxes", "draw_comparison", "label_color", "plot_curves"]
