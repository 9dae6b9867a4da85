"""How the op's C++ and CUDA sources become shared libraries: at once for a wheel, or just in time into a cache.

Knows neither detfamily nor torch, so that a wheel can be built without importing them. One library serves every
torch >= 2.11 on any device of its kind: it uses LibTorch's stable interface, and links to ``libtorch_cpu`` alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["cpu", "cuda"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SOURCES = Path(__file__).parent / "csrc"
SUFFIXES = {"cpu": (".cpp", ".h"), "cuda": (".cu", ".cuh", ".h")}

MINIMUM_TORCH = (2, 11)
WHEEL_ARCHS = ("80", "86", "89", "90", "100", "120+PTX")
"""GPUs that a wheel has machine code for; newer ones translate the last one's PTX when they first run it."""

ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ),
}
"""Instruction sets that the CPU kernels are compiled for; the library picks one when it runs."""

COMMON_FLAGS = ("-std=c++20", "-O3", f"-DTORCH_TARGET_VERSION=0x{MINIMUM_TORCH[0]:02x}{MINIMUM_TORCH[1]:02x}{0:012x}")
KERNEL_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")

STALE_SECONDS = 3600
"""After that time, what a killed process left half built is thrown away."""


class BuildError(RuntimeError):
    """A library cannot be built here; the message says why, and what would help."""


class MissingError(BuildError):
    """A compiler, or torch, is missing: nothing has been tried."""


@dataclass(frozen=True)
class Tools:
    """What a library is built with.

    Attributes:
        kind: of the library.
        compiler: the words that start the compiler.
        version: what the compiler, and the one beneath it, say that they are.
        torch: the folder of the torch package.
        supported: the GPU architectures that nvcc knows, ascending; none for the CPU.
    """

    kind: Kind
    compiler: tuple[str, ...]
    version: str
    torch: Path
    supported: tuple[int, ...] = ()


def library_name(kind: Kind) -> str:
    """The file name of a library; the same beside the package in a wheel as in the cache."""
    return f"libdetfamily_{kind}.so"


