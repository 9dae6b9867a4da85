"""What attentions have in common whose tokens need to know their neighbours: they work on the map of one level."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detfamily.attention.weights import weights_of
from detfamily.structures import Grid, Size, Tokens


class MapAttention(nn.Module):
    """Attention on a map, (B, h, w, C) -> (B, h, w, C), which an encoder gives the tokens of one or several maps.

    Subclasses define ``on_map``. With several levels each is a map of its own, all share the weights, and nothing is
    exchanged between them.
    """

    num_heads: int
    qkv: nn.Linear
    proj: nn.Linear

    def forward(self, query: Tokens, source: Tokens, attention_mask: Tensor | None = None) -> Tensor:
        """(B, S, C) for the tokens of an encoder.

        Raises:
            ValueError: the tokens lie on no map, or one reads from another's; there is an attention mask.
        """
        grid = source.grid
        if query is not source or grid is None or attention_mask is not None:
            raise ValueError(
                f"{type(self).__name__} is for encoders, whose tokens lie on a map; object queries do not: use dense "
                "attention among them, and dense or deformable attention from them to the maps"
            )
        sizes = [h * w for h, w in grid.shapes]
        contents = source.content.split(sizes, dim=1)
        codes = [None] * len(sizes) if source.pos is None else source.pos.split(sizes, dim=1)
        masks = [None] * len(sizes) if grid.padding_mask is None else grid.padding_mask.split(sizes, dim=1)
        outputs = [
            self.on_map(
                content.unflatten(1, shape),
                None if pos is None else pos.unflatten(1, shape),
                None if mask is None else mask.unflatten(1, shape),
            ).flatten(1, 2)
            for content, pos, mask, shape in zip(contents, codes, masks, grid.shapes, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def on_map(self, x: Tensor, pos: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)

        Args:
            x: tokens of one map.
            pos: (B, h, w, C) added to x where queries and keys are compared, never to values; None adds nothing.
            padding_mask: (B, h, w) bool, True at tokens that nobody may look at: what they hold, as long as it is
                finite, changes nothing for the others. None hides nothing.
        """
        raise NotImplementedError

    def weights_on_map(
        self, x: Tensor, place: Size, pos: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        """(B, M, h, w): how the heads weigh the tokens of a map for the one at ``place``; in evaluation mode.

        For attentions whose projections are ``qkv`` and ``proj``, the heads side by side.

        Args:
            x: (B, h, w, C), as for ``on_map``.
            place: row and column.
            pos: as for ``on_map``.
            padding_mask: as for ``on_map``.
        """
        bare = deepcopy(self)
        width = x.shape[-1]
        with torch.no_grad():  # values and outputs are then the tokens themselves, channel by channel
            for weight, bias in ((bare.qkv.weight[2 * width :], bare.qkv.bias), (bare.proj.weight, bare.proj.bias)):
                weight.copy_(torch.eye(width))
                if bias is not None:
                    bias[-width:].zero_()
        compared = x if pos is None else x + pos

        def at_place(values: Tensor) -> Tensor:
            row, column = place
            return first_channels(bare.on_map(values, compared, padding_mask)[:, row, column])

        def first_channels(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1))[..., 0]

        return first_channels(weights_of(at_place, torch.zeros_like(x))).permute(0, 3, 1, 2)


def project_qkv(qkv: nn.Linear, x: Tensor, pos: Tensor | None) -> Tensor:
    """(..., 3C) queries, keys and values side by side, of which positions reach the first two."""
    if pos is None:
        projected: Tensor = qkv(x)
        return projected
    width = 2 * x.shape[-1]
    bias = qkv.bias
    compared = F.linear(x + pos, qkv.weight[:width], None if bias is None else bias[:width])
    return torch.cat([compared, F.linear(x, qkv.weight[width:], None if bias is None else bias[width:])], -1)


def without_padding(padding_mask: Tensor | None, x: Tensor) -> Tensor:
    """(B, h, w, C) with zeros at padding, so that what is there reaches nobody through convolutions and samples."""
    return x if padding_mask is None else x.masked_fill(padding_mask[..., None], 0)


def hiding(hidden: Tensor, added: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the logits, so little where keys are hidden that they get no weight beside others.

    Args:
        hidden: bool, True at hidden keys; of a shape that goes with that of the logits.
        added: what is added without them; None for nothing.
        dtype: of the logits.
    """
    added = torch.zeros((), dtype=dtype, device=hidden.device) if added is None else added.to(dtype)
    # finite, so that a query with nothing but hidden keys gives numbers; half, so that logits do not make it infinite
    return added.masked_fill(hidden, torch.finfo(dtype).min / 2)


def conv_on_map(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map: (B, h, w, C) -> (B, h', w', C')."""
    output: Tensor = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return output


def on_map(attention: nn.Module, x: Tensor) -> Tensor:
    """What any attention of an encoder makes of a map without positions and padding, as in the stages of a backbone.

    Args:
        attention: called as ``attention(query, source)``.
        x: (B, h, w, C).

    Returns:
        (B, h, w, C).
    """
    if isinstance(attention, MapAttention):
        return attention.on_map(x)
    batch, h, w, _ = x.shape
    y, x_ = ((torch.arange(n, dtype=torch.float32, device=x.device) + 0.5) / n for n in (h, w))
    centers = torch.stack([x_.expand(h, w), y[:, None].expand(h, w)], -1).view(1, h * w, 2)
    grid = Grid(((h, w),), None, torch.ones(batch, 1, 2, device=x.device))
    tokens = Tokens(x.flatten(1, 2), reference_points=centers.expand(batch, -1, -1), grid=grid)
    output: Tensor = attention(tokens, tokens)
    return output.view(x.shape)
