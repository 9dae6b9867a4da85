"""Other repositories' weights: one adapter per upstream, which knows their names and ours."""

from detfamily.checkpoints.adapter import Adapter
from detfamily.checkpoints.registry import adapter_for

__all__ = ["Adapter", "adapter_for"]
