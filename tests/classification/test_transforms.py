"""Augmentation against PIL and against what the ranges promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as official
from torchvision.transforms import InterpolationMode

from detfamily.classification import transforms as ours
from detfamily.data.transforms import Compose, Sample


def sample(height: int, width: int, seed: int = 0) -> Sample:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    label = torch.tensor([2])
    return Sample(image, ours.whole(image), label, torch.ones(1), torch.zeros(1).long(), 7, (height, width))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(75, 100), (100, 75), (40, 90)])
@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (ours.ResizeShortSide(64), official.Resize(64, InterpolationMode.BICUBIC)),
        (ours.Stretch(64), official.Resize((64, 64), InterpolationMode.BICUBIC)),
    ],
    ids=["short side", "stretched"],
)
def test_testing_is_that_of_the_official_code_on_pil(size, mine, theirs):
    one = sample(*size)
    image = Image.fromarray(one.image.permute(1, 2, 0).numpy())
    expected = np.asarray(official.CenterCrop(56)(theirs(image)))
    found = Compose([mine, ours.CenterCrop(56)])(one, generator())
    assert found.boxes.tolist() == [[0, 0, 56, 56]] and found.labels.tolist() == [2]
    difference = np.abs(found.image.permute(1, 2, 0).numpy().astype(int) - expected.astype(int))
    assert difference.max() <= 2 and difference.mean() < 0.5


def test_regions_keep_to_their_ranges():
    transform = ours.RandomResizedCrop(32, area=(0.2, 0.5), ratio=(0.5, 2.0))
    rng, seen = generator(), []
    for _ in range(300):
        top, left, height, width = transform._region(100, 120, rng)
        assert 0 <= top <= 100 - height and 0 <= left <= 120 - width
        seen.append((height * width / 12000, width / height))
    areas, ratios = zip(*seen, strict=True)
    assert 0.19 < min(areas) < 0.22 and 0.45 < max(areas) < 0.51
    assert 0.49 < min(ratios) < 0.6 and 1.7 < max(ratios) < 2.03
    assert ours.RandomResizedCrop(32)._region(10, 1000, generator())[2] <= 10
    found = transform(sample(100, 120), generator())
    assert found.size == (32, 32) and found.boxes.tolist() == [[0, 0, 32, 32]]


def test_an_image_too_long_for_any_region_gives_its_middle():
    transform = ours.RandomResizedCrop(8, area=(1.0, 1.0))
    assert transform._region(10, 100, generator()) == (0, 43, 10, 13)
    assert transform._region(100, 10, generator()) == (43, 0, 13, 10)


def test_erased_boxes_are_noise_and_the_rest_is_untouched():
    grey = sample(60, 80)
    grey = ours.with_image(grey, torch.zeros_like(grey.image))
    shares = []
    for seed in range(200):
        found = ours.RandomErasing(0.5, area=(0.1, 0.2))(grey, generator(seed)).image
        touched = found.any(0)
        rows, columns = touched.any(1), touched.any(0)
        shares.append(touched.float().mean().item())
        assert (touched.sum() >= 0.98 * rows.sum() * columns.sum()) or not touched.any()
    assert 70 < sum(share > 0 for share in shares) < 130
    assert max(shares) < 0.21 and min(share for share in shares if share) > 0.09


@pytest.mark.parametrize(
    "transform",
    [ours.RandomResizedCrop(24), ours.RandAugment(2, 15), ours.RandomErasing(1.0)],
    ids=lambda t: type(t).__name__,
)
def test_the_generator_alone_decides(transform):
    one = sample(50, 70)
    torch.manual_seed(1)
    first, state = transform(one, generator(3)).image, torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(transform(one, generator(3)).image, first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the global one
    others = [transform(one, generator(seed)).image for seed in range(4, 9)]
    assert any(other.shape != first.shape or not torch.equal(other, first) for other in others)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ours.RandomResizedCrop(0),
        lambda: ours.RandomResizedCrop(8, area=(0.5, 0.1)),
        lambda: ours.RandAugment(0),
        lambda: ours.RandAugment(2, 31),
        lambda: ours.RandomErasing(1.5),
        lambda: ours.RandomErasing(0.5, ratio=(1,)),
        lambda: ours.Stretch(0),
    ],
)
def test_numbers_out_of_range(make):
    with pytest.raises(ValueError):
        make()
