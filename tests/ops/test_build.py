"""The build of the libraries, with small sources of its own that compile in a moment."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from detfamily.ops import build

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")), reason="nvcc is not installed"
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "number.h").write_text("#define NUMBER 41\n")
    (folder / "cpu_kernels.cpp").write_text(
        "#define NAME2(isa) one_##isa\n#define NAME(isa) NAME2(isa)\nint NAME(DETFAMILY_ISA)() { return 1; }\n"
    )
    (folder / "cpu.cpp").write_text(
        '#include "number.h"\nint one_baseline();\n'
        'extern "C" __attribute__((visibility("default"))) int answer() { return NUMBER + one_baseline(); }\n'
    )
    (folder / "cuda.cu").write_text(
        "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }\n"
        'extern "C" __attribute__((visibility("default"))) int answer() { return (void*)twice != nullptr; }\n'
    )
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETFAMILY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "ops"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def asking(sources: Path) -> subprocess.Popen[str]:
    """``cached``, in another process and a group of its own; prints the library's path."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(build.__file__).parent)!r})\n"
        "import build; from pathlib import Path\n"
        f"print(build.cached('cpu', sources=Path({str(sources)!r})))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)


# -- building ---------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("with_ninja", [True, False])
def test_a_library_is_built_with_and_without_ninja(sources, tmp_path, monkeypatch, with_ninja):
    if not with_ninja:
        monkeypatch.setattr(build, "_find_ninja", lambda: None)
    folder = tmp_path / "a folder with $pace"
    library = build.build("cpu", folder, sources=sources)
    assert answer(library) == 42
    assert (folder / "build.ninja").exists() == with_ninja
    assert "g++" in str(build.record_of(library)["compiler"])
    assert build.record_of(tmp_path / "nothing.so") == {}


@needs_compiler
def test_an_instruction_set_has_its_own_object(sources, tmp_path):
    (sources / "cpu_kernels.cpp").write_text(
        "#if defined(__AVX512F__)\nint one_avx512()\n#elif defined(__AVX2__)\nint one_avx2()\n"
        "#else\nint one_baseline()\n#endif\n{ return 1; }\n"
    )
    if len(build._isas(build.platform.machine())) == 3:
        (sources / "cpu.cpp").write_text(
            "int one_baseline(); int one_avx2(); int one_avx512();\n"
            'extern "C" __attribute__((visibility("default"))) int answer()\n'
            "{ return one_baseline() + one_avx2() + one_avx512(); }\n"
        )
        assert answer(build.build("cpu", tmp_path / "out", sources=sources)) == 3
    else:
        assert answer(build.build("cpu", tmp_path / "out", sources=sources)) == 42


@needs_compiler
def test_broken_source_gives_the_first_error_and_keeps_the_rest(sources, tmp_path, cache):
    (sources / "cpu.cpp").write_text("#include <vector>\nint answer() { return wrong_name; }\n")
    with pytest.raises(build.BuildError, match=r"g\+\+ fails: .*cpu.cpp:2:\d+: error: .*wrong_name") as caught:
        build.build("cpu", tmp_path / "out", sources=sources)
    log = Path(str(caught.value).rpartition("output: ")[2].rstrip(")"))
    assert "wrong_name" in log.read_text()
    with pytest.raises(build.BuildError, match=r"error: .*wrong_name.*cache/ops/.*\.log\)$"):
        build.cached("cpu", sources=sources)
    assert not list(cache.glob("*/*.so")) and len(list(cache.glob("*.log"))) == 1


def test_the_compiler_is_the_one_that_is_named(monkeypatch, sources, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.MissingError, match="CXX names 'no-such-compiler', which is not there"):
        build.build("cpu", tmp_path / "out", sources=sources)


def test_no_compiler(no_compiler, sources, tmp_path, monkeypatch):
    with pytest.raises(build.MissingError, match=r"no C\+\+ compiler .*install g\+\+"):
        build.build("cpu", tmp_path / "out", sources=sources)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.MissingError, match="no nvcc .*install the CUDA toolkit"):
        build.build("cuda", tmp_path / "out", sources=sources)


