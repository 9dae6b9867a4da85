"""What is built from a checkout, and that compiled code in a wheel works where there is no compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from detfamily.ops import build

pytest.importorskip("hatchling", reason="hatchling is not installed: pip install -e '.[dev]'")
ROOT = Path(__file__).resolve().parents[2]
FILES = ("pyproject.toml", "build_backend.py", "README.md", "LICENSE", ".gitignore")
LIBRARY = "detfamily/ops/libdetfamily_cpu.so"
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="g++ is not installed, or this is not Linux"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what a build needs."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in ("src", "configs"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "local", "*.so"))
    for file in FILES:
        shutil.copy(ROOT / file, tree)
    return tree


def call(tree: Path, function: str, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """One function of the build backend, as pip calls it."""
    out.mkdir(exist_ok=True)
    code = f"import sys; sys.path.insert(0, '.'); import build_backend; build_backend.{function}({str(out)!r})"
    environment = {**os.environ, "DETFAMILY_BUILD_OPS": "", **variables}
    return subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)


def backend(monkeypatch: pytest.MonkeyPatch, found: bool) -> ModuleType:
    """The build backend, in an environment that has torch or has not."""
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("build_backend_under_test", ROOT / "build_backend.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_load_compiler", lambda root: build)
    if not found:

        def missing() -> Path:
            raise build.MissingError("torch is not installed")

        monkeypatch.setattr(build, "find_torch", missing)
    return module


# -- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that ``pip wheel`` makes, with compiled code for the CPU."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", out, tree]
    environment = {**os.environ, "DETFAMILY_BUILD_OPS": "cpu"}
    ran = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (made,) = out.glob("*.whl")
    return made


@needs_compiler
def test_the_wheel_holds_code_sources_and_configs_and_says_where_it_runs(wheel):
    system = f"linux_{build.platform.machine()}"
    assert wheel.name.endswith(f"-py3-none-{system}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (told,) = [name for name in names if name.endswith(".dist-info/WHEEL")]
        assert f"Tag: py3-none-{system}" in archive.read(told).decode()
        assert "Root-Is-Purelib: false" in archive.read(told).decode()
    assert {LIBRARY, LIBRARY.replace(".so", ".json"), "detfamily/configs/train.yaml"} <= names
    assert {f"detfamily/ops/csrc/{file.name}" for file in build.SOURCES.iterdir()} <= names
    assert not [name for name in names if name.endswith((".o", ".log", ".ninja", ".pyc")) or "build_backend" in name]


USE = """
import sys
from pathlib import Path
import torch
import detfamily
from detfamily.ops import backends, ms_deform_attn

assert Path(detfamily.__file__).is_relative_to(sys.prefix), detfamily.__file__
assert backends.describe("cpu").endswith("from the wheel"), backends.describe("cpu")

shapes = ((6, 8), (3, 4))
torch.manual_seed(0)
value = torch.randn(2, 60, 4, 16)
locations = 1.2 * torch.rand(2, 9, 4, 2, 3, 2) - 0.1
weights = torch.rand(2, 9, 4, 2, 3)

def results(backend, dtype):
    given = [one.to(dtype).requires_grad_() for one in (value, locations, weights)]
    with backends.use_backend(backend):
        output = ms_deform_attn(given[0], shapes, *given[1:])
    return [output, *torch.autograd.grad((output * output).sum(), given)]

for one, exact in zip(results("cpu", torch.float32), results("reference", torch.float64), strict=True):
    torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=1e-4)
