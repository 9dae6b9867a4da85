from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from detfamily.ops import ms_deform_attn, ms_deform_attn_projected

SHAPES = ((4, 6), (3, 2))
BATCH, QUERIES, HEADS, POINTS, WIDTH = 2, 3, 2, 4, 5
TOKENS = 4 * 6 + 3 * 2


def raw(reference_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(reference_dim)
    value = torch.randn(BATCH, TOKENS, HEADS, WIDTH, dtype=torch.float64)
    references = torch.rand(BATCH, QUERIES, len(SHAPES), reference_dim, dtype=torch.float64)
    offsets = 2 * torch.randn(BATCH, QUERIES, HEADS, len(SHAPES), POINTS, 2, dtype=torch.float64)
    logits = torch.randn(BATCH, QUERIES, HEADS, len(SHAPES) * POINTS, dtype=torch.float64)
    return value, references, offsets, logits


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_projected_form_is_the_plain_one_at_places_computed_one_by_one(reference_dim: int) -> None:
    value, references, offsets, logits = raw(reference_dim)
    locations, weights = torch.empty_like(offsets), torch.empty(offsets.shape[:-1], dtype=offsets.dtype)
    for b, q, m in itertools.product(range(BATCH), range(QUERIES), range(HEADS)):
        everything = logits[b, q, m].exp().sum()
        for level, p in itertools.product(range(len(SHAPES)), range(POINTS)):
            weights[b, q, m, level, p] = logits[b, q, m, level * POINTS + p].exp() / everything
            h, w = SHAPES[level]
            for axis, cells in enumerate((w, h)):
                where, offset = references[b, q, level], offsets[b, q, m, level, p, axis]
                step = offset / cells if reference_dim == 2 else offset / POINTS * where[2 + axis] * 0.5
                locations[b, q, m, level, p, axis] = where[axis] + step
    output = ms_deform_attn_projected(value, SHAPES, references, offsets, logits)
    assert output.shape == (BATCH, QUERIES, HEADS * WIDTH)
    torch.testing.assert_close(output, ms_deform_attn(value, SHAPES, locations, weights), rtol=0, atol=1e-12)


def test_no_queries_give_no_output() -> None:
    value, references, offsets, logits = raw(2)
    output = ms_deform_attn_projected(value, SHAPES, references[:, :0], offsets[:, :0], logits[:, :0])
    assert output.shape == (BATCH, 0, HEADS * WIDTH)


def plain() -> dict[str, Tensor]:
    value, _, offsets, _ = raw(2)
    return {"value": value, "sampling_locations": offsets, "attention_weights": offsets[..., 0]}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("value", lambda x: x[:, 1:]),
        ("value", lambda x: x.flatten(2)),
        ("sampling_locations", lambda x: x[..., :1]),
        ("sampling_locations", lambda x: x[:, :, :1]),
        ("sampling_locations", lambda x: x[:, :, :, :1]),
        ("sampling_locations", lambda x: x[:1]),
        ("sampling_locations", lambda x: x.flatten(3, 4)),
        ("attention_weights", lambda x: x[..., :1]),
        ("attention_weights", lambda x: x[:, :1]),
    ],
)
def test_a_shape_that_does_not_fit_is_named(name: str, change: object) -> None:
    inputs = plain()
    inputs[name] = change(inputs[name])  # type: ignore[operator]
    with pytest.raises(ValueError, match=rf"{name} has shape \({inputs[name].shape[0]}, .*expected"):
        ms_deform_attn(inputs["value"], SHAPES, inputs["sampling_locations"], inputs["attention_weights"])


def test_no_level_at_all() -> None:
    value, _, offsets, _ = raw(2)
    with pytest.raises(ValueError, match="spatial_shapes is empty"):
        ms_deform_attn(value[:, :0], (), offsets[:, :, :, :0], offsets[:, :, :, :0, :, 0])


@pytest.mark.parametrize(
    ("position", "name", "change"),
    [
        (1, "reference_points", lambda x: x[..., :1]),
        (1, "reference_points", lambda x: torch.cat([x, x[..., :1]], -1)),  # three numbers are neither point nor box
        (1, "reference_points", lambda x: x[:, :, :1]),  # one level would be broadcast to all
        (1, "reference_points", lambda x: x[:, 1:]),
        (2, "sampling_offsets", lambda x: x.flatten(4)),
        (2, "sampling_offsets", lambda x: x[..., :1]),
        (3, "attention_logits", lambda x: x[..., 1:]),
        (3, "attention_logits", lambda x: x[:, :, 1:]),
    ],
)
def test_a_projection_that_does_not_fit_is_named(position: int, name: str, change: object) -> None:
    inputs = list(raw(2))
    inputs[position] = change(inputs[position])  # type: ignore[operator]
    value, references, offsets, logits = inputs
    with pytest.raises(ValueError, match=rf"{name} has shape .*expected"):
        ms_deform_attn_projected(value, SHAPES, references, offsets, logits)


def test_dtypes_that_do_not_fit_are_named() -> None:
    value, references, offsets, logits = raw(2)
    with pytest.raises(ValueError, match=r"value has dtype torch.int64; expected one of torch.float64, "):
        ms_deform_attn_projected(value.long(), SHAPES, references, offsets, logits)
    with pytest.raises(ValueError, match=r"sampling_offsets has dtype torch.float64; expected torch.float32"):
        ms_deform_attn_projected(value.float(), SHAPES, references.float(), offsets, logits.float())
    inputs = plain()
    with pytest.raises(
        ValueError, match=r"attention_weights has dtype torch.float64; expected torch.float32, as value"
    ):
        ms_deform_attn(value.half(), SHAPES, inputs["sampling_locations"].half(), inputs["attention_weights"])


def test_narrower_places_are_widened() -> None:
    value, references, offsets, logits = raw(2)
    narrow = [tensor.float() for tensor in (references, offsets, logits)]
    wide = [tensor.double() for tensor in narrow]
    torch.testing.assert_close(
        ms_deform_attn_projected(value, SHAPES, *narrow), ms_deform_attn_projected(value, SHAPES, *wide), rtol=0, atol=0
    )


def test_nothing_is_copied_between_devices() -> None:
    value, references, offsets, logits = raw(2)
    with pytest.raises(ValueError, match=r"attention_logits is on meta, value on cpu: nothing is copied"):
        ms_deform_attn_projected(value, SHAPES, references, offsets, logits.to("meta"))


def test_sizes_without_cells() -> None:
    value, references, offsets, logits = raw(2)
    with pytest.raises(ValueError, match=r"spatial_shapes is \(\(4, 6\), \(0, 2\)\); expected heights and widths"):
        ms_deform_attn_projected(value[:, :24], ((4, 6), (0, 2)), references, offsets, logits)
