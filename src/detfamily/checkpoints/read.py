"""Reading a file of weights without running anything that it may hold.

Checkpoints of PyTorch are pickles, and a pickle can name any function to be called when it is opened. Here only tensors
and plain containers are made, and ``argparse.Namespace``, in which the official code keeps its settings: a class that
does nothing but hold attributes. Everything else is refused, and named.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from detfamily.errors import CheckpointError

_WHAT_IT_IS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), words)
    for pattern, words in (
        (rb"version https://git-lfs", "is a pointer of git-lfs, not the file itself: fetch that with `git lfs pull`"),
        (
            rb"\s*(<!doctype|<html|<\?xml|<head)",
            "is a web page: the download ended at a login, a quota or an error page; open the link in a browser",
        ),
        (rb"\s*[{\[]\s*[\"{\[\]}]", "is json text, not weights: perhaps the error message of a server"),
        (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "is compressed: unpack it first"),
        (rb"\x89HDF", "is an HDF5 file (Keras); expected a file of PyTorch or safetensors"),
    )
)
"""Files that often pass for weights, by how they begin."""

_HARMLESS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(\w+Storage|Size|device|dtype|\w*float\w*|u?int\d+|bool)|torch\.storage\.\w+|"
    r"torch\.nn\.parameter\.Parameter|torch\._tensor\._rebuild_from_type_v2|collections\.(OrderedDict|Counter)|"
    r"argparse\.Namespace|_codecs\.encode"
)
"""What tensors and plain containers are made of; not worth naming when a file is refused."""

_HOSTILE = re.compile(
    r"(nt|posix|os|subprocess|socket|shutil|importlib|runpy|sys|pty|webbrowser|ctypes)\.|"
    r"_?io\.|(__builtin__|builtins)\.(eval|exec|compile|open|getattr|setattr|__import__|input|breakpoint)$"
)
"""What only a file that means harm names."""


def read_file(path: Path) -> Any:
    """What a file of weights holds, on the CPU: of ``torch.save`` (old and new format) or safetensors.

    Args:
        path: an existing file.

    Raises:
        CheckpointError: the file is empty, cut off, damaged or something else; or opening it would run code, which is
            named and was not run.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if not head:
        raise CheckpointError(f"{path} is empty: the download or the copy failed")
    for pattern, words in _WHAT_IT_IS:
        if pattern.match(head):
            raise CheckpointError(f"{path} {words}")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    return _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is cut off or damaged, or no safetensors file ({_first_line(error)})") from None
    return state


def _read_torch(path: Path) -> Any:
    try:
        # The permission ends with this block: nothing else in the process may open more than it did before.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from None
    except Exception as error:  # torch reports a broken file through half a dozen types
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript program, which holds code; expected the weights: a state dict"
            ) from None
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is cut off or damaged, or no file of PyTorch ({_first_line(error)})"
        ) from None


def _refusal(path: Path, error: Exception) -> str:
    """Say whether a pickle that was refused holds code, and which, or is no pickle at all."""
    wanted = sorted({name for name in _named_in(path) if not _HARMLESS.fullmatch(name)})
    if not wanted:
        return f"{path} ({path.stat().st_size} bytes) is cut off or damaged, or no file of PyTorch ({_reason(error)})"
    shown = ", ".join(wanted[:6]) + (f" and {len(wanted) - 6} more" if len(wanted) > 6 else "")
    text = (
        f"{path} was not opened: it holds more than tensors and plain containers, and opening it would run or make "
        f"{shown}. Nothing of it was run. "
    )
    if any(_HOSTILE.match(name) for name in wanted):
        return text + "No training code saves that: do not open this file with anything else either"
    return text + (
        "If you trust where it comes from, save its tensors alone where the code that wrote it is installed, "
        "torch.save({'model': model.state_dict()}, ...), and take that file"
    )


def _named_in(path: Path) -> set[str]:
    """The functions and classes that the pickles of a file name, read as text: nothing is imported or called."""
    found: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        with archive.open(name) as file:
                            found.update(_globals(file))
        else:
            with path.open("rb") as file:
                for _ in range(5):  # the old format: a number, a version, a system, the content, the storages' names
                    found.update(_globals(file))
    except Exception:  # what is cut off or no pickle ends here; what was named before that counts
        pass
    return found


def _globals(file: IO[bytes]) -> Iterator[str]:
    """What one pickle names, up to its end or to where it breaks."""
    texts: list[str] = []  # every text that was put on the stack, in order
    memo: dict[Any, str] = {}
    memoized = 0
    for code, argument, _ in pickletools.genops(file):
        if code.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif code.name == "STACK_GLOBAL" and len(texts) >= 2:
            yield f"{texts[-2]}.{texts[-1]}"
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            if argument in memo:
                texts.append(memo[argument])
        elif code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = memoized if argument is None else argument
            memoized += 1
            if texts:
                memo[place] = texts[-1]
        elif isinstance(argument, str):
            texts.append(argument)


def _reason(error: Exception) -> str:
    """The line of torch's long message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"(Unsupported|Trying|Invalid|pickle|WeightsUnpickler)", line)]
    return (telling or lines or [type(error).__name__])[0].rstrip(".")[:160]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].split(". ")[0].rstrip(".")[:160] if text else type(error).__name__
