"""The decoder: object queries look at each other and at the memory, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from detfamily.blocks.heads import Heads
from detfamily.blocks.layers import Residual
from detfamily.blocks.query_position import QueryPosition
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
        query_position: factory of what gives the queries their positions for each layer; called with ``cross_sine``,
            whether the cross-attention reads a sine code of theirs.
        norm: what each layer's output goes through on its way to the heads; the next layer gets it without.
        refine: whether each layer's boxes are the next layer's references (Deformable DETR, A.4).
        look_forward: with refine, whether the next layer's boxes are relative to references that keep their gradient,
            so that a layer answers for the one after it, too (DAB-DETR; "look forward twice" in DINO, 3.5).
        first_cross_attention: factory of the first layer's cross-attention, where it is another one.

    Raises:
        ValueError: num_layers is less than 1.
    """

    def __init__(
        self,
        layer: Callable[..., nn.Module],
        num_layers: int,
        query_position: Callable[..., QueryPosition],
        norm: nn.Module,
        refine: bool = False,
        look_forward: bool = False,
        first_cross_attention: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"decoder.num_layers={num_layers}: a decoder needs at least one layer")
        if look_forward and not refine:
            raise ValueError("decoder.look_forward=true is about references that are refined: use decoder=refine")
        special = {} if first_cross_attention is None else {"cross_attention": first_cross_attention}
        self.layers = nn.ModuleList(layer(**(special if index == 0 else {})) for index in range(num_layers))
        self.query_position = query_position(cross_sine=self.reads_sine)
        self.norm = norm
        self.refine = refine
        self.look_forward = look_forward

    @property
    def reads_sine(self) -> bool:
        """Whether any cross-attention compares a sine code of the queries' places."""
        return any(getattr(module, "reads_sine", False) for module in self.layers.modules())

    def forward(self, queries: Queries, memory: Tokens, heads: Heads) -> tuple[list[Tensor], list[Tensor | None]]:
        """Run all layers.

        Returns:
            For each layer its output for the heads (B, N, C), and the reference points (B, N, R) or None that its
            boxes are relative to.
        """
        hidden: list[Tensor] = []
        references = [queries.reference_points]
        for index, layer in enumerate(self.layers):
            content = layer(self.query_position(index, queries, memory), memory)
            hidden.append(self.norm(content))
            queries = replace(queries, content=content)
            if self.refine and index + 1 < len(self.layers):
                refined = self._refined(index, queries, heads)
                references.append(refined)
                queries = replace(queries, reference_points=refined.detach())
        return hidden, references if self.refine else references * len(hidden)

    def _refined(self, index: int, queries: Queries, heads: Heads) -> Tensor:
        """The references of the next layer, from the content before the norm.

        Cut off from the gradient, each layer answers for its own step; looking forward, it does not.
        """
        with torch.set_grad_enabled(self.look_forward and torch.is_grad_enabled()):
            refined = heads.refine(index, queries.content, queries.reference_points)
        return refined[..., : self.query_position.reference_dim]
