"""Which code computes the op on which device: compiled code where there is some, else plain PyTorch.

A compiled library adds kernels for one device to the ops that ``registration`` defines. The first call on a device
loads it: the one that came with the wheel, or one that is compiled just in time. Whatever is missing is said once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from detfamily.errors import ConfigError, nearest
from detfamily.ops import build
from detfamily.ops.build import Kind

VARIABLE = "DETFAMILY_OP_BACKEND"
REFERENCE = "reference"
BACKENDS = (REFERENCE, *build.KINDS)

SHIPPED = Path(__file__).parent
"""Where the libraries of a wheel lie."""

LEAST_CAPABILITY = (8, 0)
COST = {"cpu": "about 10 times slower", "cuda": "about 5 times slower"}
"""What plain PyTorch costs, forward and backward, in an encoder."""

ISA_WORDS = {"baseline": "no vector extensions", "avx2": "AVX2", "avx512": "AVX-512"}


@dataclass(frozen=True)
class Library:
    """What became of the search for a library.

    Attributes:
        path: where it was loaded from; None where there is none.
        origin: how it came there.
        reason: why there is none, and what would help.
    """

    path: Path | None = None
    origin: str = ""
    reason: str = ""


@dataclass
class _State:
    """What this process has found so far."""

    libraries: dict[Kind, Library] = field(default_factory=dict)
    chosen: dict[tuple[str, str | None], str] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)


_state = _State()
# A global of its own, not a part of the state: compiled code is guarded by it, and notices that it has changed.
_wish: str | None = os.environ.get(VARIABLE) or None
_wish_by: str = f"{VARIABLE}={_wish}"


def backend_for(device_type: str) -> str:
    """The backend that computes the op for tensors of a device: ``reference``, ``cpu`` or ``cuda``.

    The first call for a device looks for its library and loads it; where there is none, it warns once that plain
    PyTorch is used instead, why, and what that costs. While a graph is captured the answer is a constant of it.

    Args:
        device_type: ``tensor.device.type``.

    Raises:
        ConfigError: DETFAMILY_OP_BACKEND or ``use_backend`` asks for what does not exist, cannot be had, or cannot
            serve this device.
    """
    if torch.compiler.is_compiling():
        return _as_constant(device_type, _wish)
    chosen = _state.chosen.get((device_type, _wish))
    return _resolve(device_type, _wish) if chosen is None else chosen


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend for the calls inside, in this process; None chooses as if nothing were forced.

    Raises:
        ConfigError: there is no backend of that name.
    """
    global _wish, _wish_by
    by = f"use_backend({name!r})"
    if name is not None:
        _check_name(name, by)
    before = _wish, _wish_by
    _wish, _wish_by = name, by
    try:
        yield
    finally:
        _wish, _wish_by = before


def describe(device_type: str) -> str:
    """One line about what ``backend_for`` chooses for a device, and why.

    Raises:
        ConfigError: as for ``backend_for``.
    """
    backend = backend_for(device_type)
    if backend == REFERENCE:
        if _wish == REFERENCE:
            return f"plain PyTorch, as {_wish_by} asks for"
        return f"plain PyTorch: {_reason(device_type)}"
    library = _state.libraries[device_type]  # type: ignore[index]
    assert library.path is not None
    return f"{_kind_words(device_type, library.path)}, {library.origin}"


def library(kind: Kind) -> Library:
    """The library of a kind, searched for and loaded at the first call; never tried twice in a process."""
    with _state.lock:
        if kind not in _state.libraries:
            _state.libraries[kind] = _find(kind)
        return _state.libraries[kind]


# -- the choice -------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _as_constant(device_type: str, wish: str | None) -> str:
    return _resolve(device_type, wish)


def _resolve(device_type: str, wish: str | None) -> str:
    with _state.lock:
        key = device_type, wish
        if key not in _state.chosen:
            _state.chosen[key] = _choose(device_type, wish)
        backend = _state.chosen[key]
    if backend == REFERENCE and wish is None and device_type != "meta":
        _warn(device_type)
    return backend


def _choose(device_type: str, wish: str | None) -> str:
    if wish is not None:
        _check_name(wish, _wish_by)
    if device_type == "meta" or wish == REFERENCE:  # a meta tensor has no numbers: any backend would do
        return REFERENCE
    if wish is None:
        return REFERENCE if _reason(device_type) else device_type
    if wish != device_type:
        raise ConfigError(
            f"{_wish_by} cannot serve tensors on {device_type}: expected {REFERENCE!r}"
            + (f" or {device_type!r}" if device_type in BACKENDS else "")
            + ", or no backend forced"
        )
    if reason := _reason(wish):
        raise ConfigError(f"{_wish_by} asks for compiled code that is not there: {reason}")
    return wish


