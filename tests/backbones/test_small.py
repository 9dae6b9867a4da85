from __future__ import annotations

import pytest
import torch

from detfamily.backbones.small import SmallBackbone


def test_stages_channels_and_strides() -> None:
    backbone = SmallBackbone(4, [6, 8, 10, 12], [3, 5])
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert backbone.channels == [8, 12]
    assert [tuple(one.shape) for one in maps] == [(2, 8, 8, 12), (2, 12, 2, 3)]


def test_nothing_is_built_beyond_the_last_stage() -> None:
    backbone = SmallBackbone(4, [6, 8, 10, 12], [2, 3])
    assert len(backbone.blocks) == 2
    sum(one.sum() for one in backbone(torch.randn(2, 3, 32, 32))).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("stages", [[], [3, 2], [5], [1]])
def test_stages_that_there_are_not(stages: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected ascending stages out of \[2, 3, 4\]"):
        SmallBackbone(4, [6, 8, 10], stages)
