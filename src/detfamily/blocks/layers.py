"""What transformer layers are made of besides attention: residual connections with their norms, and the FFN."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

Residual = Callable[[], "PostNorm | PreNorm"]
"""A factory of residual connections."""


class Dropout(nn.Dropout):
    """torch's dropout, with 16 random bits a number on the CPU: torch draws there one number at a time, on one thread.

    That takes a sixth of a training step of Deformable DETR. The probability is rounded to a multiple of 2^-16, and
    what is kept is scaled by the rounded one, so that the mean stays.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)"""
        dropped = round(self.p * 2**16)
        if not self.training or not 0 < dropped < 2**16 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        return x * (bits >= dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))


class PostNorm(nn.Module):
    """norm(x + dropout(f(x))): the norm sits on the main path (arXiv 1706.03762; the default of all families)."""

    def __init__(self, embed_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        output: Tensor = self.norm(x + self.dropout(sublayer(x)))
        return output


class PreNorm(nn.Module):
    """x + dropout(f(norm(x))): the main path stays free, so a stack of these wants a norm at its end."""

    def __init__(self, embed_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        output: Tensor = x + self.dropout(sublayer(self.norm(x)))
        return output


class FeedForward(nn.Module):
    """Two linear layers on each token.

    Args:
        embed_dim: width C in and out.
        hidden_dim: width between.
        activation: factory of the module between.
        dropout: after the activation.
    """

    def __init__(
        self, embed_dim: int, hidden_dim: int, activation: Callable[[], nn.Module], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, hidden_dim)
        self.activation = activation()
        if isinstance(self.activation, nn.ReLU):
            self.activation.inplace = True  # the widest tensor of a layer need not exist twice
        self.dropout = Dropout(dropout)
        self.linear2 = nn.Linear(hidden_dim, embed_dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        output: Tensor = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return output


class MLP(nn.Module):
    """Linear layers with ReLU between them, none at the end.

    Args:
        in_dim: width in.
        hidden_dim: width between.
        out_dim: width out.
        num_layers: linear layers.
        xavier: start with Xavier's uniform weights, as officially all that is part of a transformer.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int, xavier: bool = False) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        if xavier:
            for layer in self.layers:
                nn.init.xavier_uniform_(cast("nn.Linear", layer).weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)"""
        for layer in self.layers[:-1]:
            x = layer(x).relu_()
        output: Tensor = self.layers[-1](x)
        return output
