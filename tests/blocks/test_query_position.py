from __future__ import annotations

import torch

from detfamily.blocks.query_position import FixedPosition
from detfamily.structures import Queries, Tokens


def test_the_same_in_every_layer() -> None:
    content, pos = torch.randn(2, 1, 3, 4)
    memory = Tokens(content)
    for layer in range(3):
        assert FixedPosition()(layer, Queries(content, pos), memory) is pos
        assert FixedPosition()(layer, Queries(content), memory) is None
