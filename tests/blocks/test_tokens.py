from __future__ import annotations

import itertools

import pytest
import torch

from detfamily.blocks.tokens import flatten, flatten_maps, resize_mask, valid_ratio
from detfamily.structures import Size


@pytest.mark.parametrize(
    ("whole", "size"),
    [((64, 96), (8, 12)), ((50, 37), (7, 5)), ((13, 9), (13, 9)), ((10, 10), (3, 4)), ((33, 65), (2, 3))],
)
def test_a_cell_takes_the_pixel_at_the_floor_of_its_share(whole: Size, size: Size) -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, *whole) < 0.5
    resized = resize_mask(mask, size)
    assert resized.dtype == torch.bool and resized.shape == (2, *size)
    for b, i, j in itertools.product(range(2), range(size[0]), range(size[1])):
        assert resized[b, i, j] == mask[b, i * whole[0] // size[0], j * whole[1] // size[1]]


def test_tokens_are_levels_after_levels_row_by_row() -> None:
    maps = [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 3)]
    tokens = flatten(maps)
    assert tokens.shape == (2, 26, 3)
    for i, j in itertools.product(range(4), range(5)):
        assert torch.equal(tokens[:, i * 5 + j], maps[0][:, :, i, j])
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(tokens[:, 20 + i * 3 + j], maps[1][:, :, i, j])


def test_geometry_of_a_padded_batch() -> None:
    image = torch.ones(2, 32, 40, dtype=torch.bool)
    image[0], image[1, :24, :28] = False, False
    shapes = [(8, 10), (4, 5), (2, 3)]
    maps = [torch.randn(2, 6, *shape) for shape in shapes]
    masks = [resize_mask(image, shape) for shape in shapes]
    tokens = flatten_maps(maps, masks, padded=True)
    assert tokens.grid is not None and tokens.grid.padding_mask is not None and tokens.reference_points is not None
    assert tokens.pos is None and tokens.grid.shapes == tuple(shapes)
    start = 0
    for level, (h, w) in enumerate(shapes):
        for b in range(2):
            rows = sum(not masks[level][b, i, 0] for i in range(h))
            columns = sum(not masks[level][b, 0, j] for j in range(w))
            ratio = torch.tensor([columns / w, rows / h])
            torch.testing.assert_close(tokens.grid.valid_ratios[b, level], ratio)
            for i, j in itertools.product(range(h), range(w)):
                place = start + i * w + j
                assert tokens.grid.padding_mask[b, place] == masks[level][b, i, j]
                center = torch.tensor([(j + 0.5) / columns, (i + 0.5) / rows])
                torch.testing.assert_close(tokens.reference_points[b, place], center)
        start += h * w
    # real cells lie within the image; beyond it are only padded ones
    inside = (tokens.reference_points < 1).all(-1)
    assert torch.equal(inside, ~tokens.grid.padding_mask)


def test_without_padding_there_is_no_mask() -> None:
    mask = torch.zeros(1, 2, 4, dtype=torch.bool)
    tokens = flatten_maps([torch.randn(1, 6, 2, 4)], [mask], padded=False)
    assert tokens.grid is not None and tokens.grid.padding_mask is None
    assert torch.equal(tokens.grid.valid_ratios, torch.ones(1, 1, 2))
    assert torch.equal(valid_ratio(mask), torch.ones(1, 2))
