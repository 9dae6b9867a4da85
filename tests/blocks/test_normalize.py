from __future__ import annotations

import torch
from torchvision.transforms.v2 import functional as v2

from detfamily.blocks.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize


def test_uint8_as_torchvision_does_it() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 7, 9), dtype=torch.uint8)
    expected = v2.normalize(v2.to_dtype(pixels, torch.float32, scale=True), list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(Normalize()(pixels, None), expected, rtol=0, atol=1e-6)


def test_padding_becomes_zero() -> None:
    pixels = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :, 2:] = True
    output = Normalize()(pixels, mask)
    assert not output[..., 2:].any() and (output[..., :2] > 0.5).all()


def test_float_pixels_are_taken_as_they_are() -> None:
    pixels = torch.randn(1, 3, 4, 4)
    assert Normalize()(pixels, None) is pixels


def test_constants_move_with_the_model_but_are_not_weights() -> None:
    normalize = Normalize()
    assert not normalize.state_dict()
    assert normalize.double()(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), None).dtype == torch.float64
