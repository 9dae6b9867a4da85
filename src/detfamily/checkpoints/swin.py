"""Names of Swin Transformers: those of microsoft/Swin-Transformer, which all detectors have taken over.

They stand by themselves in files of ImageNet weights, and behind a prefix in those of detectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from detfamily.attention.window import relative_positions
from detfamily.checkpoints.adapter import Rename
from detfamily.checkpoints.evidence import Evidence
from detfamily.errors import CheckpointError

PREFIXES = ("backbone.0.", "backbone.0.body.")
"""Where detectors have it: DINO, H-Deformable-DETR."""

CLASSIFIER = (r"^head\.", r"^norm\.", r"\.attn_mask$")
"""What files of ImageNet weights have besides a backbone: the classifier, and masks for one size of image."""


@dataclass(frozen=True)
class Size:
    """One of the published networks, by what its tensors tell, and its names in settings of detectors."""

    embed_dim: int
    depths: tuple[int, ...]
    window_size: int
    names: tuple[str, ...]

    @property
    def fields(self) -> dict[str, Any]:
        """The settings of our config that tell it from others."""
        heads = self.embed_dim // 32
        return {
            "backbone.embed_dim": self.embed_dim,
            "backbone.depths": list(self.depths),
            "backbone.num_heads": [heads * 2**index for index in range(len(self.depths))],
            "backbone.window_size": self.window_size,
            "backbone.mlp_ratio": 4.0,
            "backbone.qkv_bias": True,
            "backbone.patch_norm": True,
        }


SIZES = {
    "swin_t": Size(96, (2, 2, 6, 2), 7, ("swin_T_224_1k", "swin_tiny")),
    "swin_s": Size(96, (2, 2, 18, 2), 7, ("swin_small",)),
    "swin_b": Size(128, (2, 2, 18, 2), 7, ("swin_B_224_22k",)),
    "swin_b_384_22k": Size(128, (2, 2, 18, 2), 12, ("swin_B_384_22k",)),
    "swin_l": Size(192, (2, 2, 18, 2), 7, ("swin_L_224_22k", "swin_large")),
    "swin_l_384_22k": Size(192, (2, 2, 18, 2), 12, ("swin_L_384_22k", "swin_large_window12")),
}
"""By the names of our configs."""


def rules(ours: str = "backbone.", official: str = PREFIXES[0]) -> list[Rename]:
    """A Swin of ours against one of theirs, each behind a prefix."""
    stage, layer = ours + "stages.{n}.", official + "layers.{n}."
    block, theirs = stage + "blocks.{m}.", layer + "blocks.{m}."
    return [
        Rename(ours + "patches.{rest}", (official + "patch_embed.{rest}",)),
        Rename(stage + "norm.{rest}", (official + "norm{n}.{rest}",)),
        Rename(stage + "merge.{rest}", (layer + "downsample.{rest}",)),
        Rename(block + "attention_norm.{rest}", (theirs + "norm1.{rest}",)),
        Rename(block + "ffn_norm.{rest}", (theirs + "norm2.{rest}",)),
        Rename(block + "ffn.linear1.{rest}", (theirs + "mlp.fc1.{rest}",)),
        Rename(block + "ffn.linear2.{rest}", (theirs + "mlp.fc2.{rest}",)),
        Rename(
            block + "attention.position_bias",
            (theirs + "attn.relative_position_bias_table",),
            computed=((theirs + "attn.relative_position_index", relative_position_index),),
        ),
        Rename(block + "attention.{rest}", (theirs + "attn.{rest}",)),
    ]


def window_of(rows: int) -> int:
    """The side of the windows that a table of biases with this many rows belongs to.

    Raises:
        ValueError: none has so many.
    """
    side = isqrt(rows)
    if side**2 != rows or side % 2 == 0:
        raise ValueError(f"a table of biases has (2 w - 1)^2 rows for windows of w x w tokens, and this one has {rows}")
    return (side + 1) // 2


def recognise(evidence: Evidence, prefix: str) -> tuple[str, dict[str, Any]]:
    """The config of the official Swin behind a prefix, and the settings that it does not have anyway.

    Raises:
        CheckpointError: a tensor is missing or of an impossible shape.
    """
    found = _fields(evidence, prefix)
    name = min(SIZES, key=lambda one: _unlike(SIZES[one], found))  # the first of those that are alike
    size = SIZES[name]
    if not _unlike(size, found) and evidence.args.get("backbone") not in size.names:
        evidence.doubt("backbone", size.names[0])
    return name, {key: value for key, value in found.items() if value != size.fields[key]}


def is_dilated(evidence: Evidence, prefix: str) -> bool:
    """Whether patches are not merged before the last stage."""
    return not evidence.has(f"{prefix}layers.{evidence.count(f'{prefix}layers.') - 2}.downsample.")


def name_for(backbone: Mapping[str, Any], of_dino: bool) -> str:
    """What DINO, or else H-Deformable-DETR, calls the Swin of a resolved config.

    Raises:
        CheckpointError: it has no such network.
    """
    for size in SIZES.values():
        if all(backbone[key.removeprefix("backbone.")] == value for key, value in size.fields.items()):
            for name in size.names:
                if name.endswith("k") == of_dino:
                    return name
    raise CheckpointError(
        f"its code has no Swin of embed_dim {backbone['embed_dim']}, depths {list(backbone['depths'])} and windows of "
        f"{backbone['window_size']}"
    )


def _fields(evidence: Evidence, prefix: str) -> dict[str, Any]:
    """What the tensors tell."""
    first, table = f"{prefix}layers.0.", "blocks.0.attn.relative_position_bias_table"
    width = evidence.shape(f"{prefix}patch_embed.proj.weight", 4)[0]
    try:
        window_size = window_of(evidence.shape(first + table, 2)[0])
    except ValueError as error:
        raise CheckpointError(f"{evidence.source}: {first}{table}: {error}") from None
    count = min(evidence.count(f"{prefix}layers."), len(evidence.state))  # names can have any number
    layers = [f"{prefix}layers.{index}." for index in range(count)]
    return {
        "backbone.embed_dim": width,
        "backbone.depths": [_depth(evidence, layer) for layer in layers],
        "backbone.num_heads": [evidence.shape(layer + table, 2)[1] for layer in layers],
        "backbone.window_size": window_size,
        "backbone.mlp_ratio": evidence.shape(f"{first}blocks.0.mlp.fc1.weight", 2)[0] / width,
        "backbone.qkv_bias": f"{first}blocks.0.attn.qkv.bias" in evidence.state,
        "backbone.patch_norm": evidence.has(f"{prefix}patch_embed.norm."),
    }


def _depth(evidence: Evidence, layer: str) -> int:
    count = evidence.count(f"{layer}blocks.")
    for index in range(count):  # the first that is missing ends it, whatever number a name has
        evidence.shape(f"{layer}blocks.{index}.norm1.weight", 1)
    return count


def _unlike(size: Size, found: Mapping[str, Any]) -> int:
    """How many settings differ."""
    return sum(found[key] != value for key, value in size.fields.items())


def relative_position_index(table: Tensor) -> Tensor:
    """(n, n) the buffer that official windows of n tokens have besides their table of biases."""
    return relative_positions(window_of(table.shape[0]), table.device)
