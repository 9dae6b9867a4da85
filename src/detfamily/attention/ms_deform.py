"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1 and appendix A.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from detfamily.attention.dense import check_heads
from detfamily.attention.weights import token_at
from detfamily.ops import ms_deform_attn_projected
from detfamily.ops.reference import sampling
from detfamily.structures import Grid, Tokens


@dataclass(frozen=True)
class Sampling:
    """Where one token reads, and with what weight.

    Attributes:
        locations: (B, M, L, P, 2) x and y in (0, 1) over the padded levels.
        weights: (B, M, L, P); those of a head sum to one.
        levels: the levels that are read from.
    """

    locations: Tensor
    weights: Tensor
    levels: tuple[int, ...]


class MSDeformAttention(nn.Module):
    """Each token samples a few points around its reference on every level, and weighs them itself.

    Args:
        embed_dim: the width C of the tokens.
        num_heads: heads M; must divide embed_dim.
        num_levels: levels L of the maps read from.
        num_points: sampled points P per head and level.

    Raises:
        ValueError: num_heads does not divide embed_dim; the query has no reference points; the source is not made of
            num_levels feature maps.
    """

    needs_reference_points = True

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self._initialize()

    def _initialize(self) -> None:
        """Heads look in M directions evenly around a square, the p-th point p steps away, all weighed alike (A.2)."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        ring = (directions[:, None, None] * steps[:, None]).expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tokens, source: Tokens, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N, C); reference points are scaled to each level's padded size by its valid ratio."""
        grid = _require_grid(source)
        return self.sample(query.with_pos(), self._references(query, grid), source.content, grid)

    def _references(self, query: Tokens, grid: Grid) -> Tensor:
        if query.reference_points is None:
            raise ValueError("deformable attention needs reference points, and these queries have none")
        if len(grid.shapes) != self.num_levels:
            raise ValueError(f"got {len(grid.shapes)} feature levels, built for num_levels={self.num_levels}")
        ratios = grid.valid_ratios[:, None]
        if query.reference_points.shape[-1] == 4:
            ratios = torch.cat([ratios, ratios], -1)
        return query.reference_points[:, :, None] * ratios

    def sample(self, query: Tensor, reference_points: Tensor, source: Tensor, grid: Grid) -> Tensor:
        """The attention itself; reference_points (B, N, L, R) are normalised to each padded level."""
        value = self.value_proj(source)
        if grid.padding_mask is not None:
            value = value.masked_fill(grid.padding_mask[..., None], 0.0)
        output = ms_deform_attn_projected(
            value.unflatten(-1, (self.num_heads, -1)), grid.shapes, reference_points, *self._asked(query)
        )
        projected: Tensor = self.output_proj(output)
        return projected

    def _asked(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets (B, N, M, L, P, 2) and logits (B, N, M, L * P)."""
        batch, queries, _ = query.shape
        offsets = self.sampling_offsets(query)
        return (
            offsets.view(batch, queries, self.num_heads, self.num_levels, self.num_points, 2),
            self.attention_weights(query).view(batch, queries, self.num_heads, -1),
        )

    def sampling(self, query: Tokens, source: Tokens, index: int) -> Sampling:
        """What one token of ``query`` samples."""
        grid, one = _require_grid(source), token_at(query, index)
        locations, weights = sampling(grid.shapes, self._references(one, grid), *self._asked(one.with_pos()))
        return Sampling(locations[:, 0], weights[:, 0], tuple(range(self.num_levels)))


class OwnLevelDeformAttention(nn.Module):
    """Deformable attention without exchange between levels: a token samples the level that it lies on, only.

    For the rows "multi-scale inputs, no multi-scale attention" of table 2 in arXiv 2010.04159; the released code has no
    such form. One set of weights serves all levels. For encoders: object queries lie on no level.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.attention = MSDeformAttention(embed_dim, num_heads, num_levels=1, num_points=num_points)

    def forward(self, query: Tokens, source: Tokens, attention_mask: Tensor | None = None) -> Tensor:
        """(B, S, C)"""
        if query is not source:
            raise ValueError(
                "own-level deformable attention is for encoders, where a token lies on a level; object queries do not: "
                "use cross_attention=ms_deform"
            )
        grid = _require_grid(source)
        assert query.reference_points is not None
        sizes = [h * w for h, w in grid.shapes]
        whole = (query.with_pos(), query.reference_points, source.content)
        levels = zip(*(tensor.split(sizes, dim=1) for tensor in whole), strict=True)
        masks = grid.padding_mask.split(sizes, dim=1) if grid.padding_mask is not None else [None] * len(sizes)
        outputs = []
        for level, (tokens, references, content) in enumerate(levels):
            ratios = grid.valid_ratios[:, level : level + 1]
            own = Grid((grid.shapes[level],), masks[level], ratios)
            outputs.append(self.attention.sample(tokens, references[:, :, None] * ratios[:, None], content, own))
        return torch.cat(outputs, dim=1)

    def sampling(self, query: Tokens, source: Tokens, index: int) -> Sampling:
        """What one token samples, of its own level."""
        grid, level, before = _require_grid(source), 0, 0
        while index >= before + math.prod(grid.shapes[level]):
            before += math.prod(grid.shapes[level])
            level += 1
        own = Grid((grid.shapes[level],), None, grid.valid_ratios[:, level : level + 1])
        found = self.attention.sampling(query, replace(source, grid=own), index)
        return replace(found, levels=(level,))


def _require_grid(source: Tokens) -> Grid:
    if source.grid is None:
        raise ValueError("deformable attention reads from feature maps; object queries are none: use dense attention")
    return source.grid
