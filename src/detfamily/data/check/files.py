"""Image files: whether they are there, and, decoded by several processes, what is in them."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from detfamily.data.check.annotations import Tables
from detfamily.data.check.findings import Findings
from detfamily.data.images import read_image
from detfamily.errors import DataError
from detfamily.structures import Size
from detfamily.tracking.console import ProgressBar

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2"))
"""What the names of image files end in, in lower case."""

FILES_PER_WORKER = 64
"""For fewer files another process is not worth its start."""

_BEGINNINGS = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_SCAN, _END = b"\xff\xda", b"\xff\xd9"


@dataclass(frozen=True)
class FileFacts:
    """What one file turned out to be.

    Attributes:
        problem: code of what is wrong with it; empty if it is fine.
        words: what is wrong, or nothing.
        size: (height, width) of the pixels as stored, None if there are none.
        turned: whether the EXIF orientation exchanges width and height.
        traits: codes of notices about it.
        digest: of its bytes; empty if it could not be read.
    """

    problem: str = ""
    words: str = ""
    size: Size | None = None
    turned: bool = False
    traits: tuple[str, ...] = ()
    digest: bytes = b""


def missing_files(folder: Path, names: Sequence[str]) -> list[int]:
    """Which of the file names are not there, by their index.

    Folders are listed once each, which on a network takes a fraction of asking for every file.
    """
    listed: dict[str, set[str]] = {}
    missing = []
    for at, name in enumerate(names):
        parent, base = os.path.split(os.path.join(folder, name))
        if parent not in listed:
            listed[parent] = _files_in(parent)
        if base not in listed[parent] and not os.path.isfile(os.path.join(parent, base)):
            missing.append(at)
    return missing


def unlisted_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Image files that lie beside those that are named, and are not named themselves; paths inside the folder."""
    known: dict[str, set[str]] = {}
    for name in names:
        parent, base = os.path.split(os.path.normpath(name))
        known.setdefault(parent, set()).add(base)
    return [
        os.path.join(parent, base)
        for parent, bases in sorted(known.items())
        for base in sorted(_files_in(os.path.join(folder, parent)) - bases)
        if os.path.splitext(base)[1].lower() in SUFFIXES
    ]


def look_for_files(tables: Tables, folder: Path, findings: Findings) -> list[int]:
    """Find out which files are there, without opening one; returns the rows of those that are."""
    images = tables.images
    missing = missing_files(folder, images.file_names)
    for at in missing:
        code, words = _why_missing(folder / images.file_names[at])
        words = f"image {images.ids[at]}: {words}"
        findings.add(code, words, file=images.file_names[at], image_id=images.ids[at])
    gone = set(missing)
    return [at for at in range(len(images.ids)) if at not in gone]


def decode_files(
    tables: Tables, folder: Path, rows: Sequence[int], findings: Findings, workers: int | None, label: str
) -> dict[int, FileFacts]:
    """Decode images, and compare them with what the annotation file says.

    Args:
        tables: the annotation file.
        folder: where the file names start.
        rows: which images.
        findings: takes what is wrong.
        workers: number of processes; 0 decodes in this one, None takes as many as there are cores.
        label: of the progress bar.

    Returns:
        row -> what the file is.
    """
    images = tables.images
    paths = [folder / images.file_names[at] for at in rows]
    facts = dict(zip(rows, inspect_files(paths, workers, label), strict=True))
    for at, one in facts.items():
        name, image_id = images.file_names[at], images.ids[at]
        height, width = images.sizes[at].tolist()
        if one.problem:
            findings.add(one.problem, f"image {image_id}: {one.words}", file=name, image_id=image_id)
        elif one.size != (height, width) and one.size is not None:
            words = (
                f"image {image_id}: {folder / name} is {one.size[1]}x{one.size[0]} pixels (width x height), but the "
                f"annotation file says {width}x{height}, so its boxes would be misplaced"
            )
            if one.turned and one.size == (width, height):
                words += ": they were drawn on the image turned upright by its EXIF orientation"
            findings.add("size-differs", words, file=name, image_id=image_id)
        for trait in one.traits:
            findings.add(trait, f"image {image_id}: {name}", file=name, image_id=image_id)
    return facts


