"""Towers of convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from detfamily.auxiliary.towers import Block, tower


def test_a_convolution_a_norm_and_a_relu() -> None:
    torch.manual_seed(0)
    block, x = Block(8, 4).double(), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    groups = F.conv2d(x, block.conv.weight, padding=1).unflatten(1, (4, 2))
    away = groups - groups.mean((2, 3, 4), keepdim=True)
    wanted = away / (groups.var((2, 3, 4), correction=0, keepdim=True) + block.norm.eps).sqrt()
    torch.testing.assert_close(block(x), wanted.flatten(1, 2).relu())
    assert block.conv.bias is None


def test_depth() -> None:
    x = torch.randn(1, 8, 3, 3)
    assert torch.equal(tower(8, 0, 4)(x), x)
    two = tower(8, 2, 4)
    torch.testing.assert_close(two(x), two[1](two[0](x)))
    assert len(two) == 2
