"""The limits within which golden values have to be met."""

from __future__ import annotations

from torch import Tensor


def check_output(found: Tensor, stored: Tensor) -> None:
    assert found.shape == stored.shape
    if stored.numel():
        assert (found - stored).abs().max() <= 3e-5 * stored.abs().max().clamp(min=1)


def check_loss(found: Tensor, stored: Tensor) -> None:
    assert (found - stored).abs() <= 2e-5 * stored.abs() + 1e-6


def check_gradient(found: Tensor | None, stored: Tensor, name: str) -> None:
    assert found is not None and found.shape == stored.shape, name
    most = stored.abs().max()
    assert (found - stored).abs().max() <= (1e-4 if most < 1e-5 else 2e-4 * most + 1e-6), name
