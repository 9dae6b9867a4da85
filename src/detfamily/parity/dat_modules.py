"""The parts of DAT's blocks by themselves: attentions and FFNs of LeapLabTHU/DAT and LeapLabTHU/DAT-Detection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detfamily.attention.deformable import DeformableAttention, DeformableAttention2022, PooledAttention
from detfamily.attention.deformable_position import ConvPosition, FixedBias, LogBias, PositionBias, TableBias
from detfamily.attention.maps import MapAttention
from detfamily.attention.neighborhood import NeighborhoodAttention
from detfamily.attention.pyramid import PyramidAttention
from detfamily.attention.qna import LearnedQueryAttention, LinearQueryAttention, SigmoidQueryAttention
from detfamily.attention.slide import SlideAttention
from detfamily.attention.window import WindowAttention
from detfamily.backbones.dat_blocks import ConvFeedForward, MixFeedForward, NormedConvFeedForward
from detfamily.blocks.layers import FeedForward
from detfamily.checkpoints import dat_blocks
from detfamily.checkpoints.adapter import Adapter, Rule
from detfamily.errors import DataError, nearest
from detfamily.parity.case import Case

KERNELS_2022 = (9, 7, 5, 3)
"""Of the offset networks, by stage: the code of 2022 has them in a list."""

OF_2022 = "DAT@566a593"
"""How the code of 2022 is named, which computes something else from the same arguments."""

MIX_FEED_FORWARD = "TransformerMLPWithConv of 2022"
"""Our name of a class that was another one before."""

_DROPOUTS = ("attn_drop", "proj_drop", "drop")
"""Arguments without effect in evaluation."""


_WITHOUT_EFFECT_IF_POOLED = (
    *("q_size", "kv_size", "n_groups", "ksize", "offset_range_factor", "stage_i"),
    *("no_off", "use_pe", "dwc_pe", "fixed_pe", "log_cpb"),
)
"""Arguments of attention without offsets: its network of offsets is asked nothing, and its positions add nothing."""


class Arguments(dict[str, Any]):
    """Official arguments, of which each has to be taken by somebody."""

    def one_of(self, name: str, *allowed: Any) -> Any:
        """Take an argument of which only some values have a counterpart; the first where it is not given.

        Raises:
            DataError: it has another value.
        """
        value = self.pop(name, allowed[0])
        if value not in allowed:
            raise DataError(f"{name}={value} has no counterpart; expected {' or '.join(map(str, allowed))}")
        return value

    def finish(self) -> None:
        """Raise a DataError if something is left."""
        if self:
            raise DataError(f"there is no counterpart for {', '.join(self)}")


@dataclass(frozen=True)
class Kind:
    """One official module.

    Attributes:
        build: ours, from the official arguments, all of which it takes.
        rules: of the names.
        ignored: official tensors that may be left unused.
    """

    build: Callable[[Arguments], nn.Module]
    rules: Callable[[str, str], list[Rule]]
    ignored: tuple[str, ...] = ()


def results(case: Case) -> dict[str, Tensor]:
    """Outputs in both precisions, and gradients in float64, for all sizes of the case.

    Raises:
        DataError: the module, or a value of its arguments, has no counterpart.
    """
    kind_of(case.info["module"], case.info["args"])
    ours: dict[str, Tensor] = {}
    for key in case.io:
        size, _, name = key.partition(".")
        if name == "input":
            ours |= _of_size(case, size)
    return ours


def _of_size(case: Case, size: str) -> dict[str, Tensor]:
    info = case.info | case.info.get("builders_for_other_sizes", {}).get(size, {})
    of_2022 = " of 2022" if info["module"].endswith(":TransformerMLPWithConv") and OF_2022 in info["reference"] else ""
    kind = kind_of(info["module"] + of_2022, info["args"])
    module = build(kind, info["args"], training=info.get("mode", "eval") == "train")
    adapter = Adapter(kind.rules("", ""), kind.ignored)
    module.load_state_dict(adapter.to_ours(case.weights))
    found: dict[str, Tensor] = {}
    for dtype, ending in ((torch.float32, ".f32"), (torch.float64, "")):
        module.to(dtype).zero_grad()
        x = case.io[f"{size}.input"].to(dtype, copy=True).requires_grad_()
        with default_type(dtype):
            output = call(module, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        found[f"{size}.out{ending}"] = output.detach()
    (output * case.io[f"{size}.cotangent"].to(torch.float64)).sum().backward()
    given = {name: one.grad for name, one in module.named_parameters() if one.grad is not None}
    assert x.grad is not None
    gradients = {"input": x.grad} | adapter.to_official(given)
    return found | {f"{size}.grad.{name}": gradient for name, gradient in gradients.items()}


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of a type by default: cases of modules were computed so, those of whole backbones were not."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def kind_of(module: str, args: Mapping[str, Any]) -> Kind:
    """By the official file and class, ``models/qna.py:FusedKQnA``, and its arguments.

    Raises:
        DataError: there is no such class.
    """
    name = module.rpartition(":")[2]
    if name not in KINDS:
        raise DataError(f"{module} has no counterpart; {nearest(name, KINDS)}")
    return WITHOUT_OFFSETS if args.get("no_off") else KINDS[name]


def build(kind: Kind, args: Mapping[str, Any], training: bool = False) -> nn.Module:
    """Ours, in evaluation mode or training mode, the latter without dropout.

    Raises:
        DataError: an argument has no counterpart.
    """
    left = Arguments(args)
    for name in _DROPOUTS:
        rate = left.pop(name, 0.0)
        if training and rate:
            raise DataError(f"{name}={rate}: what is dropped at random in training cannot be compared")
    module = kind.build(left)
    left.finish()
    return module.train(training)


def call(module: nn.Module, x: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, h, w, C) by an attention or an FFN."""
    output: Tensor = module.on_map(x) if isinstance(module, MapAttention) else module(x)
    return output


