"""From image files and pictures in memory to uint8 RGB: the one reader of training, evaluation and prediction.

What becomes of the odd ones:

- grey, palette, CMYK: converted to RGB;
- alpha: left out, not blended with any background, as in the official training;
- 16 bits: all 65536 values are scaled to 0..255; 32-bit pixels have no agreed range and are refused;
- several frames or pages: the first;
- an orientation in the EXIF data: as the caller says. COCO's boxes refer to the pixels as stored, people look at
  the upright image.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from detfamily.errors import DataError

_JPEG = b"\xff\xd8"
_GREY_OF_16_BITS_AS_INTEGERS = ("PNG", "PPM")
"""Formats whose 16-bit grey PIL gives as 32-bit integers, depending on its version."""


def read_image(path: Path, upright: bool = False) -> Tensor:
    """(3, H, W) uint8 RGB of an image file.

    torchvision decodes JPEG; PIL does all else, and the JPEGs that torchvision refuses.

    Args:
        path: the file.
        upright: turn and mirror the pixels as an orientation in the EXIF data says, as viewers do; by default it is
            ignored, as in the official pipeline.

    Raises:
        DataError: the file is missing, no image, cut off, or of pixels without an agreed range.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not data.size:
        raise DataError(f"{path} is not an image: the file is empty (0 bytes)")
    if data[:2].tobytes() == _JPEG:
        try:
            return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB, apply_exif_orientation=upright)
        except RuntimeError:
            pass  # PIL knows more kinds, and says better what is wrong
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            return from_pil(image, upright)
    except UnidentifiedImageError:
        raise DataError(f"{path} is not an image, or its beginning is damaged") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # PIL's decoders report damage through a dozen types
        raise DataError(f"{path} is damaged or cut off: {error or type(error).__name__}") from None


def from_pil(image: Image.Image, upright: bool = False) -> Tensor:
    """(3, H, W) uint8 RGB of a picture that PIL holds; ``upright`` as for ``read_image``.

    Raises:
        DataError: its pixels have 32 bits.
    """
    kind = image.format  # a turned copy has none
    image = _turned(image) if upright else image
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in _GREY_OF_16_BITS_AS_INTEGERS):
        return from_pixels(np.asarray(image).astype(np.uint16))
    if image.mode in ("I", "F"):
        raise DataError(
            f"its pixels have 32 bits (mode {image.mode!r}), whose range nobody has agreed on: convert it to 8 or 16"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL wants this step for palettes with transparent colors
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def from_pixels(pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> Tensor:
    """(3, H, W) uint8 RGB of an array of RGB, grey or RGBA pixels.

    Args:
        pixels: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or uint16; the alpha of (H, W, 4) is left out.

    Raises:
        DataError: another shape or type, or no pixels.
    """
    if pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"an image array must hold uint8 values 0..255 (or uint16), not {pixels.dtype}; for values from 0 to 1: "
            "(255 * pixels).round().astype('uint8')"
        )
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or pixels.size == 0:
        raise DataError(
            f"an image array must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), not {tuple(pixels.shape)}"
            + ("; several images go in a list" if pixels.ndim == 4 else "")
        )
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257, rounded
    rgb = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]
    return torch.from_numpy(np.array(rgb, order="C")).permute(2, 0, 1)  # a copy: arrays may be read-only or mirrored


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError):
        raise  # the pixels themselves are broken
    except Exception:  # a damaged EXIF block fails in many ways, and says nothing about the pixels
        return image
