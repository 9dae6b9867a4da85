from __future__ import annotations

import pytest
import torch

from detfamily.data.batches import collate, normalized_cxcywh, pad
from detfamily.data.transforms import Sample


def sample(height: int, width: int, boxes: list[list[float]], image_id: int) -> Sample:
    image = torch.randint(1, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(len(boxes))
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Sample(image, corners, labels, torch.ones(len(boxes)), torch.zeros_like(labels), image_id, (999, 888))


def test_images_lie_in_the_top_left_corner_and_the_rest_is_padding() -> None:
    samples = [sample(5, 9, [], 3), sample(7, 4, [], 8)]
    images = collate(samples).images
    assert images.pixels.dtype == torch.uint8
    assert images.pixels.shape == (2, 3, 7, 9)
    assert images.sizes == ((5, 9), (7, 4))
    assert images.original_sizes == ((999, 888),) * 2
    assert images.canvas_sizes == images.original_sizes
    assert images.image_ids == (3, 8)
    for index, one in enumerate(samples):
        h, w = one.size
        assert torch.equal(images.pixels[index, :, :h, :w], one.image)
        inside = torch.zeros(7, 9, dtype=torch.bool)
        inside[:h, :w] = True
        assert torch.equal(images.padding_mask[index], ~inside)
        assert not images.pixels[index, :, ~inside].any()


def test_pixels_lie_channels_last_whatever_the_images_are() -> None:
    packed = torch.randint(0, 256, (6, 6, 3), dtype=torch.uint8).permute(2, 0, 1)
    for image in (packed, packed.contiguous(), packed.transpose(1, 2)):
        pixels, mask = pad([image, image])
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(pixels[1], image)
        assert not mask.any()


def test_targets_are_padded_to_the_fullest_image() -> None:
    samples = [
        sample(10, 20, [[2, 1, 6, 9]], 1),
        sample(8, 8, [], 2),
        sample(10, 10, [[0, 0, 10, 10], [1, 2, 3, 4]], 3),
    ]
    targets = collate(samples).targets
    assert targets.counts == (1, 0, 2)
    assert targets.image_ids == (1, 2, 3)
    assert targets.labels.tolist() == [[0, 0], [0, 0], [0, 1]]
    assert torch.allclose(targets.boxes[0, 0], torch.tensor([0.2, 0.5, 0.2, 0.8]))
    assert torch.allclose(targets.boxes[2], torch.tensor([[0.5, 0.5, 1, 1], [0.2, 0.3, 0.2, 0.2]]))


def test_a_batch_without_any_object() -> None:
    targets = collate([sample(4, 4, [], 1), sample(4, 4, [], 2)]).targets
    assert targets.counts == (0, 0)
    assert targets.labels.shape == (2, 0)
    assert targets.boxes.shape == (2, 0, 4)


def test_boxes_return_to_pixels() -> None:
    corners = torch.rand(50, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values.reshape(50, 4)
    corners = corners * torch.tensor([640.0, 427, 640, 427])
    cx, cy, w, h = normalized_cxcywh(corners, (427, 640)).double().unbind(-1)
    back = torch.stack(((cx - w / 2) * 640, (cy - h / 2) * 427, (cx + w / 2) * 640, (cy + h / 2) * 427), -1)
    assert back.numpy() == pytest.approx(corners.double().numpy(), abs=1e-3)
