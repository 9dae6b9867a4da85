"""What every attention on maps has to do with padding, precision and sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detfamily.attention.maps import MapAttention


def drawn(module: nn.Module, scale: float = 0.5) -> nn.Module:
    """In float64, with parameters far from their start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return module


def hidden_at(h: int, w: int, *valid: tuple[int, int]) -> Tensor:
    """The padding of images of these sizes, on a map of h x w."""
    mask = torch.ones(len(valid), h, w, dtype=torch.bool)
    for image, (y, x) in enumerate(valid):
        mask[image, :y, :x] = False
    return mask


def check_gradients(ours: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Two forms of one result, both in float64, and what they say of the leaves."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11 * max(1.0, expected.abs().max().item()))
    weights = torch.randn_like(ours)
    found = [torch.autograd.grad((one * weights).sum(), leaves, allow_unused=True) for one in (ours, expected)]
    for leaf, one, other in zip(leaves, *found, strict=True):
        one, other = (torch.zeros_like(leaf) if grad is None else grad for grad in (one, other))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * max(1.0, other.abs().max().item()))
    assert any(bool(grad.any()) for grad in found[0] if grad is not None)


def check_padding(module: MapAttention) -> None:
    """What is in the padding, as numbers of any size, changes nothing elsewhere, and learns nothing from it."""
    module = module.float()
    mask = hidden_at(9, 13, (9, 13), (6, 5), (1, 1))
    x, pos = torch.randn(3, 9, 13, 16), torch.randn(3, 9, 13, 16)
    other_x, other_pos = (torch.where(mask[..., None], 1e4 * torch.randn_like(one), one) for one in (x, pos))
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert torch.equal(module.on_map(x, pos, mask)[~mask], module.on_map(other_x, other_pos, mask)[~mask])
    leaves = [other_x.requires_grad_(), other_pos.requires_grad_()]
    output = module.on_map(*leaves, mask)
    for gradient in torch.autograd.grad(output[~mask].square().sum(), leaves):
        assert bool((gradient[mask] == 0).all()) and bool(gradient[~mask].any())
    # an image of nothing but padding gives numbers
    output = module.on_map(*leaves, torch.ones_like(mask))
    gradients = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    assert bool(output.isfinite().all())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)


def check_positions(module: MapAttention) -> None:
    """Positions change what is compared. Where all tokens have the same values, nothing depends on them."""
    x, pos = torch.randn(2, 6, 8, 16).double(), torch.randn(2, 6, 8, 16).double()
    module = module.double()
    assert not torch.allclose(module.on_map(x), module.on_map(x, pos), atol=1e-3)
    torch.testing.assert_close(module.on_map(x), module.on_map(x, torch.zeros_like(pos)), rtol=0, atol=1e-12)


def check_sizes(module: MapAttention) -> None:
    """Any map: of a single token, row or column, and larger ones."""
    module = module.float()
    for size in ((1, 1), (1, 7), (6, 1), (2, 2), (3, 5), (10, 9)):
        x = torch.randn(2, *size, 16, requires_grad=True)
        output = module.on_map(x, torch.randn_like(x))
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        assert output.shape == x.shape
        assert bool(output.isfinite().all()) and bool(gradient.isfinite().all()), size


def check_sixteen_bits(module: MapAttention, tolerance: float = 0.08) -> None:
    """About the same under autocast, and as a whole."""
    module = module.float()
    mask = hidden_at(6, 7, (6, 7), (3, 4))
    x, pos = torch.randn(2, 6, 7, 16), torch.randn(2, 6, 7, 16)
    expected = module.on_map(x, pos, mask)[~mask].detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = module.on_map(x, pos, mask)[~mask]
    whole = module.bfloat16().on_map(x.bfloat16(), pos.bfloat16(), mask)[~mask]
    module.float()
    for one in (found, whole):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