# ---------------------------------------------------------------------------------------------------------- the modules


def _deformable(args: Arguments) -> nn.Module:
    num_heads = args.pop("n_heads")
    embed_dim = num_heads * args.pop("n_head_channels")
    of_2022 = "stage_idx" in args
    kernel_size = KERNELS_2022[args.pop("stage_idx")] if of_2022 else args.pop("ksize")
    args.pop("stage_i", None)  # for messages
    args.one_of("no_off", False)
    attention = DeformableAttention2022 if of_2022 else DeformableAttention
    return attention(
        embed_dim,
        num_heads,
        args.pop("n_groups"),
        args.pop("stride"),
        kernel_size,
        args.pop("offset_range_factor"),
        _position_bias(args, of_2022),
    )


def _pooled(args: Arguments) -> nn.Module:
    if "stage_idx" in args:
        raise DataError("no_off=True has no counterpart: the official code of 2022 does not run with it")
    num_heads = args.pop("n_heads")
    for name in _WITHOUT_EFFECT_IF_POOLED:
        args.pop(name, None)
    return PooledAttention(num_heads * args.pop("n_head_channels"), num_heads, args.pop("stride"))


def _position_bias(args: Arguments, of_2022: bool) -> Callable[..., PositionBias] | None:
    """The first that is wished for, in the order in which the official code looks."""
    queries, keys = args.pop("q_size"), args.pop("kv_size")
    used, by_conv, fixed = args.pop("use_pe"), args.pop("dwc_pe"), args.pop("fixed_pe")
    by_log = args.pop("log_cpb", False)
    if not used:
        return None
    if by_conv:
        return ConvPosition
    if fixed:
        if of_2022:
            raise DataError("fixed_pe=True has no counterpart: the official code of 2022 does not run with it")
        return partial(FixedBias, size=queries)
    if by_log:
        return LogBias
    return partial(TableBias, size=keys if of_2022 else queries)


def _window(args: Arguments) -> nn.Module:
    args.pop("fmap_size", None)  # ours makes its mask for any
    return WindowAttention(args.pop("dim"), args.pop("heads"), args.pop("window_size"), args.pop("shift_size", 0))


def _neighborhood(args: Arguments) -> nn.Module:
    dilation = args.pop("dilation", None) or 1
    return NeighborhoodAttention(args.pop("dim"), args.pop("num_heads"), args.pop("kernel_size"), dilation)


def _pyramid(args: Arguments) -> nn.Module:
    return PyramidAttention(args.pop("dim"), args.pop("num_heads", 8), args.pop("sr_ratio", 1))


def _slide(args: Arguments) -> nn.Module:
    args.one_of("qk_scale", None)
    args.one_of("padding_mode", "zeros")
    args.one_of("share_qkv", False)
    return SlideAttention(
        args.pop("dim"),
        args.pop("num_heads"),
        args.pop("ka"),
        args.pop("dim_reduction", 4),
        args.pop("qkv_bias", True),
        args.pop("rpb", True),
        args.pop("share_dwc_kernel", True),
    )


def _learned_queries(args: Arguments) -> nn.Module:
    kernel_size = args.pop("ksize")
    args.one_of("stride", 1)
    args.one_of("padding", kernel_size // 2)  # with another the official code does not run
    activation = args.pop("qna_activation")
    kinds = {"exp": LearnedQueryAttention, "sigmoid": SigmoidQueryAttention, "linear": LinearQueryAttention}
    if activation not in kinds:
        raise DataError(f"qna_activation={activation} has no counterpart; {nearest(activation, kinds)}")
    return kinds[activation](args.pop("n_channels"), args.pop("n_heads"), args.pop("n_q"), kernel_size)


def _feed_forward(args: Arguments, of: Callable[[int, int], nn.Module]) -> nn.Module:
    channels = args.pop("channels")
    return of(channels, channels * args.pop("expansion"))


WITHOUT_OFFSETS = Kind(_pooled, dat_blocks.pooled, dat_blocks.UNUSED_POOLED)
"""DAttentionBaseline with no_off."""

KINDS = {
    "DAttentionBaseline": Kind(_deformable, dat_blocks.deformable),
    "LocalAttention": Kind(_window, dat_blocks.window),
    "ShiftWindowAttention": Kind(_window, dat_blocks.window, dat_blocks.UNUSED),
    "NeighborhoodAttention2D": Kind(_neighborhood, dat_blocks.neighborhood),
    "PyramidAttention": Kind(_pyramid, dat_blocks.pyramid),
    "SlideAttention": Kind(_slide, dat_blocks.slide),
    "FusedKQnA": Kind(_learned_queries, dat_blocks.learned_queries),
    "TransformerMLP": Kind(
        partial(_feed_forward, of=partial(FeedForward, activation=nn.GELU)), dat_blocks.feed_forward
    ),
    "TransformerMLPWithConv": Kind(partial(_feed_forward, of=ConvFeedForward), dat_blocks.conv_feed_forward),
    MIX_FEED_FORWARD: Kind(partial(_feed_forward, of=MixFeedForward), dat_blocks.mix_feed_forward),
    "TransformerMLPWithConv_CMT": Kind(partial(_feed_forward, of=NormedConvFeedForward), dat_blocks.conv_feed_forward),
}
"""By the name of the official class."""
