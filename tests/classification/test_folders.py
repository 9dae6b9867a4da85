"""Folders of images: labels in the order of names, and what may be wrong with a folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from detfamily.classification.folders import ImageFolders
from detfamily.data.coco import SampleKey
from detfamily.data.transforms import Compose
from detfamily.errors import DataError

IDENTITY = Compose([])


@pytest.fixture
def root(tmp_path):
    """Two classes of grey images, with two and one of them, and one in a folder below."""
    for split in ("train", "val"):
        for name, shade in (("wolf/deep/b.PNG", 30), ("wolf/a.jpg", 20), ("ant/z.png", 200)):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 12), shade, np.uint8)).save(path)
        (tmp_path / split / "wolf/notes.txt").write_text("no image")
    return tmp_path


def test_images_and_labels(root):
    data = ImageFolders(str(root))
    assert data.label_map.names == ("ant", "wolf")
    found = data.train(IDENTITY)
    samples = [found[index] for index in range(len(found))]
    assert [one.labels.tolist() for one in samples] == [[0], [1], [1]]
    assert [round(one.image.float().mean().item()) for one in samples] == [200, 20, 30]
    assert samples[0].boxes.tolist() == [[0, 0, 12, 8]] and samples[0].size == (8, 12)
    assert data.describe() == f"{root}: 2 classes, train 3 images, val 3 images"


def test_the_seed_of_a_key_decides_the_augmentation(root):
    def drawn(sample, rng):
        return torch.rand((), generator=rng).item()

    found = ImageFolders(str(root)).validation(drawn)
    assert found[SampleKey(0, 5)] == found[SampleKey(2, 5)] != found[SampleKey(0, 6)]


def test_a_set_may_be_validated_on_its_training_images(root):
    (root / "val").rename(root / "elsewhere")
    assert len(ImageFolders(str(root), validate_on="train").validation(IDENTITY)) == 3
    assert len(ImageFolders(str(root), val="elsewhere").validation(IDENTITY)) == 3
    with pytest.raises(DataError, match="val does not exist.*set data.val="):
        ImageFolders(str(root)).validation(IDENTITY)


def test_what_is_wrong_is_named(root):
    with pytest.raises(DataError, match=r"data.root=/nowhere is not a folder; it should hold train/CLASS"):
        ImageFolders("/nowhere")
    with pytest.raises(DataError, match="did you mean 'train'"):
        ImageFolders(str(root), validate_on="trian")
    (root / "train/zebra").mkdir()
    with pytest.raises(DataError, match="zebra holds no image .*; 1 of 3 classes have none"):
        ImageFolders(str(root)).train(IDENTITY)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / "train/zebra/a.png")
    with pytest.raises(DataError, match="other classes: only train has zebra"):
        ImageFolders(str(root)).train(IDENTITY)
    for path in (root / "val").glob("*/*.*"):
        path.rename(root / "val" / path.name)
    for folder in ("wolf/deep/b.PNG", "wolf/deep", "wolf", "ant"):
        path = root / "val" / folder
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match="val holds 2 images and no folders of classes"):
        ImageFolders(str(root)).validation(IDENTITY)


def test_a_broken_file_is_named(root):
    (root / "val/ant/z.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"z\.png is not an image"):
        ImageFolders(str(root)).validation(IDENTITY)[0]
