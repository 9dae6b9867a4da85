from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detfamily.blocks.layers import MLP, Dropout, FeedForward, PostNorm, PreNorm


@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_dropout_drops_that_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    kept = Dropout(p)(torch.ones(1001, 1003))
    values = kept.unique()
    assert len(values) == 2 and values[0] == 0
    assert values[1] == pytest.approx(1 / (1 - p), rel=1e-3)
    share = (kept == 0).double()
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(share.mean() - p) < 4 * deviation + 2**-17
    assert abs(kept.mean() - 1) < 4 * deviation / (1 - p)
    for lag in (1, 2, 3, 4, 8):  # neighbours come out of one word, and must not know of each other
        together = (share.flatten()[lag:] * share.flatten()[:-lag]).mean()
        assert abs(together - share.mean() ** 2) < 5 * deviation


def test_dropout_scales_gradients_as_values() -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 5, dtype=torch.float64).add(1).requires_grad_()
    y = Dropout(0.4)(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y, x * x.grad)
    assert (x.grad == 0).any() and (x.grad > 1).any()


def test_dropout_follows_the_seed_and_rests_in_evaluation() -> None:
    dropout, x = Dropout(0.5), torch.randn(7, 11)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(dropout(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x))
    assert Dropout(0.5)(torch.zeros(0, 3)).shape == (0, 3)
    assert Dropout(0.5)(x.bfloat16()).dtype == torch.bfloat16


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