"""


@needs_compiler
def test_the_wheel_works_in_an_empty_environment_without_a_compiler(wheel, tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run([str(word) for word in install], check=True, capture_output=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # torch and the others from here: entries of a .pth file do not bring .pth files, so not the checkout, of their own
    (packages / "torch_is_there.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    cache = tmp_path / "cache"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DETFAMILY", "CXX"))}
    variables = {**kept, "PATH": str(environment / "bin"), "DETFAMILY_CACHE": str(cache)}
    variables["PYTHONWARNINGS"] = "error::RuntimeWarning"
    ran = subprocess.run([python, "-c", USE], env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert not cache.exists(), "nothing was compiled"
    ran = subprocess.run(["detfamily", "--version"], env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.startswith("detfamily "), ran.stderr


# -- builds without compiled code -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DETFAMILY_BUILD_OPS": "0"}, ["the wheel has no compiled op, as DETFAMILY_BUILD_OPS=0 asks for"]),
        (
            {"CXX": "no-such-compiler"},
            [f"the wheel has no compiled {kind} op: no " for kind in ("cpu", "cuda")],
        ),
    ],
)
def test_a_wheel_for_every_machine(tree, tmp_path, variables, said):
    ran = call(tree, "build_wheel", tmp_path / "out", **variables)
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in (ran.stdout + ran.stderr).splitlines() if "compiled" in line]
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))
    (wheel,) = (tmp_path / "out").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert LIBRARY not in names and "detfamily/ops/csrc/cpu.cpp" in names


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"DETFAMILY_BUILD_OPS": "cpu", "CXX": "no-such-compiler"},
            "cpu op, which DETFAMILY_BUILD_OPS asks for: no C++ compiler: CXX names 'no-such-compiler'",
        ),
        ({"DETFAMILY_BUILD_OPS": "gpu"}, "DETFAMILY_BUILD_OPS=gpu: expected 0, or one or more of cpu,cuda"),
        ({"DETFAMILY_CUDA_ARCHS": "hopper"}, "DETFAMILY_CUDA_ARCHS: 'hopper' holds 'HOPPER'"),
    ],
)
def test_what_is_asked_for_and_cannot_be_had_is_an_error(tree, tmp_path, variables, message):
    if "DETFAMILY_CUDA_ARCHS" in variables:
        variables = {**variables, "DETFAMILY_BUILD_OPS": "cuda"}
    ran = call(tree, "build_wheel", tmp_path / "out", **variables)
    assert ran.returncode != 0 and message in ran.stderr
    assert not list((tmp_path / "out").iterdir())


def test_an_editable_installation_compiles_nothing_yet(tree, tmp_path):
    ran = call(tree, "build_editable", tmp_path / "out", CXX="no-such-compiler", DETFAMILY_BUILD_OPS="cpu")
    assert ran.returncode == 0, ran.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_a_source_distribution_has_what_a_build_needs(tree, tmp_path):
    ran = call(tree, "build_sdist", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    (archive,) = (tmp_path / "out").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"build_backend.py", "pyproject.toml", "configs/train.yaml", "src/detfamily/ops/build.py"} <= names
    assert {f"src/detfamily/ops/csrc/{file.name}" for file in build.SOURCES.iterdir()} <= names


@pytest.mark.parametrize(
    ("what", "compiler", "torch_found", "expected"),
    [
        ("", True, True, False),
        ("", True, False, True),
        ("", False, False, False),
        ("0", True, False, False),
        ("cpu", True, False, True),
    ],
)
def test_torch_is_asked_for_only_where_its_headers_are_needed(monkeypatch, what, compiler, torch_found, expected):
    module = backend(monkeypatch, torch_found)
    monkeypatch.setenv("DETFAMILY_BUILD_OPS", what)
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: f"/bin/{name}" if compiler else None)
    assert ("torch>=2.11" in module.get_requires_for_build_wheel()) is expected
    assert not [one for one in module.get_requires_for_build_editable() if one.startswith("torch")]


# -- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")),
    reason="nvcc is not installed",
)
def test_the_cuda_code_compiles():
    library = build.cached("cuda", ("80", "90", "120"))
    archs = " ".join(build.record_of(library)["archs"])
    assert all(f"sm_{arch}" in archs for arch in (80, 90, 120))
    ctypes.CDLL(str(library))  # without a GPU, a driver or CUDA's runtime
