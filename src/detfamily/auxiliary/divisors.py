"""What losses are divided by, where it counts the boxes of all processes."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of the tensors that all processes call this with, without a gradient; the same for one process alone.

    All processes have to call it, as often and with the same shape.
    """
    mean = tensor.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean
