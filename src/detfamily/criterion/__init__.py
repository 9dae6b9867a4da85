"""The criterion: who answers for which object, and what a wrong answer costs."""

from detfamily.criterion.criterion import Criterion, Losses, Normalizer

__all__ = ["Criterion", "Losses", "Normalizer"]
