"""DETR-family object detectors as compositions of the same blocks."""

__version__ = "0.1.0"
