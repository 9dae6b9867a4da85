"""Prediction: a checkpoint and images in, boxes in pixels with names out."""

from detfamily.predict.predictor import ImageLike, Outcome, Prediction, Predictor, load
from detfamily.predict.sources import Source, find_images

__all__ = ["ImageLike", "Outcome", "Prediction", "Predictor", "Source", "find_images", "load"]
