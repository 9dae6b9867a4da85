from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detfamily.data.images import from_pil, from_pixels, read_image
from detfamily.errors import DataError

ORIENTATION = 0x0112


def picture(height: int = 21, width: int = 34) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x // width, 255 * y // height, 60 + 0 * x], axis=2).astype(np.uint8)


def shown(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.dtype == torch.uint8 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_is_what_viewers_show(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(picture()).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape[:2] == ((21, 34) if orientation < 5 else (34, 21))
    assert np.array_equal(shown(read_image(path, upright=True)), expected)
    with Image.open(path) as image:
        assert np.array_equal(shown(from_pil(image, upright=True)), expected)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_damaged_or_impossible_orientation_leaves_the_pixels_as_they_are(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 9
    for data in (exif.tobytes(), b"Exif\x00\x00MM\x00*\x00\x00\xff\xff", b"Exif\x00\x00junk"):
        Image.fromarray(picture()).save(tmp_path / f"a.{suffix}", exif=data)
        assert shown(read_image(tmp_path / f"a.{suffix}", upright=True)).shape == (21, 34, 3)


def sixteen_bits(width: int, height: int, channels: int, values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, byte by byte as its specification says."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = values.reshape(height, -1).astype(">u2")
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_scaled(tmp_path: Path, channels: int) -> None:
    values = np.linspace(0, 65535, 12 * 9 * channels).round().astype(np.uint16).reshape(9, 12, channels)
    (tmp_path / "deep.png").write_bytes(sixteen_bits(12, 9, channels, values))
    colors = values[..., :3] if channels >= 3 else values[..., :1].repeat(3, axis=2)
    found = shown(read_image(tmp_path / "deep.png"))
    assert found.shape == (9, 12, 3)
    # PIL keeps the upper byte of colors, which is less than one step away.
    assert np.abs(found - colors / 257).max() <= (0.5 if channels == 1 else 1)
    assert found[0, 0].max() <= 1 and found.max() >= 254


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_is_scaled(tmp_path: Path, order: str) -> None:
    values = np.linspace(0, 65535, 12 * 9).round().astype(np.uint16).reshape(9, 12)
    image = Image.frombytes("I;16" if order == "<" else "I;16B", (12, 9), values.astype(f"{order}u2").tobytes())
    image.save(tmp_path / "deep.tiff")
    found = shown(read_image(tmp_path / "deep.tiff"))
    assert np.array_equal(found, np.floor(values / 257 + 0.5)[..., None].astype(np.uint8).repeat(3, axis=2))
    assert np.array_equal(found, shown(from_pil(image)))
    assert np.array_equal(found, shown(from_pixels(values)))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_an_agreed_range_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 3), 7).save(tmp_path / "deep.tiff")
    with pytest.raises(DataError, match=r"deep.tiff: its pixels have 32 bits .*convert it to 8 or 16"):
        read_image(tmp_path / "deep.tiff")


def test_grey_alpha_and_palette(tmp_path: Path) -> None:
    rgb = picture()
    grey = rgb[..., 0]
    transparent = np.dstack([rgb, np.zeros((21, 34), np.uint8)])
    Image.fromarray(transparent).save(tmp_path / "clear.png")
    assert np.array_equal(shown(read_image(tmp_path / "clear.png")), rgb)
    Image.fromarray(np.dstack([grey, grey // 2])).save(tmp_path / "la.png")
    for image in (read_image(tmp_path / "la.png"), from_pixels(grey), from_pixels(grey[..., None])):
        assert np.array_equal(shown(image), grey[..., None].repeat(3, axis=2))
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(tmp_path / "palette.png", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = shown(read_image(tmp_path / "palette.png"))
    assert np.array_equal(found, np.asarray(palette.convert("RGB")))
    Image.new("1", (5, 4), 1).save(tmp_path / "bits.png")
    assert (shown(read_image(tmp_path / "bits.png")) == 255).all()


def test_cmyk_keeps_its_colors(tmp_path: Path) -> None:
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    found = shown(read_image(tmp_path / "print.jpg", upright=True)).astype(int)
    assert np.abs(found - picture()).mean() < 4


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff"])
def test_the_first_frame_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (9, 7), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:])
    found = shown(read_image(tmp_path / f"moving.{suffix}"))
    assert (found == (255, 0, 0)).all() and found.shape == (7, 9, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_what_is_cut_off_is_named_whatever_the_decoder_says(tmp_path: Path, kind: str, share: float) -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    data = file.getvalue()
    path = tmp_path / "half"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=rf"^{path} is (not an image|damaged or cut off)"):
        read_image(path)


def test_arrays_are_copied_whatever_their_order_and_flags() -> None:
    rgb = picture()
    rgb.setflags(write=False)
    ours = from_pixels(rgb[:, ::-1, ::-1])
    assert np.array_equal(shown(ours), rgb[:, ::-1, ::-1])
    ours.zero_()
    assert rgb.any()


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((4, 5, 3), np.float32), r"not float32; for values from 0 to 1: \(255"),
        (np.zeros((4, 5, 3), np.int64), "not int64"),
        (np.zeros((3, 4, 5), np.uint8), r"must be \(H, W\).*not \(3, 4, 5\)"),
        (np.zeros((2, 4, 5, 3), np.uint8), "several images go in a list"),
        (np.zeros((0, 5, 3), np.uint8), r"not \(0, 5, 3\)"),
    ],
)
def test_arrays_that_are_no_images_are_refused(pixels: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        from_pixels(pixels)
