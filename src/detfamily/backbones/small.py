"""A backbone of a few hundred thousand parameters, for miniatures and tests."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detfamily.backbones.resnet import check_stages


class SmallBackbone(nn.Module):
    """A stride-2 stem, then stages of one stride-2 convolution and one residual block each, with batch norm.

    Args:
        stem_width: channels of the stem, which is C1.
        widths: channels of C2, C3, ...
        stages: which stages to give, ascending; none is built beyond the last of them.
    """

    def __init__(self, stem_width: int, widths: Sequence[int], stages: Sequence[int]) -> None:
        super().__init__()
        available = range(2, 2 + len(widths))
        check_stages(stages, available)
        self.stem = _conv(3, stem_width, stride=2)
        outputs = list(widths[: stages[-1] - 1])
        inputs = [stem_width, *outputs[:-1]]
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(a, b, stride=2), _ResidualBlock(b)) for a, b in zip(inputs, outputs, strict=True)
        )
        self.stages = tuple(stages)
        self.channels = [widths[stage - 2] for stage in stages]
        self.strides = [2**stage for stage in stages]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> [(B, c, h, w)]"""
        x = self.stem(pixels)
        maps = []
        for stage, block in enumerate(self.blocks, start=2):
            x = block(x)
            if stage in self.stages:
                maps.append(x)
        return maps


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = (x + self.second(self.first(x))).relu()
        return output


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)
    )
