"""Names of DAT and DAT++: those of LeapLabTHU/DAT, of 2022 and of 2023, and of LeapLabTHU/DAT-Detection.

They stand by themselves in files of classifiers, under "model", and behind "backbone." in those of detectors, under
"state_dict".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from detfamily.attention.deformable import DeformableAttention, PooledAttention
from detfamily.attention.neighborhood import NeighborhoodAttention
from detfamily.attention.pyramid import PyramidAttention
from detfamily.attention.slide import SlideAttention
from detfamily.attention.window import WindowAttention, windows_of
from detfamily.backbones.dat import DAT, ConvBlock, ConvStem
from detfamily.backbones.dat_blocks import ConvFeedForward, MixFeedForward, NormedConvFeedForward
from detfamily.backbones.stages import PATCH, Block, Stage
from detfamily.blocks.layers import FeedForward
from detfamily.checkpoints import dat_blocks
from detfamily.checkpoints.adapter import CONVOLUTION, Adapter, Rename, Rule
from detfamily.errors import CheckpointError

PREFIX = "backbone."
"""Where detectors of mmdetection have it."""

CLASSIFIER = (r"^cls_norm\.", r"^cls_head\.")
"""What classifiers have besides a backbone."""

_ATTENTIONS: tuple[tuple[type[nn.Module], Callable[[str, str], list[Rule]]], ...] = (
    (DeformableAttention, dat_blocks.deformable),
    (PooledAttention, dat_blocks.pooled),
    (WindowAttention, dat_blocks.window),
    (NeighborhoodAttention, dat_blocks.neighborhood),
    (PyramidAttention, dat_blocks.pyramid),
    (SlideAttention, dat_blocks.slide),
)
_FEED_FORWARDS: tuple[tuple[type[nn.Module], Callable[[str, str], list[Rule]]], ...] = (
    (FeedForward, dat_blocks.feed_forward),
    (ConvFeedForward, dat_blocks.conv_feed_forward),
    (NormedConvFeedForward, dat_blocks.conv_feed_forward),
    (MixFeedForward, dat_blocks.mix_feed_forward),
)


def dat_adapter(
    dat: DAT, ours: str = "", official: str = "", image_size: int = 224, detection: bool = False
) -> Adapter:
    """A DAT of ours against the official one of the same settings, each behind a prefix.

    Args:
        dat: whose blocks tell the rules; official names depend on the kinds of its attentions.
        ours: prefix of our names.
        official: prefix of theirs.
        image_size: side of the images that the official model is for, in pixels; it keeps masks of shifted windows.
        detection: layer scales have the names of the code for detection.

    Raises:
        CheckpointError: a block has no official counterpart.
    """
    rules: list[Rule] = list(_stem(dat, ours, official))
    for index, stage in enumerate(cast("Stage", one) for one in dat.stages):
        here, there = f"{ours}stages.{index}.", f"{official}stages.{index}."
        side = image_size // PATCH // 2**index
        for number, block in enumerate(stage.blocks):
            rules += _block(block, f"{here}blocks.{number}.", there, number, side, "gamma" if detection else "weight")
        if stage.norm is not None:
            rules.append(Rename(here + "norm.{rest}", (f"{official}norms.{index}.norm.{{rest}}",)))
        if stage.merge is not None:
            rules.append(Rename(here + "merge.conv.{rest}", (f"{official}down_projs.{index}.0.{{rest}}",)))
            rules.append(Rename(here + "merge.norm.{rest}", (f"{official}down_projs.{index}.1.norm.{{rest}}",)))
    return Adapter(rules, _unused(dat, official))


def tables(dat: DAT) -> list[str]:
    """Our names of the position biases that depend on the size of images or windows."""
    found = []
    for name, module in dat.named_modules():
        if isinstance(module, WindowAttention):
            found.append(f"{name}.position_bias")
        elif isinstance(module, DeformableAttention):
            found.append(f"{name}.position_bias.table")
    return found


def _stem(dat: DAT, ours: str, official: str) -> Iterator[Rule]:
    parts = {"conv": "0", "norm": "1.norm"}
    if isinstance(dat.patches, ConvStem):
        parts = {"conv1": "0", "norm1": "1.norm", "conv2": "3", "norm2": "4.norm"}
    for part, theirs in parts.items():
        yield Rename(f"{ours}patches.{part}.{{rest}}", (f"{official}patch_proj.{theirs}.{{rest}}",))
    projection = f"{official}stages.0.proj."
    yield Rename(f"{ours}patches.proj.weight", (projection + "weight",), form=CONVOLUTION)
    yield Rename(f"{ours}patches.proj.bias", (projection + "bias",))


def _block(block: nn.Module, ours: str, stage: str, number: int, side: int, scale: str) -> Iterator[Rule]:
    """One block, which officially has parts in several lists of its stage."""
    yield Rename(ours + "local.depthwise.{rest}", (f"{stage}local_perception_units.{number}.{{rest}}",))
    yield from _module(_FEED_FORWARDS, cast("nn.Module", block.ffn), ours + "ffn.", f"{stage}mlps.{number}.")
    if isinstance(block, ConvBlock):
        yield Rename(ours + "conv.{rest}", (f"{stage}attns.{number}.{{rest}}",))
        yield Rename(ours + "ffn_norm.{rest}", (f"{stage}ln_cnvnxt.{number}.norm.{{rest}}",))
        return
    attention = cast("Block", block).attention
    for branch, position in (("attention", 2 * number), ("ffn", 2 * number + 1)):
        yield Rename(f"{ours}{branch}_norm.{{rest}}", (f"{stage}layer_norms.{position}.norm.{{rest}}",))
        yield Rename(f"{ours}{branch}_scale.scale", (f"{stage}layer_scales.{position}.{scale}",))
    theirs = f"{stage}attns.{number}."
    for rule in _module(_ATTENTIONS, attention, ours + "attention.", theirs):
        if isinstance(attention, WindowAttention) and attention.shift and isinstance(rule, Rename) and rule.computed:
            mask = (theirs + "attn_mask", partial(_mask, attention.window_size, attention.shift, side))
            rule = replace(rule, computed=(*rule.computed, mask))
        yield rule


def _module(
    known: tuple[tuple[type[nn.Module], Callable[[str, str], list[Rule]]], ...],
    module: nn.Module,
    ours: str,
    official: str,
) -> list[Rule]:
    for kind, rules in known:
        if isinstance(module, kind):
            return rules(ours, official)
    raise CheckpointError(f"no official DAT has a {type(module).__name__} in its blocks, as {ours}* here")


def _unused(dat: DAT, official: str) -> list[str]:
    """What official files may have besides: what lies behind the last stage, and what nobody uses."""
    prefix = re.escape(official)
    later = "|".join(str(index) for index in range(len(dat.stages), 10))
    unused = [name.replace("^", f"^{prefix}") for name in CLASSIFIER]
    unused += [rf"^{prefix}stages\.({later})\.", rf"^{prefix}down_projs\.", rf"^{prefix}norms\."]
    unused += [*dat_blocks.UNUSED]
    for index, stage in enumerate(cast("Stage", one) for one in dat.stages):
        for number, block in enumerate(stage.blocks):
            there = rf"^{prefix}stages\.{index}\."
            if isinstance(block, ConvBlock):
                unused.append(rf"{there}layer_scales\.({2 * number}|{2 * number + 1})\.")
            elif isinstance(cast("Block", block).attention, PooledAttention):
                unused.append(rf"{there}attns\.{number}\.conv_offset\.")
    return unused


def _mask(window_size: int, shift: int, side: int, table: Tensor) -> Tensor:
    """(windows, n, n) what shifted windows of n tokens add to their logits, on maps of side x side tokens."""
    windows = windows_of((side, side), window_size, shift, table.device)
    assert windows.apart is not None
    return windows.apart.index_select(0, windows.kinds)[:, 0].to(torch.float32)
