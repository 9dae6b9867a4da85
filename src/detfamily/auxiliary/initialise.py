"""How the layers of auxiliary heads start."""

from __future__ import annotations

from torch import nn


def start_small(layer: nn.Conv2d | nn.Linear, std: float = 0.01, bias: float = 0.0) -> None:
    """Normal weights of a small deviation, and one bias for all (mmdet's heads)."""
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)
