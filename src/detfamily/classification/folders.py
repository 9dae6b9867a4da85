"""``data=imagenet``: images sorted into folders, one for each class, as ImageNet is laid out for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import Dataset

from detfamily.classification.transforms import whole
from detfamily.data.coco import SampleKey
from detfamily.data.images import read_image
from detfamily.data.labels import LabelMap
from detfamily.data.transforms import Sample, Transform
from detfamily.errors import DataError, nearest

SUFFIXES = frozenset(".jpg .jpeg .png .bmp .ppm .tif .tiff .webp".split())
LAYOUT = "train/CLASS/*.jpg and val/CLASS/*.jpg"


class ImageFolders:
    """Images in folders named after their classes: the choice ``data=imagenet``, and any other set in this layout.

    Columns of the head are the classes of the validation set in the order of their names; folders inside those of a
    class belong to it.

    Args:
        root: folder of the data set.
        train: folder of the training images, inside the root.
        val: folder of the validation images.
        validate_on: "val", or "train" to validate on the training images: can they be learned by heart?

    Raises:
        DataError: a folder is not there, or is laid out in another way.
    """

    def __init__(
        self, root: str, train: str = "train", val: str = "val", validate_on: Literal["val", "train"] = "val"
    ) -> None:
        if validate_on not in ("val", "train"):
            raise DataError(f"data.validate_on={validate_on} does not exist; {nearest(validate_on, ('val', 'train'))}")
        self.root = Path(root).expanduser().absolute()
        if not root or not self.root.is_dir():
            raise DataError(f"data.root={root} is not a folder; it should hold {LAYOUT}")
        self._folders = {"train": self.root / train, "val": self.root / (train if validate_on == "train" else val)}

    @cached_property
    def label_map(self) -> LabelMap:
        """Which class each column of the head stands for."""
        return LabelMap.contiguous({"id": index, "name": name} for index, name in enumerate(self._val))

    def train(self, transform: Transform) -> FolderImages:
        """The training set; DataError if its classes are not those of the validation set."""
        if words := _differences(self._train, self._val):
            raise DataError(f"{self._folders['train']} and {self._folders['val']} have other classes: {words}")
        return FolderImages(list(self._train.values()), transform)

    def validation(self, transform: Transform) -> FolderImages:
        """The validation set."""
        return FolderImages(list(self._val.values()), transform)

    def describe(self) -> str:
        """One line: where, how many classes and images; training images once they have been looked for."""
        parts = [f"{self.root}: {len(self._val)} classes"]
        splits = {"train": self._train, "val": self._val} if "_train" in self.__dict__ else {"val": self._val}
        return ", ".join([*parts, *(f"{name} {sum(map(len, one.values()))} images" for name, one in splits.items())])

    @cached_property
    def _val(self) -> dict[str, list[Path]]:
        return _found("val", self._folders["val"])

    @cached_property
    def _train(self) -> dict[str, list[Path]]:
        return self._val if self._folders["train"] == self._folders["val"] else _found("train", self._folders["train"])


class FolderImages(Dataset[Sample]):
    """Images with one label each.

    Args:
        files: of each class, in the order of the labels.
        transform: what to do with each sample.
    """

    def __init__(self, files: Sequence[Sequence[Path]], transform: Transform) -> None:
        self.files = [(path, label) for label, paths in enumerate(files) for path in paths]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> Sample:
        """The sample as it is on disk; its id is its place in the set.

        Raises:
            DataError: the file is missing or broken.
        """
        path, label = self.files[index]
        image = read_image(path)
        box = whole(image)
        return Sample(
            image=image,
            boxes=box,
            labels=torch.tensor([label]),
            area=box[:, 2] * box[:, 3],
            iscrowd=torch.zeros(1, dtype=torch.int64),
            image_id=index,
            original_size=(image.shape[1], image.shape[2]),
        )

    def __getitem__(self, key: int | SampleKey) -> Sample:
        if not isinstance(key, SampleKey):
            key = SampleKey(key, seed=key)
        return self.transform(self.load(key.index), torch.Generator().manual_seed(key.seed))


def _differences(train: Mapping[str, object], val: Mapping[str, object]) -> str:
    """Which classes only one of them has."""
    only = {"train": sorted(train.keys() - val.keys()), "val": sorted(val.keys() - train.keys())}
    return "; ".join(
        f"only {split} has {', '.join(names[:5])}{', ...' * (len(names) > 5)}" for split, names in only.items() if names
    )


def _found(split: str, folder: Path) -> dict[str, list[Path]]:
    """Class -> its images, both in the order of their names.

    Raises:
        DataError: there is no such folder, it has no folders of classes, or one without images.
    """
    if not folder.is_dir():
        raise DataError(
            f"the folder {folder} does not exist. data.root should hold {LAYOUT}; else set data.{split}=..."
        )
    classes = sorted(one for one in folder.iterdir() if one.is_dir())
    if not classes:
        loose = sum(_is_image(one) for one in folder.iterdir())
        raise DataError(f"{folder} holds {loose} images and no folders of classes: sort them into {LAYOUT}")
    found = {one.name: sorted(path for path in one.rglob("*") if _is_image(path)) for one in classes}
    if empty := [name for name, paths in found.items() if not paths]:
        raise DataError(
            f"{folder / empty[0]} holds no image ({', '.join(sorted(SUFFIXES))}); {len(empty)} of {len(found)} classes "
            "have none"
        )
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES
