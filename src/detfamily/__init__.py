"""DETR-family object detectors as compositions of the same blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detfamily.predict import Prediction, Predictor, find_images, load

__version__ = "0.1.0"
__all__ = ["Prediction", "Predictor", "__version__", "find_images", "load"]


def __getattr__(name: str) -> object:
    """Import what needs torch only when it is asked for: ``import detfamily`` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detfamily import predict

    return getattr(predict, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
