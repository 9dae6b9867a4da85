"""The decoder: object queries look at each other and at the memory, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from detfamily.blocks.heads import Heads
from detfamily.blocks.layers import Residual
from detfamily.structures import Queries, Tokens


class DecoderLayer(nn.Module):
    """Self-attention among the queries, cross-attention to the memory, then the FFN.

    Args:
        self_attention: factory of the attention among queries.
        cross_attention: factory of the attention from queries to memory.
        ffn: factory of the feed-forward network; None leaves it out, with its residual.
        residual: factory of the residual connection around each of them.
    """

    def __init__(
        self,
        self_attention: Callable[[], nn.Module],
        cross_attention: Callable[[], nn.Module],
        ffn: Callable[[], nn.Module] | None,
        residual: Residual,
    ) -> None:
        super().__init__()
        self.self_attention = self_attention()
        self.self_attention_residual = residual()
        self.cross_attention = cross_attention()
        self.cross_attention_residual = residual()
        self.ffn = ffn() if ffn is not None else None
        self.ffn_residual = residual() if ffn is not None else None

    def forward(self, queries: Queries, memory: Tokens) -> Tensor:
        """(B, N, C), the new content."""

        def attend_queries(x: Tensor) -> Tensor:
            now = replace(queries, content=x)
            output: Tensor = self.self_attention(now, now, queries.attention_mask)
            return output

        def attend_memory(x: Tensor) -> Tensor:
            output: Tensor = self.cross_attention(replace(queries, content=x), memory)
            return output

        x: Tensor = self.self_attention_residual(queries.content, attend_queries)
        x = self.cross_attention_residual(x, attend_memory)
        if self.ffn is not None and self.ffn_residual is not None:
            x = self.ffn_residual(x, self.ffn)
        return x


class Decoder(nn.Module):
    """The one decoder loop of all families.

    Args:
        layer: factory of one layer.
        num_layers: how many, at least one.
        query_position: gives the position vector of the queries for each layer.
        norm: what each layer's output goes through on its way to the heads; the next layer gets it without.
        refine: whether each layer's boxes are the next layer's references (Deformable DETR, A.4).

    Raises:
        ValueError: num_layers is less than 1.
    """

    def __init__(
        self,
        layer: Callable[[], nn.Module],
        num_layers: int,
        query_position: nn.Module,
        norm: nn.Module,
        refine: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"decoder.num_layers={num_layers}: a decoder needs at least one layer")
        self.layers = nn.ModuleList(layer() for _ in range(num_layers))
        self.query_position = query_position
        self.norm = norm
        self.refine = refine

    def forward(self, queries: Queries, memory: Tokens, heads: Heads) -> tuple[list[Tensor], list[Tensor | None]]:
        """Run all layers.

        Returns:
            For each layer its output for the heads (B, N, C), and the reference points (B, N, R) or None that its
            boxes are relative to.
        """
        hidden: list[Tensor] = []
        references: list[Tensor | None] = []
        for index, layer in enumerate(self.layers):
            pos = self.query_position(index, queries, memory)
            content = layer(replace(queries, pos=pos), memory)
            hidden.append(self.norm(content))
            references.append(queries.reference_points)
            queries = replace(queries, content=content)
            if self.refine and index + 1 < len(self.layers):
                # from the content before the norm, and cut off from the gradient: each layer answers for its own step
                refined = heads.refine(index, content.detach(), queries.reference_points)
                queries = replace(queries, reference_points=refined)
        return hidden, references
