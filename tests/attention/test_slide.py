"""Slide attention against loops over tokens and their neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from detfamily.attention.slide import SlideAttention

from .map_checks import (
    check_gradients,
    check_padding,
    check_positions,
    check_sixteen_bits,
    check_sizes,
    drawn,
    hidden_at,
)


def by_loops(module: SlideAttention, x: Tensor, pos: Tensor, hidden: Tensor) -> Tensor:
    batch, h, w, width = x.shape
    heads = module.num_heads
    depth = module.proj.in_features // heads
    side = round(module.neighbours**0.5)
    output = []
    for image in range(batch):
        projected = {}
        for y in range(-side, h + side):
            for x_ in range(-side, w + side):
                inside = 0 <= y < h and 0 <= x_ < w and not hidden[image, y, x_]
                maps = [x[image, y, x_] + pos[image, y, x_], x[image, y, x_]] if inside else []
                projected[y, x_] = [module.qkv(one).view(heads, 3, depth) for one in maps]
        for y in range(h):
            for x_ in range(w):
                q = module.qkv(x[image, y, x_] + pos[image, y, x_]).view(heads, 3, depth)[:, 0]
                mixed = []
                for head in range(heads):
                    logits, values = [], []
                    for n in range(side**2):
                        found = []
                        convs = (module.gather, module.gather_values or module.gather)
                        for kind, conv in enumerate(convs):  # keys, values
                            own = torch.arange(depth) * side**2 + n  # a channel's neighbours lie side by side
                            total = conv.bias[own] + module.shift_bias[own]
                            for a in range(side):
                                for b in range(side):
                                    there = projected[y + a - side // 2, x_ + b - side // 2]
                                    if there:
                                        factor = conv.weight[own, 0, a, b] + float(n == a * side + b)
                                        total = total + factor * there[kind][head, 1 + kind]
                            found.append(total)
                        key = found[0]
                        if module.position_bias is not None:
                            key = key + module.position_bias[head, n]
                        logits.append(q[head] @ key / (width / heads) ** 0.5)
                        values.append(found[1])
                    mixed.append(torch.stack(logits).softmax(0) @ torch.stack(values))
                output.append(module.proj(torch.cat(mixed)))
    return torch.stack(output).view(x.shape)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kernel_size": 5, "reduction": 8},
        {"qkv_bias": False, "position_bias": False, "shared_gather": False, "reduction": 2, "num_heads": 4},
    ],
)
def test_each_token_and_its_neighbours(settings: dict[str, Any]) -> None:
    module = drawn(SlideAttention(**{"embed_dim": 16, "num_heads": 2} | settings))
    hidden = hidden_at(3, 4, (3, 4), (2, 2))
    x, pos = (torch.randn(2, 3, 4, 16).double().requires_grad_() for _ in range(2))
    ours, expected = (one[~hidden] for one in (module.on_map(x, pos, hidden), by_loops(module, x, pos, hidden)))
    check_gradients(ours, expected, [x, pos, *module.parameters()])


def test_padding_is_like_what_lies_beyond_the_map() -> None:
    module = drawn(SlideAttention(16, 2))
    x = torch.randn(1, 4, 5, 16).double()
    larger = torch.randn(1, 7, 9, 16).double()
    larger[:, :4, :5] = x
    found = module.on_map(larger, padding_mask=hidden_at(7, 9, (4, 5)))[:, :4, :5]
    torch.testing.assert_close(found, module.on_map(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_what_all_attentions_have_to_do(kernel_size: int) -> None:
    for check in (check_padding, check_positions, check_sizes, check_sixteen_bits):
        check(drawn(SlideAttention(16, 2, kernel_size), 0.3))


def test_the_shift_is_no_parameter_and_is_not_stored() -> None:
    module = SlideAttention(16, 2)
    assert "shift" not in module.state_dict() and "shift" not in dict(module.named_parameters())
    assert module.shift.view(-1, 9).argmax(1).tolist() == [*range(9)] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((16, 3), "embed_dim=16, reduction=4, num_heads=3: expected a reduction that divides embed_dim"),
        ((18, 2), "embed_dim=18, reduction=4"),
        ((16, 2, 4), "kernel_size=4: expected an odd number"),
    ],
)
def test_settings_that_make_no_sense(settings: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlideAttention(*settings)
