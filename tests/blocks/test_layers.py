from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detfamily.blocks.layers import MLP, FeedForward, PostNorm, PreNorm


@pytest.mark.parametrize("kind", [PostNorm, PreNorm])
def test_residuals_against_hand_computation(kind: type[PostNorm] | type[PreNorm]) -> None:
    torch.manual_seed(0)
    residual = kind(6).double()
    with torch.no_grad():
        residual.norm.weight.uniform_(0.5, 1.5)
        residual.norm.bias.normal_()
    x = torch.randn(2, 3, 6, dtype=torch.float64)

    def norm(value: torch.Tensor) -> torch.Tensor:
        centered = value - value.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        return centered / (variance + 1e-5).sqrt() * residual.norm.weight + residual.norm.bias

    expected = norm(x + x.sin()) if kind is PostNorm else x + norm(x).sin()
    torch.testing.assert_close(residual(x, torch.sin), expected)


@pytest.mark.parametrize("kind", [PostNorm, PreNorm])
def test_dropout_hits_the_sublayer_and_spares_the_main_path(kind: type[PostNorm] | type[PreNorm]) -> None:
    residual = kind(6, dropout=1.0)
    x = torch.randn(2, 3, 6)
    without = residual.norm(x) if kind is PostNorm else x
    torch.testing.assert_close(residual(x, torch.exp), without)
    residual.eval()
    assert not torch.allclose(residual(x, torch.exp), without)


def test_feed_forward() -> None:
    torch.manual_seed(0)
    ffn = FeedForward(4, 9, nn.GELU)
    x = torch.randn(2, 3, 4)
    hidden = F.gelu(x @ ffn.linear1.weight.T + ffn.linear1.bias)
    torch.testing.assert_close(ffn(x), hidden @ ffn.linear2.weight.T + ffn.linear2.bias)
    # nothing comes through the hidden layer when all of it is dropped
    dropped = FeedForward(4, 9, nn.ReLU, dropout=1.0)
    torch.testing.assert_close(dropped(x), dropped.linear2.bias.expand(2, 3, 4))


def test_mlp_has_relu_between_and_none_at_the_end() -> None:
    torch.manual_seed(0)
    mlp = MLP(4, 7, 5, num_layers=3)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(7, 4), (7, 7), (5, 7)]
    reference = nn.Sequential(mlp.layers[0], nn.ReLU(), mlp.layers[1], nn.ReLU(), mlp.layers[2])
    x = torch.randn(3, 4)
    torch.testing.assert_close(mlp(x), reference(x))
    assert (mlp(torch.randn(50, 4)) < 0).any()
