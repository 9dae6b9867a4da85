"""Names in what DAT's blocks are made of: LeapLabTHU/DAT (of 2023 and 2022) and LeapLabTHU/DAT-Detection.

Each function gives the rules for one module, ours and theirs behind prefixes, which may have places of templates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detfamily.checkpoints.adapter import CONVOLUTION, Form, Join, Rename, Rule
from detfamily.checkpoints.swin import relative_position_index

UNUSED = (r"(^|\.)attn_mask$",)
"""Masks for windows of one size of map, which ours do not need."""

UNUSED_POOLED = (r"(^|\.)conv_offset\.",)
"""The frozen network of offsets that attention without offsets has, and does not ask."""

_NEIGHBOURS = Form(lambda table: table[0, :, 0, :, 0, 0], lambda table: table[None, :, None, :, None, None])
_BY_QUERY = Form(lambda table: table.flatten(0, -2).t(), lambda table: table.t())
_BY_QUERY_AS_KERNEL = Form(lambda table: table.flatten(0, -2).t(), lambda table: table.t()[None, None])


def pooled(ours: str, official: str) -> list[Rule]:
    """DAttentionBaseline without offsets; ``UNUSED_POOLED`` may be left over."""
    return [
        *_pointwise(ours + "q", official + "proj_q"),
        *_pointwise(ours + "k", official + "proj_k"),
        *_pointwise(ours + "v", official + "proj_v"),
        *_pointwise(ours + "proj", official + "proj_out"),
    ]


def deformable(ours: str, official: str) -> list[Rule]:
    """DAttentionBaseline with offsets, whatever its position bias."""
    return [
        *pooled(ours, official),
        Rename(ours + "offsets.conv.{rest}", (official + "conv_offset.0.{rest}",)),
        Rename(ours + "offsets.norm.{rest}", (official + "conv_offset.1.norm.{rest}",)),
        *_pointwise(ours + "offsets.out", official + "conv_offset.3"),
        Rename(ours + "position_bias.table", (official + "rpe_table",)),
        Rename(ours + "position_bias.hidden.{rest}", (official + "rpe_table.0.{rest}",)),
        Rename(ours + "position_bias.out.{rest}", (official + "rpe_table.2.{rest}",)),
        Rename(ours + "position_bias.conv.{rest}", (official + "rpe_table.{rest}",)),
    ]


def window(ours: str, official: str) -> list[Rule]:
    """LocalAttention and ShiftWindowAttention; ``UNUSED`` may be left over."""
    return [
        Rename(ours + "qkv.{rest}", (official + "proj_qkv.{rest}",)),
        Rename(ours + "proj.{rest}", (official + "proj_out.{rest}",)),
        Rename(
            ours + "position_bias",
            (official + "relative_position_bias_table",),
            computed=((official + "relative_position_index", relative_position_index),),
        ),
    ]


def neighborhood(ours: str, official: str) -> list[Rule]:
    """NeighborhoodAttention2D."""
    return [
        Rename(ours + "qkv.{rest}", (official + "qkv.{rest}",)),
        Rename(ours + "proj.{rest}", (official + "proj.{rest}",)),
        Rename(ours + "position_bias", (official + "rpb",)),
    ]


def pyramid(ours: str, official: str) -> list[Rule]:
    """PyramidAttention."""
    return [
        *_pointwise(ours + "q", official + "q"),
        Join((ours + "k.weight", ours + "v.weight"), official + "kv.weight", dim=0, form=CONVOLUTION),
        Join((ours + "k.bias", ours + "v.bias"), official + "kv.bias", dim=0),
        Rename(ours + "reduce.{rest}", (official + "proj_ds.0.{rest}",)),
        Rename(ours + "reduced_norm.{rest}", (official + "proj_ds.1.norm.{rest}",)),
        *_pointwise(ours + "proj", official + "proj"),
    ]


def slide(ours: str, official: str) -> list[Rule]:
    """SlideAttention."""
    return [
        Rename(ours + "qkv.{rest}", (official + "qkv.{rest}",)),
        Rename(ours + "proj.{rest}", (official + "proj.{rest}",)),
        Rename(ours + "shift_bias", (official + "dep_conv.bias",)),
        Rename(
            ours + "gather.weight",
            (official + "dep_conv1.weight",),
            computed=((official + "dep_conv.weight", _shifting),),
        ),
        Rename(ours + "gather.{rest}", (official + "dep_conv1.{rest}",)),
        Rename(ours + "gather_values.{rest}", (official + "dep_conv2.{rest}",)),
        Rename(ours + "position_bias", (official + "relative_position_bias_table",), form=_NEIGHBOURS),
    ]


def learned_queries(ours: str, official: str) -> list[Rule]:
    """FusedKQnA."""
    return [
        Rename(ours + "queries", (official + "q_param",)),
        Rename(ours + "k.{rest}", (official + "proj_k.{rest}",)),
        Rename(ours + "v.{rest}", (official + "proj_v.{rest}",)),
        *_pointwise(ours + "proj", official + "proj_out"),
        Rename(ours + "scale", (official + "attn_scale",), form=_BY_QUERY_AS_KERNEL),
        Rename(ours + "position_bias", (official + "rpb_table",), form=_BY_QUERY),
    ]


def feed_forward(ours: str, official: str) -> list[Rule]:
    """TransformerMLP."""
    return [
        Rename(ours + "linear1.{rest}", (official + "chunk.linear1.{rest}",)),
        Rename(ours + "linear2.{rest}", (official + "chunk.linear2.{rest}",)),
    ]


def conv_feed_forward(ours: str, official: str) -> list[Rule]:
    """TransformerMLPWithConv, and TransformerMLPWithConv_CMT with its norms."""
    return [
        *_pointwise(ours + "linear1", official + "linear1.0"),
        *_pointwise(ours + "linear2", official + "linear2.0"),
        Rename(ours + "depthwise.{rest}", (official + "dwc.{rest}",)),
        Rename(ours + "norm1.{rest}", (official + "linear1.2.{rest}",)),
        Rename(ours + "norm2.{rest}", (official + "bn.{rest}",)),
        Rename(ours + "norm3.{rest}", (official + "linear2.1.{rest}",)),
    ]


def mix_feed_forward(ours: str, official: str) -> list[Rule]:
    """TransformerMLPWithConv of 2022."""
    return [
        *_pointwise(ours + "linear1", official + "linear1"),
        *_pointwise(ours + "linear2", official + "linear2"),
        Rename(ours + "depthwise.{rest}", (official + "dwc.{rest}",)),
    ]


def _pointwise(ours: str, official: str) -> list[Rule]:
    """A linear layer that is a 1 x 1 convolution there."""
    return [
        Rename(ours + ".weight", (official + ".weight",), form=CONVOLUTION),
        Rename(ours + ".bias", (official + ".bias",)),
    ]


def _shifting(gather: Tensor) -> Tensor:
    """The fixed kernels beside learned ones (channels * k * k, 1, k, k): each picks one of its k * k neighbours."""
    channels, _, kernel_size, _ = gather.shape
    shifts = torch.eye(kernel_size**2, dtype=gather.dtype, device=gather.device)
    return shifts.view(-1, 1, kernel_size, kernel_size).repeat(channels // kernel_size**2, 1, 1, 1)
