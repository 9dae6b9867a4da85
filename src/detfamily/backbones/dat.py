"""DAT and DAT++ (arXiv 2201.00520, arXiv 2309.01430): stages whose blocks each have an attention of their own kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from detfamily.attention.maps import conv_on_map
from detfamily.attention.neighborhood import NeighborhoodAttention
from detfamily.attention.window import WindowAttention
from detfamily.backbones.dat_blocks import LayerScale, LocalPerception, depthwise
from detfamily.backbones.dat_weights import load_weights
from detfamily.backbones.stages import PATCH, Block, StagedBackbone, check_settings, drop_path_rates, make_stages
from detfamily.blocks.layers import FeedForward
from detfamily.errors import nearest

CONV = "conv"
"""The kind of block that has a depth-wise convolution in the place of its attention."""

Factory = Callable[..., nn.Module]
T = TypeVar("T")


class DAT(StagedBackbone):
    """C2, C3, ... of a DAT, or of other attentions in its frame, with the numbers of the official code for detection.

    Where convolutions have no padding, as in DAT of 2022, what is left over at the right and at the bottom of an image
    or a map is not seen: give images of a multiple of 32 pixels. No stage is built beyond the last that is given.

    Settings "for all stages" may also be lists, with one for each stage.

    Args:
        embed_dim: channels of C2; each stage has twice those of the one before.
        depths: blocks of C2, C3, ...
        num_heads: heads of C2, C3, ...
        spec: the kinds of the blocks of each stage, in turn, from the start again where there are more blocks: names of
            attentions, or "conv".
        attention: name -> factory of any attention that an encoder may have, called with ``embed_dim`` and
            ``num_heads`` of the stage whose spec names it.
        ffn: factory of (B, h, w, C) -> (B, h, w, C), called with ``embed_dim`` and ``hidden_dim``. For all stages.
        stem: factory of what makes tokens of patches of 4 x 4 pixels, called with ``embed_dim``.
        merge_kernel: side of the strided convolutions between stages: 2, or 3 with padding.
        stages: which of C2, C3, ... to give, ascending.
        frozen_stages: stages without gradient and drop path from the stem (C1) on: 2 freezes stem and C2.
        drop_path: probability of leaving out a branch of the last block, for an image in training; from the first
            block to the last it grows evenly from 0 (stochastic depth, arXiv 1603.09382).
        mlp_ratio: hidden width of the FFNs, in widths of the stage.
        local_perception: whether blocks begin with a depth-wise convolution. For all stages.
        layer_scale: what learned factors of the branches start with; None for no factors. For all stages.
        conv_kernel: side of the convolutions of "conv" blocks. For all stages.
        gradient_checkpointing: in training, compute blocks once more in the backward pass instead of keeping what it
            needs of them.
        weights: official name of ImageNet weights, which tells where to download them by hand; a path of such a file,
            or of one of a detector's; or None for random weights. Tables of position biases of another size are
            interpolated.

    Raises:
        ValueError: stages out of range, kinds without attention, or other settings that contradict each other.
        CheckpointError: weights cannot be read, or are of another network.
    """

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        spec: Sequence[Sequence[str]],
        attention: Mapping[str, Factory],
        ffn: Factory | Sequence[Factory],
        stem: Factory,
        merge_kernel: int,
        stages: Sequence[int],
        frozen_stages: int = 0,
        drop_path: float = 0.2,
        mlp_ratio: float = 4.0,
        local_perception: bool | Sequence[bool] = False,
        layer_scale: float | Sequence[float | None] | None = None,
        conv_kernel: int | Sequence[int] = 7,
        gradient_checkpointing: bool = False,
        weights: str | None = None,
    ) -> None:
        check_settings(depths, num_heads, stages, frozen_stages, drop_path)
        _check_spec(depths, spec, attention)
        if merge_kernel not in (2, 3):
            raise ValueError(f"backbone.merge_kernel={merge_kernel}: expected 2, or 3 with padding")
        count = len(depths)
        widths = [embed_dim * 2**index for index in range(count)]
        rates = drop_path_rates(drop_path, depths)
        ffns = _per_stage("ffn", ffn, count)
        local = _per_stage("local_perception", local_perception, count)
        scales = _per_stage("layer_scale", layer_scale, count)
        kernels = _per_stage("conv_kernel", conv_kernel, count)

        def block(index: int, number: int) -> nn.Module:
            width, rate, kind = widths[index], rates[index][number], spec[index][number % len(spec[index])]
            ffn = ffns[index](embed_dim=width, hidden_dim=int(width * mlp_ratio))
            perception = LocalPerception(width) if local[index] else None
            if kind == CONV:
                return ConvBlock(width, kernels[index], ffn, rate, perception)
            made = attention[kind](embed_dim=width, num_heads=num_heads[index])
            value = scales[index]
            scale = None if value is None else partial(LayerScale, value=value)
            return Block(width, made, ffn, rate, perception, scale)

        super().__init__(
            stem(embed_dim=embed_dim),
            make_stages(widths, depths, stages, block, lambda width: StridedMerge(width, merge_kernel)),
            channels=[widths[stage - 2] for stage in stages],
            frozen_stages=frozen_stages,
            gradient_checkpointing=gradient_checkpointing,
        )
        self._initialize()
        if weights is not None:
            load_weights(self, weights)

    def _initialize(self) -> None:
        """PyTorch's own weights, as officially, also in what has others elsewhere."""
        for module in self.modules():
            if isinstance(module, WindowAttention | NeighborhoodAttention | FeedForward):
                for linear in module.children():
                    if isinstance(linear, nn.Linear):
                        linear.reset_parameters()
            if isinstance(module, WindowAttention) and module.position_bias is not None:
                nn.init.trunc_normal_(module.position_bias, std=0.01)


