"""The kernels of the package deformops (``pip install deformops``), as rivals for ``benchmark_op.py``.

python scripts/benchmark_op.py --path scripts/rivals --against deformops_op:triton --against deformops_op:cuda
"""

from __future__ import annotations

from typing import Any

import torch
from deformops.registry import Backend, msda
from torch import Tensor

_made: dict[Any, tuple[Tensor, Tensor]] = {}


def triton(value: Tensor, shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor) -> Tensor:
    return _run(Backend.TRITON, value, shapes, locations, weights)


def cuda(value: Tensor, shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor) -> Tensor:
    return _run(Backend.CUDA, value, shapes, locations, weights)


def _run(
    backend: Any, value: Tensor, shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    key = (shapes, value.device)
    if key not in _made:
        sizes = torch.tensor(shapes, device=value.device)
        _made[key] = sizes, torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    output: Tensor = msda(value, *_made[key], locations, weights.to(value.dtype), backend=backend)
    return output