def _check_name(name: str, by: str) -> None:
    if name not in BACKENDS:
        raise ConfigError(f"{by}: there is no backend {name!r}: {nearest(name, BACKENDS)}")


def _reason(device_type: str) -> str:
    """Why compiled code does not serve a device; empty where it does."""
    for kind in build.KINDS:
        if kind == device_type:
            return library(kind).reason
    return f"there is no compiled code for {device_type}"


def _warn(device_type: str) -> None:
    """Say once in this process, and in one process of a machine, that and why the op is slow."""
    if device_type in _state.warned:
        return
    _state.warned.add(device_type)
    if _speaks():
        cost = COST.get(device_type, "slower")
        warnings.warn(
            f"multi-scale deformable attention on {device_type} runs in plain PyTorch, {cost} and with several times "
            f"the memory: {_reason(device_type)} (detfamily doctor shows more)",
            RuntimeWarning,
            stacklevel=2,
        )


def _speaks() -> bool:
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


# -- the search -------------------------------------------------------------------------------------------------------


def _find(kind: Kind) -> Library:
    """Load what the wheel brought, else what is compiled here."""
    capabilities = _capabilities() if kind == "cuda" else []
    if kind == "cuda" and (obstacle := _cuda_obstacle(capabilities)):
        return Library(reason=obstacle)
    reasons = []
    shipped = SHIPPED / build.library_name(kind)
    if shipped.is_file():
        reason = _unfit(shipped, capabilities) or _load(shipped)
        if not reason:
            return Library(shipped, "from the wheel")
        reasons.append(f"the wheel's library does not fit ({reason})")
    try:
        archs = sorted({f"{major}{minor}" for major, minor in capabilities}, key=int)
        path = build.cached(kind, archs, torch=Path(torch.__file__).parent, say=_say)
        reason = _unfit(path, capabilities) or _load(path)
    except build.BuildError as error:
        reason = str(error)
    if not reason:
        return Library(path, f"built here by {build.record_of(path).get('compiler', 'another machine')}")
    return Library(reason=", and ".join([*reasons, reason]))


def _capabilities() -> list[tuple[int, int]]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())]


def _cuda_obstacle(capabilities: Sequence[tuple[int, int]]) -> str:
    """What no library can help against."""
    if torch.version.hip:
        return "this PyTorch is built for AMD GPUs, and the op's kernels are for NVIDIA's"
    if not capabilities:
        return "PyTorch finds no GPU" if torch.version.cuda else "this PyTorch is built without CUDA"
    oldest = min(capabilities)
    if oldest < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(capabilities.index(oldest))
        return (
            f"{name} has compute capability {oldest[0]}.{oldest[1]}, and 8.0 is needed; "
            "if another GPU is meant, hide this one with CUDA_VISIBLE_DEVICES"
        )
    return ""


def _unfit(path: Path, capabilities: Sequence[tuple[int, int]]) -> str:
    """Why a CUDA library cannot run on these GPUs: no code for one of them, or a driver older than its CUDA."""
    record = build.record_of(path)
    archs = " ".join(map(str, record.get("archs") or []))  # type: ignore[call-overload]
    for capability in capabilities:
        if archs and not build.serves(archs, capability):
            return f"it has no code for compute capability {capability[0]}.{capability[1]}"
    needed, driver = build.cuda_major(str(record.get("compiler", ""))), driver_version() if capabilities else 0
    if driver and needed > driver // 1000:
        return f"it needs a driver for CUDA {needed}, and the one here is for CUDA {driver // 1000}; update the driver"
    return ""


def driver_version() -> int:
    """The newest CUDA that NVIDIA's driver serves, 13000 for 13.0; 0 where that cannot be found out.

    PyTorch has a function for it in some builds only.
    """
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _load(path: Path) -> str:
    """Load a library; returns why that fails."""
    try:
        torch.ops.load_library(path)
    except Exception as error:  # whatever the linker, or a registration, has to say
        return f"{path} cannot be loaded: {str(error).strip().splitlines()[0]}"
    return ""


def _say(text: str) -> None:
    if _speaks():
        print(f"detfamily: {text}", file=sys.stderr, flush=True)


def _kind_words(device_type: str, path: Path) -> str:
    if device_type == "cuda":
        return "compiled for this GPU"
    return f"compiled for this CPU ({ISA_WORDS.get(_isa(path), _isa(path))})"


def _isa(path: Path) -> str:
    """The instruction set that the library chose; it is loaded already."""
    function = ctypes.CDLL(str(path)).detfamily_cpu_isa
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()