class ConvBlock(nn.Module):
    """A block of ConvNeXt (arXiv 2201.03545, figure 4): depth-wise convolution, norm and FFN in one branch.

    Args:
        embed_dim: width C.
        kernel_size: side of the convolution; odd.
        ffn: (B, h, w, C) -> (B, h, w, C).
        drop_path: probability of leaving out the branch, for an image in training.
        local: (B, h, w, C) -> (B, h, w, C), ahead of the branch; None for nothing.

    Raises:
        ValueError: the kernel has an even side, which would change the map's size.
    """

    def __init__(
        self, embed_dim: int, kernel_size: int, ffn: nn.Module, drop_path: float, local: nn.Module | None = None
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"backbone.conv_kernel={kernel_size}: expected an odd number of tokens")
        self.local = local
        self.conv = depthwise(embed_dim, kernel_size)
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.ffn = ffn
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        if self.local is not None:
            x = self.local(x)
        output: Tensor = x + self.drop_path(self.ffn(self.ffn_norm(conv_on_map(self.conv, x))))
        return output


class PatchStem(nn.Module):
    """One convolution of stride 4, and a norm.

    Args:
        embed_dim: width C.
        kernel_size: side of the convolution, in pixels; more than 4 let patches overlap.
        padding: zeros around the image, in pixels.
        stem_dim: channels of the convolution, where they are others: then a linear layer leads to C.
    """

    def __init__(self, embed_dim: int, kernel_size: int = PATCH, padding: int = 0, stem_dim: int | None = None) -> None:
        super().__init__()
        width = stem_dim or embed_dim
        self.conv = nn.Conv2d(3, width, kernel_size, PATCH, padding)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, embed_dim) if width != embed_dim else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, C)"""
        tokens: Tensor = self.proj(self.norm(_strided(self.conv, pixels)))
        return tokens


class ConvStem(nn.Module):
    """Two convolutions of stride 2, with norms, and GELU between them (DAT++, section 4.2).

    Args:
        embed_dim: width C.
        stem_dim: channels of the second convolution, twice those of the first, where they are not C: then a linear
            layer leads to C.
    """

    def __init__(self, embed_dim: int, stem_dim: int | None = None) -> None:
        super().__init__()
        width = stem_dim or embed_dim
        self.conv1 = nn.Conv2d(3, width // 2, 3, 2, 1)
        self.norm1 = nn.LayerNorm(width // 2)
        self.activation = nn.GELU()
        self.conv2 = nn.Conv2d(width // 2, width, 3, 2, 1)
        self.norm2 = nn.LayerNorm(width)
        self.proj = nn.Linear(width, embed_dim) if width != embed_dim else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, C)"""
        x = self.activation(self.norm1(_strided(self.conv1, pixels)))
        tokens: Tensor = self.proj(self.norm2(conv_on_map(self.conv2, x)))
        return tokens


class StridedMerge(nn.Module):
    """A convolution of stride 2 to twice the width, and a norm.

    Args:
        embed_dim: width C.
        kernel_size: 2, which leaves out the last row or column of odd ones, or 3 with padding.
    """

    def __init__(self, embed_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(embed_dim, 2 * embed_dim, kernel_size, 2, (kernel_size - 1) // 2, bias=False)
        self.norm = nn.LayerNorm(2 * embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h / 2, w / 2, 2C)"""
        output: Tensor = self.norm(_strided(self.conv, x.permute(0, 3, 1, 2)))
        return output


def _strided(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h', w', C')"""
    least = int(conv.kernel_size[0]) - 2 * int(conv.padding[0])
    if min(x.shape[-2:]) < least:
        raise ValueError(
            f"a map of {x.shape[-2]} x {x.shape[-1]} is too small for the {conv.kernel_size[0]} x "
            f"{conv.kernel_size[1]} convolutions of the backbone: larger images, or backbone.merge_kernel=3"
        )
    output: Tensor = conv(x).permute(0, 2, 3, 1)
    return output


def _per_stage(name: str, value: T | Sequence[T], count: int) -> list[T]:
    """One value for each stage."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"backbone.{name} lists {len(value)} values: expected one, or {count}, one for each stage")
    return list(value)


def _check_spec(depths: Sequence[int], spec: Sequence[Sequence[str]], attention: Mapping[str, object]) -> None:
    if len(spec) != len(depths):
        raise ValueError(f"backbone.spec lists {len(spec)} stages, backbone.depths {len(depths)}: expected as many")
    if CONV in attention:
        raise ValueError(f"backbone.attention.{CONV}: this name is taken by blocks with a convolution; choose another")
    for index, (kinds, depth) in enumerate(zip(spec, depths, strict=True)):
        if not kinds or depth % len(kinds):
            raise ValueError(
                f"backbone.spec[{index}] lists {len(kinds)} kinds for {depth} blocks: expected one for each block, or "
                "as many as divide their number, to be repeated"
            )
        for kind in kinds:
            if kind != CONV and kind not in attention:
                raise ValueError(
                    f"backbone.spec[{index}] names {kind!r}, which backbone.attention has not: "
                    f"{nearest(kind, [*attention, CONV])}"
                )
