"""The convolutions with which dense heads start."""

from __future__ import annotations

from torch import Tensor, nn

from detfamily.auxiliary.initialise import start_small


class Block(nn.Module):
    """A convolution, its norm, and a ReLU."""

    def __init__(self, embed_dim: int, num_groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(num_groups, embed_dim)
        start_small(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same."""
        hidden: Tensor = self.norm(self.conv(x))
        return hidden.relu()


def tower(embed_dim: int, depth: int, num_groups: int) -> nn.Sequential:
    """``depth`` blocks, one after the other; none of them leaves maps as they are."""
    return nn.Sequential(*(Block(embed_dim, num_groups) for _ in range(depth)))
