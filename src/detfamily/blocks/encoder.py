"""The encoder: the tokens of the feature maps look at each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from detfamily.blocks.layers import Residual
from detfamily.structures import Tokens


class EncoderLayer(nn.Module):
    """Self-attention, then the FFN.

    Args:
        attention: factory of the attention.
        ffn: factory of the feed-forward network; None leaves it out, with its residual (DETR, 4.2, "FFN").
        residual: factory of the residual connection around each of them.
    """

    def __init__(
        self, attention: Callable[[], nn.Module], ffn: Callable[[], nn.Module] | None, residual: Residual
    ) -> None:
        super().__init__()
        self.attention = attention()
        self.attention_residual = residual()
        self.ffn = ffn() if ffn is not None else None
        self.ffn_residual = residual() if ffn is not None else None

    def forward(self, tokens: Tokens) -> Tensor:
        """(B, S, C), the new content."""

        def attend(x: Tensor) -> Tensor:
            now = replace(tokens, content=x)
            output: Tensor = self.attention(now, now)
            return output

        x: Tensor = self.attention_residual(tokens.content, attend)
        if self.ffn is not None and self.ffn_residual is not None:
            x = self.ffn_residual(x, self.ffn)
        return x


class Encoder(nn.Module):
    """A stack of layers; none at all is allowed (DETR, table 2).

    Args:
        layer: factory of one layer, called with ``attention``.
        attention: factory of the layers' attention; or several, one for each layer in turn, from the start again where
            there are more layers.
        num_layers: how many.
        norm: what the last layer's output goes through; a LayerNorm where layers are pre-norm.
        pos_scale: (B, S, C) -> (B, S, C), from a layer's input what its positions are multiplied by (DAB-DETR's
            official code); None leaves them as they are.

    Raises:
        ValueError: the layers are no multiple of the attentions.
    """

    def __init__(
        self,
        layer: Callable[..., nn.Module],
        attention: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]],
        num_layers: int,
        norm: nn.Module,
        pos_scale: nn.Module | None = None,
    ) -> None:
        super().__init__()
        attentions = [attention] if callable(attention) else list(attention)
        if not attentions or num_layers % len(attentions):
            raise ValueError(
                f"encoder_attention lists {len(attentions)} attentions for encoder.num_layers={num_layers}: expected "
                "one for each layer, or as many as divide their number, to be repeated"
            )
        repeats = num_layers // len(attentions)
        self.layers = nn.ModuleList(layer(attention=one) for one in attentions * repeats)
        self.norm = norm
        self.pos_scale = pos_scale

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens -> Tokens with new content; positions and geometry stay."""
        pos = tokens.pos
        for layer in self.layers:
            if self.pos_scale is not None and pos is not None:
                tokens = replace(tokens, pos=pos * self.pos_scale(tokens.content))
            tokens = replace(tokens, content=layer(tokens), pos=pos)
        return replace(tokens, content=self.norm(tokens.content))