def record_of(library: Path) -> dict[str, object]:
    """What was written down when a library was built: compiler, torch, archs; empty where there is nothing to read."""
    try:
        record = json.loads(library.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def build(
    kind: Kind,
    folder: Path,
    archs: Sequence[str] = WHEEL_ARCHS,
    sources: Path = SOURCES,
    torch: Path | None = None,
) -> Path:
    """Compile one library into a folder, with its record (a json file) and the compiler's output beside it.

    Args:
        kind: ``cpu`` or ``cuda``.
        folder: where the library goes; made where it is missing.
        archs: GPU architectures, ``80`` for machine code and ``80+PTX`` for code to be translated, too; those that
            nvcc does not know are replaced by PTX of the next older one.
        sources: the folder of the C++ and CUDA files.
        torch: the folder of the torch package whose headers are used; searched for by default.

    Raises:
        MissingError: no compiler, or no torch.
        BuildError: another system than Linux, or the compiler fails; names its first error and where its output lies.
    """
    tools = find_tools(kind, torch)
    folder.mkdir(parents=True, exist_ok=True)
    return _compile(tools, folder, archs, sources)


def cached(
    kind: Kind,
    archs: Sequence[str] = WHEEL_ARCHS,
    sources: Path = SOURCES,
    torch: Path | None = None,
    say: Callable[[str], object] | None = None,
) -> Path:
    """The library from the cache, compiled first where it is not there yet.

    Several processes may ask at once: one compiles, the others wait for it. What a killed one leaves behind is neither
    used nor in the way.

    Args:
        kind: ``cpu`` or ``cuda``.
        archs: as for ``build``.
        sources: as for ``build``.
        torch: as for ``build``.
        say: told what is about to be compiled, where that is needed.

    Raises:
        MissingError: as for ``build``.
        BuildError: as for ``build``; or the cache cannot be written.
    """
    root = cache_folder()
    torch = find_torch() if torch is None else torch
    wanted = f"{kind}-{_hash(_what_matters(kind, archs, sources, torch))}"
    try:
        tools = find_tools(kind, torch)
    except MissingError:
        # A machine with a compiler may have built it in a home folder that is shared.
        built = sorted(root.glob(f"{wanted}-*/{library_name(kind)}"), key=lambda file: file.stat().st_mtime)
        if not built:
            raise
        return built[-1]
    home = root / f"{wanted}-{_hash(tools.version, *_gencode(tools.supported, archs))[:8]}"
    library = home / library_name(kind)
    if not library.is_file():
        try:
            root.mkdir(parents=True, exist_ok=True)
            _build_once(tools, home, archs, sources, say)
        except OSError as error:
            raise BuildError(
                f"cannot write to the cache folder {root} ({error.strerror or error}); "
                "set DETFAMILY_CACHE to a folder that can be written"
            ) from error
    return library


def cache_folder() -> Path:
    """Where libraries built just in time are kept.

    Raises:
        BuildError: there is no home folder, and no variable names another.
    """
    for variable, below in (("DETFAMILY_CACHE", "ops"), ("XDG_CACHE_HOME", "detfamily/ops")):
        if named := os.environ.get(variable):
            return Path(named).expanduser().absolute() / below
    try:
        return Path.home() / ".cache/detfamily/ops"
    except RuntimeError:
        raise BuildError("there is no home folder for the cache; set DETFAMILY_CACHE to a folder") from None


def serves(gencode: str, capability: tuple[int, int]) -> bool:
    """Whether code made with these flags runs on a GPU: machine code of its major version, or PTX, no newer."""
    machine = [divmod(int(number), 10) for number in re.findall(r"code=sm_(\d+)", gencode)]
    ptx = [divmod(int(number), 10) for number in re.findall(r"code=compute_(\d+)", gencode)]
    same = any(one[0] == capability[0] and one <= capability for one in machine)
    return same or any(one <= capability for one in ptx)


def cuda_major(compiler: str) -> int:
    """The CUDA version, such as 13, in what a record says of the compiler; 0 where it is not said."""
    found = re.search(r"nvcc (\d+)", compiler)
    return int(found[1]) if found else 0


# -- the tools --------------------------------------------------------------------------------------------------------


def find_tools(kind: Kind, torch: Path | None = None) -> Tools:
    """The compiler and torch.

    Raises:
        MissingError: one of them is not there, with the names that were searched for.
        BuildError: another system than Linux, or a torch without the headers that are needed.
    """
    compiler, *beneath = find_compiler(kind)
    torch = find_torch() if torch is None else torch
    torch_version(torch)
    if kind == "cpu":
        return Tools(kind, compiler, _version(compiler), torch)
    nvcc, cxx = compiler[0], beneath[0]
    supported = sorted({int(number) for number in re.findall(r"compute_(\d+)", _output([nvcc, "--list-gpu-arch"]))})
    return Tools(kind, compiler, f"{_version((nvcc,))}, {_version(cxx)}", torch, tuple(supported))


def find_compiler(kind: Kind) -> list[tuple[str, ...]]:
    """The words that start the compiler, and those of the C++ compiler beneath it, if that is another.

    Raises:
        MissingError: one of them is not there, with the names that were searched for.
        BuildError: another system than Linux.
    """
    if sys.platform != "linux":
        raise BuildError(f"compiled code is for Linux only, and this is {platform.system() or sys.platform}")
    if kind == "cpu":
        return [_find_cxx()]
    nvcc, cxx = _find_nvcc(), _find_cxx()
    # Told to nvcc, which would take the PATH's; a launcher such as ccache cannot be.
    return [(nvcc, "-ccbin", [word for word in cxx if not word.startswith("-")][-1]), cxx]


def find_torch() -> Path:
    """The folder of the torch package of this Python, without importing it.

    Inside pip's isolated build, this is the torch of the environment that is being installed into.

    Raises:
        MissingError: there is none.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    installed = Path(sysconfig.get_path("purelib")) / "torch"
    if not (installed / "version.py").is_file():
        raise MissingError("torch is not installed")
    return installed


def torch_version(torch: Path) -> str:
    """The version of a torch package.

    Raises:
        BuildError: it is too old, or has no headers.
    """
    try:
        found = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text(encoding="utf-8"))
    except OSError:
        found = None
    version = found[1] if found else "of an unknown version"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    headers = torch / "include/torch/csrc/stable/library.h"
    if numbers is None or (int(numbers[1]), int(numbers[2])) < MINIMUM_TORCH or not headers.is_file():
        wanted = ".".join(map(str, MINIMUM_TORCH))
        raise BuildError(f"torch {version} at {torch} has not the headers that are needed; install torch >= {wanted}")
    return version


def _find_cxx() -> tuple[str, ...]:
    if named := os.environ.get("CXX"):
        words = tuple(shlex.split(named))
        if not words or not shutil.which(words[0]):
            raise MissingError(f"no C++ compiler: CXX names {named!r}, which is not there")
        return words
    for name in ("g++", "c++", "clang++"):
        if found := shutil.which(name):
            return (found,)
    raise MissingError("no C++ compiler (looked for $CXX, g++, c++ and clang++); install g++")


def _find_nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME"), "PATH", "/usr/local/cuda"]
    for home in filter(None, homes):
        if found := shutil.which("nvcc") if home == "PATH" else shutil.which(f"{home}/bin/nvcc"):
            return found
    raise MissingError("no nvcc (looked in $CUDA_HOME, PATH and /usr/local/cuda); install the CUDA toolkit")


def _version(compiler: Sequence[str]) -> str:
    """``g++ (Debian 12.2.0-14) 12.2.0`` or ``nvcc 13.0.88``."""
    printed = _output([*compiler, "--version"]).strip()
    nvcc = re.search(r"V(\d[\d.]*)", printed) if "nvcc" in compiler[0] else None
    return f"nvcc {nvcc[1]}" if nvcc else printed.partition("\n")[0]


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=_environment()).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingError(f"{shlex.join(command)} does not run: {getattr(error, 'stderr', None) or error}") from error


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}  # errors are looked for in English


# -- the commands -----------------------------------------------------------------------------------------------------


def parse_archs(text: str) -> tuple[str, ...]:
    """``80,9.0;120+PTX`` as a tuple in the form that ``build`` takes.

    Raises:
        ValueError: what is no architecture.
    """
    archs = tuple(word.replace(".", "").upper() for word in re.split(r"[\s,;]+", text.strip()))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}(\+PTX)?", arch):
            raise ValueError(f"{text!r} holds {arch!r}; expected GPU architectures such as 80,90,120+PTX")
    return archs


def _gencode(supported: Sequence[int], archs: Sequence[str]) -> list[str]:
    """The flags for these GPUs; one that this nvcc is too old for gets PTX of the newest that it knows."""
    machine, ptx = set(), set()
    for arch in archs if supported else ():
        number = int(arch.partition("+")[0])
        older = [one for one in supported if one <= number]
        if not older:
            raise BuildError(f"nvcc knows no GPU as old as sm_{number}: its oldest is sm_{min(supported)}")
        machine |= {older[-1]}
        ptx |= {older[-1]} if arch.endswith("+PTX") or older[-1] != number else set()
    flags = [f"-gencode=arch=compute_{one},code=sm_{one}" for one in sorted(machine)]
    return flags + [f"-gencode=arch=compute_{one},code=compute_{one}" for one in sorted(ptx)]


def _isas(machine: str) -> list[str]:
    return list(ISA_FLAGS) if machine in ("x86_64", "AMD64") else ["baseline"]


def _steps(
    kind: Kind, compiler: Sequence[str], torch: str, sources: str, gencode: Sequence[str], threads: int = 1
) -> dict[str, list[str]]:
    """The file that each command makes, and the command; the last one links all the others."""
    include = ["-I", f"{torch}/include", "-I", sources]
    compile_: dict[str, list[str]] = {}
    if kind == "cpu":
        isas = _isas(platform.machine())
        base = [*compiler, *COMMON_FLAGS, "-fPIC", "-fvisibility=hidden", "-pthread", *include, "-c"]
        only = ["-DDETFAMILY_ONLY_BASELINE"] if isas == ["baseline"] else []
        compile_["cpu.o"] = [*base, *only, f"{sources}/cpu.cpp"]
        for isa in isas:
            chosen = [*KERNEL_FLAGS, f"-DDETFAMILY_ISA={isa}", *ISA_FLAGS[isa]]
            compile_[f"cpu_kernels_{isa}.o"] = [*base, *only, *chosen, f"{sources}/cpu_kernels.cpp"]
        link = [*compiler, "-shared", "-pthread", "-Wl,--exclude-libs,ALL"]
    else:
        base = [*compiler, *COMMON_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", *include, *gencode]
        compile_["cuda.o"] = [*base, f"--threads={threads}", "-c", f"{sources}/cuda.cu"]
        link = [*compiler, "-shared", "--cudart=static", *gencode, "-Xlinker=--exclude-libs,ALL"]
    commands = {output: [*command, "-o", output] for output, command in compile_.items()}
    name = library_name(kind)
    commands[name] = [*link, *commands, "-L", f"{torch}/lib", "-ltorch_cpu", "-o", name]
    return commands


def _what_matters(kind: Kind, archs: Sequence[str], sources: Path, torch: Path) -> str:
    """Everything that the library depends on, but the compiler and where things lie."""
    if not sources.is_dir():
        raise BuildError(f"the sources are not there: {sources}")
    commands = _steps(kind, ["compiler"], "torch", "sources", archs)
    files = sorted(file for file in sources.iterdir() if file.suffix in SUFFIXES[kind])
    texts = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return json.dumps([commands, texts, torch_version(torch), platform.machine()])


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


# -- running them -----------------------------------------------------------------------------------------------------


def _compile(tools: Tools, folder: Path, archs: Sequence[str], sources: Path) -> Path:
    """Run all commands in a folder; their outputs are there afterwards, and ``build.log``."""
    jobs = int(os.environ.get("MAX_JOBS", "0")) or os.cpu_count() or 1
    gencode = _gencode(tools.supported, archs)
    place = str(sources.resolve())
    commands = _steps(tools.kind, tools.compiler, str(tools.torch), place, gencode, min(jobs, len(archs)))
    log = folder / "build.log"
    ninja = _find_ninja()
    with log.open("wb") as output:
        done = _run_ninja(ninja, jobs, commands, folder, output) if ninja else _run_all(commands, folder, output)
    if not done:
        raise _failure(tools, log)
    for file in folder.glob("*.o"):
        file.unlink()
    library = folder / library_name(tools.kind)
    record = {"compiler": tools.version, "torch": torch_version(tools.torch), "archs": gencode}
    library.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return library


def _find_ninja() -> str | None:
    beside = Path(sys.executable).with_name("ninja")  # in an environment that is used without being activated
    return shutil.which("ninja") or (str(beside) if os.access(beside, os.X_OK) else None)


def _run_ninja(ninja: str, jobs: int, commands: Mapping[str, Sequence[str]], folder: Path, output: object) -> bool:
    """All commands but the last one side by side."""
    lines = ["rule run", "  command = $words"]
    *objects, library = commands
    for name, words in commands.items():
        needs = " ".join(objects) if name == library else ""
        lines += [f"build {name}: run {needs}", "  words = " + shlex.join(words).replace("$", "$$")]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return _run([ninja, "-j", str(jobs)], folder, output)


def _run_all(commands: Mapping[str, Sequence[str]], folder: Path, output: object) -> bool:
    return all(_run(command, folder, output) for command in commands.values())


def _run(command: Sequence[str], folder: Path, output: object) -> bool:
    ran = subprocess.run(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=_environment())  # type: ignore[call-overload]
    return bool(ran.returncode == 0)


def _failure(tools: Tools, log: Path) -> BuildError:
    return BuildError(f"{Path(tools.compiler[0]).name} fails: {_first_error(log)} (all of its output: {log})")


def _first_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    telling = re.compile(r"error[: ]|fatal|undefined reference|cannot find|Killed|No space left")
    errors = [line for line in lines if telling.search(line)]
    return (errors or lines or ["without a word"])[0].strip()


# -- once among several processes -------------------------------------------------------------------------------------


def _build_once(
    tools: Tools, home: Path, archs: Sequence[str], sources: Path, say: Callable[[str], object] | None
) -> None:
    """Build into a folder of its own and rename that, while the others wait."""
    asked = time.time()
    failed = home.with_name(f"{home.name}.log")
    if say is not None:  # before the wait: the one that compiles may be one that does not speak
        say(f"compiling the {tools.kind} op once, into {home}")
    with _locked(home.with_name(f".{home.name}.lock")):
        if (home / library_name(tools.kind)).is_file():
            return
        if failed.is_file() and failed.stat().st_mtime >= asked:  # while this process waited for the same
            raise _failure(tools, failed)
        _sweep(home)
        temporary = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
        try:
            _compile(tools, temporary, archs, sources)
            temporary.chmod(0o755)
            _put(temporary, home)
        except BuildError:
            os.replace(temporary / "build.log", failed)
            raise _failure(tools, failed) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _put(built: Path, home: Path) -> None:
    for file in built.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())  # a crash of the machine leaves no empty library behind a valid name
    try:
        built.rename(home)
    except OSError:
        if not any(home.glob("*.so")):  # else a machine that shares this folder was faster, and its library is as good
            raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among the processes of this machine; the system gives the lock back when its holder dies."""
    import fcntl  # Linux only, as is all that is compiled

    with file.open("wb") as handle:
        # Some file systems of clusters cannot lock: then the processes work for nothing, but in folders of their own.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sweep(home: Path) -> None:
    """Throw away what killed processes left; not the recent, which another machine may be writing."""
    for left in home.parent.glob(f".{home.name}-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left)
