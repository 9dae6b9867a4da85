from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

Count = Callable[[Callable[[], object]], int]


@pytest.fixture(scope="module")
def count() -> Count:
    sys.path.append(str(Path(__file__).parents[2] / "scripts"))
    from host_reads import count_host_reads

    return count_host_reads


HOME = torch.device("cpu")
SEEN = torch.arange(6.0).view(2, 3)  # what a model would have on its device

READS: dict[str, Callable[[], object]] = {
    "cpu": lambda: SEEN.cpu(),
    "to cpu": lambda: SEEN.to("cpu"),
    "numpy": lambda: SEEN.numpy(),
    "array": lambda: np.asarray(SEEN),
    "tolist": lambda: SEEN.tolist(),
    "item": lambda: SEEN[0, 1].item(),
    "int": lambda: int(SEEN[0, 1]),
    "float": lambda: float(SEEN.sum()),
    "bool": lambda: bool((SEEN > 1).any()),
    "size": lambda: torch.zeros(5)[: SEEN.long()[0, 1]],
    "nonzero": lambda: SEEN.nonzero(),
    "where": lambda: torch.where(SEEN > 2),
    "mask": lambda: SEEN[SEEN > 2],
    "values by mask": lambda: SEEN.clone().__setitem__(SEEN > 3, torch.ones(2)),
    "made there": lambda: torch.arange(3, device=HOME).tolist(),
    "brought there": lambda: torch.arange(3).to(HOME).tolist(),
    "mixed": lambda: (SEEN + torch.ones(3)).sum().item(),
    "asked in the backward pass": lambda: _Asking.apply(SEEN.clone().requires_grad_()).sum().backward(),
}
FREE: dict[str, Callable[[], object]] = {
    "arithmetic": lambda: (SEEN.sigmoid() @ SEEN.T).argmax(1),
    "made here": lambda: torch.arange(3).add(1).tolist(),
    "from numpy": lambda: torch.from_numpy(np.ones(3)).to(HOME),
    "places from here": lambda: SEEN[torch.tensor([1, 0]), torch.tensor([2, 2])],
    "filled by mask": lambda: SEEN.clone().__setitem__(SEEN > 3, 0.0),
    "another type": lambda: SEEN.to(torch.float64),
    "shape": lambda: SEEN.new_zeros(SEEN.shape[0]),
}


class _Asking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * float(grad.sum())


@pytest.mark.parametrize("name", READS)
def test_what_is_a_read(count: Count, name: str) -> None:
    assert count(READS[name]) == 1


@pytest.mark.parametrize("name", FREE)
def test_what_is_none(count: Count, name: str) -> None:
    assert count(FREE[name]) == 0


def test_what_was_read_is_here_and_the_original_is_not(count: Count) -> None:
    def run() -> None:
        here = SEEN.cpu()
        here.tolist()
        here.sum().item()
        SEEN.sum().item()

    assert count(run) == 2


def test_a_model_is_on_the_device(count: Count) -> None:
    layer = nn.Linear(3, 2)
    assert count(lambda: layer(SEEN)) == 0
    assert count(lambda: layer(torch.ones(1, 3)).tolist()) == 1