def test_another_system(monkeypatch, sources, tmp_path):
    monkeypatch.setattr(build.sys, "platform", "darwin")
    with pytest.raises(build.BuildError, match="compiled code is for Linux only"):
        build.build("cpu", tmp_path / "out", sources=sources)


def test_a_torch_that_is_too_old_or_has_no_headers(tmp_path):
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "version.py").write_text("__version__ = '2.10.1+cpu'\n")
    for _ in range(2):
        with pytest.raises(build.BuildError, match=r"torch 2\.10\.1\+cpu .* install torch >= 2\.11"):
            build.torch_version(torch)
        (torch / "include/torch/csrc/stable").mkdir(parents=True, exist_ok=True)
        (torch / "include/torch/csrc/stable/library.h").touch()
    (torch / "version.py").write_text("__version__ = '2.11.0'\n")
    assert build.torch_version(torch) == "2.11.0"


def test_the_file_works_by_itself():
    """As the build of a wheel uses it: neither detfamily nor torch is imported."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(build.__file__).parent)!r}); import build\n"
        "print(build.torch_version(build.find_torch()), 'torch' in sys.modules, 'detfamily' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, *imported = ran.stdout.split()
    assert version.startswith("2.") and imported == ["False", "False"]


# -- the cache --------------------------------------------------------------------------------------------------------


@needs_compiler
def test_what_is_there_is_used_again(sources, monkeypatch):
    said: list[str] = []
    library = build.cached("cpu", sources=sources, say=said.append)
    monkeypatch.setattr(build, "_compile", None)
    assert build.cached("cpu", sources=sources, say=said.append) == library
    assert len(said) == 1 and "compiling the cpu op once" in said[0]


@needs_compiler
def test_a_changed_header_is_a_new_library(sources):
    before = build.cached("cpu", sources=sources)
    (sources / "number.h").write_text("#define NUMBER 42\n")
    after = build.cached("cpu", sources=sources)
    assert (answer(before), answer(after)) == (42, 43)
    (sources / "cuda.cu").write_text("// of no concern for the CPU\n")
    assert build.cached("cpu", sources=sources) == after


def test_the_key_holds_what_matters(sources, monkeypatch):
    torch = build.find_torch()

    def key(kind: build.Kind = "cuda", archs: tuple[str, ...] = ("80",)) -> str:
        return build._what_matters(kind, archs, sources, torch)

    keys = [key("cpu"), key(), key(archs=("90",))]
    monkeypatch.setattr(build, "COMMON_FLAGS", ("-std=c++20", "-O2"))
    keys.append(key())
    monkeypatch.setattr(build, "torch_version", lambda torch: "9.9")
    keys.append(key())
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    keys.append(key())
    (sources / "extra.cuh").write_text("")
    keys.append(key())
    assert len(set(keys)) == len(keys)


@needs_compiler
def test_another_compiler_is_another_library(sources, monkeypatch, tmp_path):
    before = build.cached("cpu", sources=sources)
    other = tmp_path / "other++"
    other.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo other 1.0; else exec g++ "$@"; fi\n')
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    after = build.cached("cpu", sources=sources)
    assert after != before and build.record_of(after)["compiler"] == "other 1.0"


@needs_compiler
def test_without_a_compiler_what_another_machine_built_is_used(sources, monkeypatch, tmp_path):
    library = build.cached("cpu", sources=sources)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.cached("cpu", sources=sources) == library
    (sources / "number.h").write_text("#define NUMBER 1\n")
    with pytest.raises(build.MissingError):
        build.cached("cpu", sources=sources)


@needs_compiler
def test_processes_that_ask_at_once_compile_once(sources, tmp_path, monkeypatch):
    counter = tmp_path / "links"
    compiler = tmp_path / "counting++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo x >> {counter};; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    processes = [asking(sources) for _ in range(3)]
    libraries = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(libraries) == 1 and answer(Path(libraries.pop())) == 42
    assert counter.read_text() == "x\n"


@needs_compiler
def test_processes_that_wait_for_a_failure_do_not_repeat_it(sources, tmp_path, monkeypatch):
    counter = tmp_path / "tries"
    compiler = tmp_path / "failing++"
    compiler.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit; fi\necho x >> {counter}; sleep 1\n'
        "echo 'x.cpp:1: error: never' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "_find_ninja", lambda: None)

    def failure(_: int) -> str:
        with pytest.raises(build.BuildError) as caught:
            build.cached("cpu", sources=sources)
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:  # a lock of flock's holds between open files, so threads do as well
        messages = list(pool.map(failure, range(3)))
    assert all("x.cpp:1: error: never" in message for message in messages)
    assert counter.read_text() == "x\n"


@needs_compiler
def test_a_killed_builder_is_not_in_the_way(sources, tmp_path, cache, monkeypatch):
    slow = tmp_path / "slow++"
    slow.write_text(f'#!/bin/sh\nif [ -e {tmp_path}/fast ] || [ "$1" = --version ]; then exec g++ "$@"; fi\nsleep 60\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    process = asking(sources)
    try:
        until = time.monotonic() + 60
        while not list(cache.glob(".cpu-*/build.log")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    (left,) = cache.glob(".cpu-*-*-*/")
    os.utime(left, (0, 0))
    (tmp_path / "fast").touch()
    assert answer(build.cached("cpu", sources=sources)) == 42
    assert not left.exists(), "old leftovers are swept"
    assert sorted(file.suffix for file in cache.iterdir()) == ["", ".lock"]


@pytest.mark.skipif(os.name != "posix", reason="there is no /dev/null to be in the way")
@needs_compiler
def test_a_cache_that_cannot_be_written(sources, monkeypatch, tmp_path):
    monkeypatch.setenv("DETFAMILY_CACHE", "/dev/null/cache")
    with pytest.raises(
        build.BuildError, match=r"cannot write to the cache folder /dev/null/cache/ops \(.*set DETFAMILY_C"
    ):
        build.cached("cpu", sources=sources)


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert build.cache_folder() == tmp_path / "cache/ops"
    monkeypatch.delenv("DETFAMILY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "detfamily/ops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache/detfamily/ops"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(build.BuildError, match="no home folder for the cache; set DETFAMILY_CACHE"):
        build.cache_folder()


# -- GPUs -------------------------------------------------------------------------------------------------------------


def test_which_gpus_a_library_is_for():
    new, old = (75, 80, 86, 89, 90, 100, 120), (70, 80, 86, 89, 90)
    flags = build._gencode(new, build.WHEEL_ARCHS)
    assert [flag.rpartition("=")[2] for flag in flags] == [
        *("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"),
        "compute_120",
    ]
    flags = build._gencode(old, ("80", "100", "120+PTX"))
    assert [flag.rpartition("=")[2] for flag in flags] == ["sm_80", "sm_90", "compute_90"]
    with pytest.raises(build.BuildError, match="nvcc knows no GPU as old as sm_61: its oldest is sm_75"):
        build._gencode(new, ("61",))


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (("80",), (8, 0), True),
        (("80",), (8, 9), True),
        (("86",), (8, 0), False),
        (("80",), (9, 0), False),
        (("80+PTX",), (9, 0), True),
        (("90",), (8, 9), False),
        (("100",), (10, 3), True),
        (("90", "120+PTX"), (10, 0), False),
        (("120",), (12, 1), True),
    ],
)
def test_whether_a_gpu_is_served(archs, capability, expected):
    flags = " ".join(build._gencode((80, 86, 89, 90, 100, 120), archs))
    assert build.serves(flags, capability) is expected


def test_archs_as_they_are_written():
    assert build.parse_archs("80, 9.0;120+ptx") == ("80", "90", "120+PTX")
    with pytest.raises(ValueError, match="holds 'HOPPER'; expected GPU architectures such as"):
        build.parse_archs("80,hopper")


@needs_compiler
@needs_nvcc
def test_a_cuda_library_depends_on_no_cuda_library(sources, tmp_path):
    library = build.build("cuda", tmp_path / "out", ("80", "90+PTX"), sources=sources)
    assert answer(library) == 1, "it loads without a GPU and without a CUDA runtime"
    record = build.record_of(library)
    assert build.cuda_major(str(record["compiler"])) >= 11
    assert build.serves(" ".join(record["archs"]), (8, 6)) and build.serves(" ".join(record["archs"]), (12, 0))
