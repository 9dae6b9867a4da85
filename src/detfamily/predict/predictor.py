"""A trained detector for use: images in, boxes in pixels with names out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detfamily.data.batches import collate
from detfamily.data.images import from_pil, from_pixels, read_image
from detfamily.data.labels import LabelMap
from detfamily.data.transforms import Sample, Transform
from detfamily.detector import Detector
from detfamily.engine.evaluate import Postprocess, detect
from detfamily.engine.runtime import Runtime
from detfamily.errors import ConfigError, DataError, DetfamilyError, NonFiniteError
from detfamily.predict.prepare import Preparation, prepare
from detfamily.predict.restore import as_sample, restore
from detfamily.structures import Detections, Size
from detfamily.visualize.boxes import draw_boxes

ImageLike: TypeAlias = "str | Path | Image.Image | np.ndarray[Any, Any] | Tensor"
"""A path, a PIL image, an array (H, W, 3) or (H, W) of uint8, or a tensor (3, H, W) of uint8; RGB."""

_WINDOW = 4
"""Batches' worth of images that are read ahead to find some of one size."""


@dataclass(frozen=True)
class Prediction:
    """What is found in one image, best first.

    Attributes:
        boxes: (N, 4) float32, x1, y1, x2, y2 in pixels of the upright image. As detectors of this line say them: a box
            of an object at the edge may reach out of the image a little (see ``clipped``).
        scores: (N,) float32 in (0, 1).
        labels: (N,) int64, keys of ``Predictor.names``.
        names: the class of each box.
        size: (height, width) of the upright image in pixels.
        best_score: the highest score of all, also if it is below the threshold; 0 where nothing was found at all.
        source: the path, where the image came from one.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: tuple[str, ...]
    size: Size
    best_score: float
    source: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def clipped(self) -> Prediction:
        """The same with boxes clipped to the image, for cutting objects out."""
        height, width = self.size
        limits = torch.tensor((width, height, width, height), dtype=self.boxes.dtype)
        return replace(self, boxes=torch.minimum(self.boxes.clamp(min=0), limits))

    def draw(self, image: ImageLike | None = None) -> Image.Image:
        """The boxes with names and scores on a copy of the image.

        Args:
            image: the one that this is about; needed only if it did not come from a file.

        Raises:
            DataError: the image is missing, broken, or of another size.
        """
        if image is None and self.source is None:
            raise DataError("a prediction keeps no pixels: pass the image to draw on")
        pixels = to_pixels(self.source if image is None else image)
        if tuple(pixels.shape[1:]) != self.size:
            raise DataError(
                f"this prediction is about an image of {self.size[1]}x{self.size[0]} pixels (width x height), the one "
                f"to draw on has {pixels.shape[2]}x{pixels.shape[1]}"
            )
        return draw_boxes(pixels, self.boxes, self.labels, _by_label(self), self.scores)


@dataclass(frozen=True)
class Outcome:
    """What became of one image of a stream: a prediction, or an error that the other images do not mind.

    Attributes:
        pixels: (3, H, W) uint8, the upright image; None if it could not be read.
        prediction: None after an error.
        error: None if all went well.
    """

    pixels: Tensor | None = None
    prediction: Prediction | None = None
    error: DetfamilyError | None = None


@dataclass
class Predictor:
    """A detector that is ready to be used; ``load`` makes one from a checkpoint.

    It never pads: images are computed together only if they are of one size, so that what is found in an image does
    not depend on the images beside it.

    Attributes:
        detector: prepared for inference, on its device.
        postprocess: predictions -> detections.
        transform: the test-time transform of the training.
        label_map: columns of the class head and their names.
        runtime: says the precision.
        device: where the detector is.
        threshold: least score of what is given to the user.
        max_detections: the most boxes of one image, the best ones; None for all.
        batch_size: the most images computed at once.
        preparation: what was folded and dropped.
    """

    detector: Detector
    postprocess: Postprocess
    transform: Transform
    label_map: LabelMap
    runtime: Runtime
    device: torch.device
    threshold: float = 0.5
    max_detections: int | None = None
    batch_size: int = 1
    preparation: Preparation | None = None
    names: dict[int, str] = field(init=False)
    """Label -> class name."""

    def __post_init__(self) -> None:
        self.threshold = _checked_threshold(self.threshold)
        for name, value in (("max_detections", self.max_detections), ("batch_size", self.batch_size)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and (name == "batch_size" or value is not None):
                raise ConfigError(f"{name}={value!r}: expected a whole number of 1 or more")
        self.names = self.label_map.by_label()

    @overload
    def predict(  # type: ignore[overload-overlap]  # a path, an array and a tensor are iterable, too
        self, images: ImageLike, threshold: float | None = None
    ) -> Prediction: ...

    @overload
    def predict(self, images: Iterable[ImageLike], threshold: float | None = None) -> list[Prediction]: ...

    def predict(
        self, images: ImageLike | Iterable[ImageLike], threshold: float | None = None
    ) -> Prediction | list[Prediction]:
        """Find the objects of one image, or of several of any sizes.

        Args:
            images: one image or several (see ``ImageLike``). Files and PIL images are turned upright as their EXIF data
                say. An array or a tensor with one axis more is a batch.
            threshold: for this call instead of the predictor's own; 0 gives everything that the detector says.

        Returns:
            A prediction for one image, a list of them for several, in their order.

        Raises:
            DataError: a file that is missing or broken, or something that is no image; says which.
            NonFiniteError: the detector gives NaN or infinity.
        """
        single = _is_one(images)
        found = []
        several = cast("Iterable[ImageLike]", [images] if single else images)
        for index, outcome in enumerate(self.stream(several, threshold)):
            if outcome.error is not None:
                raise outcome.error if single else type(outcome.error)(f"images[{index}]: {outcome.error}")
            assert outcome.prediction is not None
            found.append(outcome.prediction)
        return found[0] if single else found

    def stream(self, images: Iterable[ImageLike], threshold: float | None = None) -> Iterator[Outcome]:
        """As ``predict``, but image by image as they are done, in order, and an error of one is given in its place.

        Only a few images are in memory at a time.
        """
        threshold = self.threshold if threshold is None else _checked_threshold(threshold)
        if isinstance(images, Iterable):
            return self._stream(iter(images), threshold)
        raise DataError(f"an image is a path, a PIL image, an array or a tensor, not a {type(images).__name__}")

    def _stream(self, images: Iterator[ImageLike], threshold: float) -> Iterator[Outcome]:
        ahead = self.batch_size * _WINDOW if self.batch_size > 1 else 1
        while window := list(islice(images, ahead)):
            read = [_read(one) for one in window]
            pixels = {at: one.pixels for at, one in enumerate(read) if one.pixels is not None}
            samples = {at: as_sample(one, self.transform) for at, one in pixels.items()}
            found: dict[int, Detections | DetfamilyError] = {}
            for places in _of_one_size(samples, self.batch_size):
                found |= dict(zip(places, self._detect([samples[at] for at in places]), strict=True))
            for at, (image, outcome) in enumerate(zip(window, read, strict=True)):
                yield self._outcome(image, outcome, found[at], threshold) if at in found else outcome

    def _detect(self, samples: Sequence[Sample]) -> Sequence[Detections | DetfamilyError]:
        images = collate(samples).images
        height, width = images.sizes[0]
        try:
            return [one.cpu() for one in detect(self.detector, self.postprocess, images.to(self.device), self.runtime)]
        except torch.OutOfMemoryError:
            error: DetfamilyError = ConfigError(
                f"{len(samples)} images of {width}x{height} pixels at once are too much for the memory of "
                f"{self.device}: lower batch_size, or the size with overrides such as augmentation.test_short_side"
            )
        except ValueError as refusal:  # too small an image for that many proposals
            error = DataError(f"the detector refuses an image of {width}x{height} pixels: {refusal}")
        return [error] * len(samples)

    def _outcome(
        self, image: ImageLike, outcome: Outcome, found: Detections | DetfamilyError, threshold: float
    ) -> Outcome:
        source = str(image) if isinstance(image, (str, Path)) else None
        if isinstance(found, DetfamilyError):
            return Outcome(error=type(found)(f"{source}: {found}" if source else str(found)))
        if not (found.scores.isfinite().all() and found.boxes_xyxy.isfinite().all()):
            where = f" for {source}" if source else ""
            return Outcome(error=NonFiniteError(f"the detector gives NaN or infinity{where}: its weights are spoilt"))
        assert outcome.pixels is not None
        height, width = outcome.pixels.shape[1:]
        return replace(outcome, prediction=self._prediction(found, (height, width), threshold, source))

    def _prediction(self, found: Detections, size: Size, threshold: float, source: str | None) -> Prediction:
        named = torch.tensor([label in self.names for label in range(self.label_map.num_classes)])[found.labels]
        best = float(found.scores[named].max()) if named.any() else 0.0
        kept = (named & (found.scores >= threshold)).nonzero()[:, 0]
        kept = kept[found.scores[kept].argsort(descending=True, stable=True)][: self.max_detections]
        labels = found.labels[kept]
        names = tuple(self.names[int(label)] for label in labels)
        return Prediction(found.boxes_xyxy[kept].float(), found.scores[kept], labels, names, size, best, source)


def load(
    checkpoint: str | Path,
    device: str | torch.device | None = None,
    threshold: float = 0.5,
    max_detections: int | None = None,
    batch_size: int = 1,
    overrides: Sequence[str] = (),
) -> Predictor:
    """Load a trained detector for use. The checkpoint knows its config, its labels and its test-time transform.

    Args:
        checkpoint: a file that training left, such as ``runs/NAME/best.pt``; averaged weights are taken if it has some.
        device: "cpu", "cuda", "cuda:1", ...; an accelerator where there is one if None.
        threshold: least score of what is given back.
        max_detections: the most boxes of one image, the best ones; None for all.
        batch_size: the most images computed at once; only images of one size are.
        overrides: of settings in the checkpoint's config, as on the command line.

    Raises:
        CheckpointError: the checkpoint is missing, broken, or does not fit its model.
        ConfigError: a setting that does not exist, or a device that is not there.
    """
    restored = restore(checkpoint, device, overrides)
    detector, postprocess = restored.detector, restored.postprocess
    preparation = prepare(detector, int(restored.cfg.postprocess.layer))
    postprocess.layer = -1  # type: ignore[assignment]  # the only one that is left
    return Predictor(
        detector=detector.to(restored.device),
        postprocess=postprocess,
        transform=restored.transform,
        label_map=restored.label_map,
        runtime=restored.runtime,
        device=restored.device,
        threshold=threshold,
        max_detections=max_detections,
        batch_size=batch_size,
        preparation=preparation,
    )


def to_pixels(image: Any) -> Tensor:
    """(3, H, W) uint8 RGB on the CPU, upright.

    Raises:
        DataError: a file that is missing or broken, or something that is no image.
    """
    if isinstance(image, (str, Path)):
        path = Path(image).expanduser()
        if path.is_dir():
            raise DataError(f"{path} is a folder: pass detfamily.find_images({str(path)!r}).paths")
        return read_image(path, upright=True)
    if isinstance(image, Image.Image):
        return from_pil(image, upright=True)
    if isinstance(image, np.ndarray):
        return from_pixels(image)
    if not isinstance(image, Tensor):
        raise DataError(f"an image is a path, a PIL image, an array or a tensor, not a {type(image).__name__}")
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        raise DataError(
            f"an image tensor must be (3, H, W) uint8, not {tuple(image.shape)} {image.dtype}; for values from 0 to 1: "
            "(255 * image).round().to(torch.uint8)"
        )
    return from_pixels(image.detach().cpu().permute(1, 2, 0).numpy())


def _is_one(images: Any) -> bool:
    return isinstance(images, (str, Path, Image.Image)) or (
        isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4
    )


def _read(image: ImageLike) -> Outcome:
    try:
        return Outcome(to_pixels(image))
    except DetfamilyError as error:
        return Outcome(error=error)


def _of_one_size(samples: dict[int, Sample], most: int) -> Iterator[list[int]]:
    """Places of samples of one size, no more than that many together."""
    groups: dict[Size, list[int]] = {}
    for at, sample in samples.items():
        groups.setdefault(sample.size, []).append(at)
    for places in groups.values():
        yield from (places[first : first + most] for first in range(0, len(places), most))


def _by_label(prediction: Prediction) -> dict[int, str]:
    return dict(zip(prediction.labels.tolist(), prediction.names, strict=True))


def _checked_threshold(threshold: Any) -> float:
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold <= 1:
        raise ConfigError(f"threshold={threshold!r}: expected a score between 0 (everything) and 1")
    return float(threshold)