def inspect_files(paths: Sequence[Path], workers: int | None, label: str) -> Iterator[FileFacts]:
    """What each file is, in order; see ``decode_files``.

    Raises:
        DataError: a process that decodes died.
    """
    number = _processes(len(paths), workers)
    with ProgressBar(label, len(paths)) as bar:
        if not number:
            for path in paths:
                yield inspect_file(path)
                bar.advance()
            return
        # A forked process starts at once; a fresh one would import torch first.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        context = multiprocessing.get_context(method)
        try:
            with ProcessPoolExecutor(number, mp_context=context, initializer=_start_worker) as pool:
                for facts in pool.map(inspect_file, paths, chunksize=16):
                    yield facts
                    bar.advance()
        except BrokenProcessPool:
            raise DataError(
                "a process that decodes images died, for want of memory or in a decoder; check.workers=0 decodes in "
                "this process, and then the last words of the progress bar tell how far it came"
            ) from None


def inspect_file(path: Path) -> FileFacts:
    """Read, decode and describe one image file; what is wrong with it is in the answer."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return FileFacts("file-unreadable", f"cannot read {path}: {error.strerror}")
    digest = hashlib.blake2b(data, digest_size=16).digest()
    if not data:
        return FileFacts("file-empty", f"{path} has 0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            height, width = read_image(path).shape[1:]
            _check_ends(data, path)
            turned, traits = _describe(data)
        except DataError as error:
            return FileFacts(_class_of(data), str(error), digest=digest)
    return FileFacts(size=(height, width), turned=turned, traits=traits, digest=digest)


def _check_ends(data: bytes, path: Path) -> None:
    """Find damage that decoders pass over: a JPEG without its end, a PNG whose check sums are wrong."""
    if data[:2] == _BEGINNINGS[0] and data.rfind(_END) < data.rfind(_SCAN):
        raise DataError(f"{path} is damaged or cut off: a JPEG without its end")
    if data[:4] == _BEGINNINGS[1]:
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.verify()
        except Exception as error:
            raise DataError(f"{path} is damaged or cut off: {error}") from None


def _class_of(data: bytes) -> str:
    """The kind of what cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return "pixels-32-bit" if image.mode in ("I", "F") else "file-damaged"
    except UnidentifiedImageError:
        return "file-damaged" if data.startswith(_BEGINNINGS) else "not-an-image"
    except Exception:  # decoders report damage through a dozen types
        return "file-damaged"


def _describe(data: bytes) -> tuple[bool, tuple[str, ...]]:
    """Whether EXIF exchanges width and height, and the codes of what is unusual about an image."""
    with Image.open(io.BytesIO(data)) as image:
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # a damaged EXIF block, which says nothing about the pixels
            orientation = 1
        deep = image.mode.startswith("I") or (data[:4] == _BEGINNINGS[1] and data[24] == 16)
        traits = {
            "grey": image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I"),
            "alpha": image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info,
            "deep": deep,
            "cmyk": image.mode == "CMYK",
            "rotated": orientation in range(2, 9),
            "frames": getattr(image, "n_frames", 1) > 1,
        }
        return orientation in range(5, 9), tuple(name for name, present in traits.items() if present)


def _why_missing(path: Path) -> tuple[str, str]:
    """The code and the words for a path that is no file."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "file-missing", f"{path} does not exist"
    except OSError as error:
        return "file-unreadable", f"cannot read {path}: {error.strerror}"
    kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
    return "file-unreadable", f"cannot read {path}: it is {kind}"


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def _processes(files: int, workers: int | None) -> int:
    """How many processes to start; 0 where this one does the work."""
    if workers is not None:
        return min(workers, files)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    number = min(cores, files // FILES_PER_WORKER)
    return number if number > 1 else 0


def _start_worker() -> None:
    """Ctrl-C is for the main process to answer; the workers share the cores, so each takes one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
