"""Spatial-reduction attention against loops over cells."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detfamily.attention.pyramid import PyramidAttention

from .map_checks import (
    check_gradients,
    check_padding,
    check_positions,
    check_sixteen_bits,
    check_sizes,
    drawn,
    hidden_at,
)


def by_loops(module: PyramidAttention, x: Tensor, pos: Tensor, hidden: Tensor) -> Tensor:
    batch, h, w, width = x.shape
    step, heads = module.stride, module.num_heads
    depth = width // heads
    output = []
    for image in range(batch):
        shown = (~hidden[image])[..., None].double()
        maps = (x[image] + pos[image]) * shown, x[image] * shown
        cells: list[list[Tensor]] = [[], []]
        for i in range(0, max(h - h % step, 1), step):
            for j in range(0, max(w - w % step, 1), step):
                if hidden[image, i, j]:
                    continue
                for kind, one in enumerate(maps):
                    cell = one[i, j]
                    if step > 1:
                        cell = module.reduce.bias
                        for a in range(min(step, h - i)):
                            for b in range(min(step, w - j)):
                                cell = cell + module.reduce.weight[:, :, a, b] @ one[i + a, j + b]
                        cell = module.reduced_norm(cell)
                    cells[kind].append(cell)
        keys, values = module.k(torch.stack(cells[0])), module.v(torch.stack(cells[1]))
        for token in maps[0].flatten(0, 1):
            q = module.q(token)
            parts = [slice(head * depth, (head + 1) * depth) for head in range(heads)]
            mixed = [(keys[:, p] @ q[p] / depth**0.5).softmax(0) @ values[:, p] for p in parts]
            output.append(module.proj(torch.cat(mixed)))
    return torch.stack(output).view(x.shape)


@pytest.mark.parametrize(("size", "reduction"), [((4, 6), 2), ((5, 3), 2), ((2, 7), 3), ((3, 4), 1)])
def test_all_tokens_look_at_cells(size: tuple[int, int], reduction: int) -> None:
    module = drawn(PyramidAttention(16, 4, reduction))
    hidden = hidden_at(*size, size, (max(size[0] - 2, 1), 2))
    x, pos = (torch.randn(2, *size, 16).double().requires_grad_() for _ in range(2))
    ours, expected = (one[~hidden] for one in (module.on_map(x, pos, hidden), by_loops(module, x, pos, hidden)))
    check_gradients(ours, expected, [x, pos, *module.parameters()])


def test_rows_that_fill_no_cell_are_dropped() -> None:
    module = drawn(PyramidAttention(16, 4, 2))
    x = torch.randn(1, 5, 6, 16).double()
    other = x.clone()
    other[:, 4] += 1
    before, after = module.on_map(x), module.on_map(other)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4], after[:, 4])


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_what_all_attentions_have_to_do(reduction: int) -> None:
    for check in (check_padding, check_positions, check_sizes, check_sixteen_bits):
        check(drawn(PyramidAttention(16, 4, reduction), 0.3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((16, 3, 2), "num_heads=3 does not divide embed_dim=16"),
        ((16, 4, 0), "reduction=0: expected cells of at least 1 token a side"),
    ],
)
def test_settings_that_make_no_sense(settings: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PyramidAttention(*settings)
