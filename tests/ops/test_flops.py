"""``FlopCounterMode`` counts the op, whatever computes it, and counts it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from detfamily.ops import backends, ms_deform_attn, ms_deform_attn_projected

Make = Callable[..., Any]


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Name of an op -> what was counted for it; filled at the end."""
    counts: dict[str, int] = {}
    with FlopCounterMode(display=False) as mode:
        yield counts
    counts |= {str(op): number for op, number in mode.get_flop_counts().get("Global", {}).items()}


def by_matrix_products(
    value: Tensor, shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """The op as two matrix products: four corners to a place, places to a query. torch knows what these cost."""
    batch, queries, heads, levels, points, _ = locations.shape
    maps = value.split([h * w for h, w in shapes], dim=1)
    corners, shares = [], []
    for level, (h, w) in enumerate(shapes):
        at = locations[:, :, :, level] * torch.tensor([w, h]) - 0.5
        low = at.floor()
        for x, y in ((0, 0), (1, 0), (0, 1), (1, 1)):
            cell = low + torch.tensor([x, y])
            inside = ((cell >= 0) & (cell < torch.tensor([w, h]))).all(-1)
            index = (cell[..., 1].clamp(0, h - 1) * w + cell[..., 0].clamp(0, w - 1)).long()
            picked = maps[level].permute(0, 2, 1, 3)[:, None].expand(-1, queries, -1, -1, -1)
            corners.append(picked.gather(3, index[..., None].expand(*index.shape, value.shape[-1])))
            shares.append((1 - (at - cell).abs()).prod(-1) * inside)
    corner = torch.stack(corners).unflatten(0, (levels, 4)).permute(2, 3, 4, 0, 5, 1, 6).flatten(0, 4)
    share = torch.stack(shares).unflatten(0, (levels, 4)).permute(2, 3, 4, 0, 5, 1).flatten(0, 4)
    sampled = torch.bmm(share[:, None], corner).view(batch * queries * heads, levels * points, -1)
    summed = torch.bmm(weights.reshape(batch * queries * heads, 1, levels * points), sampled)
    return summed.view(batch, queries, -1)


def test_forward_and_backward_cost_what_the_matrix_products_cost(make_call: Make) -> None:
    call = make_call()
    value, locations, weights = call.plain()
    with backends.use_backend("reference"), counting() as ours:
        output = ms_deform_attn(value, call.shapes, locations, weights)
        output.sum().backward()
    with counting() as products:
        same = by_matrix_products(value, call.shapes, locations, weights)
        same.sum().backward()
    torch.testing.assert_close(output, same)
    assert set(products) == {"aten.bmm"} and products["aten.bmm"] > 0
    forward, backward = ours["detfamily.ms_deform_attn"], ours["detfamily.ms_deform_attn_backward"]
    assert set(ours) == {"detfamily.ms_deform_attn", "detfamily.ms_deform_attn_backward"}
    assert (forward + backward, backward) == (products["aten.bmm"], 2 * forward)


@pytest.mark.parametrize("reference_dim", [2, 4])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("grad", [False, True])
def test_every_way_to_the_op_is_counted_alike(make_call: Make, reference_dim: int, device: str, grad: bool) -> None:
    call = make_call(reference_dim=reference_dim)
    with torch.set_grad_enabled(grad), counting() as plain:
        value, *others = call.plain(device=device)
        ms_deform_attn(value, call.shapes, *others)
    with torch.set_grad_enabled(grad), counting() as projected:
        value, *others = call.projected(device=device)
        output = ms_deform_attn_projected(value, call.shapes, *others)
        if grad:
            output.sum().backward()
    places = call.offsets[..., 0].numel() * call.value.shape[-1]
    assert plain == {"detfamily.ms_deform_attn": 10 * places}
    backward = {"detfamily.ms_deform_attn_projected_backward": 20 * places} if grad else {}
    assert projected == {"detfamily.ms_deform_attn_projected": 10 * places, **backward}


def test_compiled_code_is_counted(make_call: Make, compiled: str) -> None:
    call = make_call()
    value, *others = call.projected(torch.float32)
    with backends.use_backend(compiled), counting() as counts:
        ms_deform_attn_projected(value, call.shapes, *others)
    assert counts == {"detfamily.ms_deform_attn_projected": 10 * call.offsets[..., 0].numel() * call.value.shape[-1]}


def test_counting_changes_no_numbers(make_call: Make) -> None:
    call = make_call()
    results = []
    for context in (counting(), torch.enable_grad()):
        value, *others = call.projected()
        with backends.use_backend("reference"), context:
            output = ms_deform_attn_projected(value, call.shapes, *others)
            output.square().sum().backward()
        results.append([output, value.grad, *(one.grad for one in others)])
    for counted, alone in zip(*results, strict=True):
        torch.testing.assert_close(counted, alone, rtol=0, atol=1e-13)


def test_plain_pytorch_stays_in_pieces_where_nobody_counts(make_call: Make) -> None:
    """So that a compiler sees the pieces, too."""
    call = make_call(batch=1, queries=2)
    value, *others = call.projected()
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with backends.use_backend("reference"):
        output = ms_deform_attn_projected(value, call.shapes, *others)
        compiled = torch.compile(ms_deform_attn_projected, fullgraph=True, backend=keep)
        torch.testing.assert_close(compiled(value, call.shapes, *others), output)
    assert any("grid_sample" in one for one in seen) and not any("ms_deform_attn" in one for one in seen)
