"""The choice of a backend. Libraries are small ones that register nothing, unless a test says otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from detfamily.errors import ConfigError
from detfamily.ops import backends, build

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
SOURCE_ROOT = Path(backends.__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has not looked for anything yet, is told nothing, and has no wheel's libraries."""
    monkeypatch.setattr(backends, "_state", backends._State())
    monkeypatch.setattr(backends, "_wish", None)
    monkeypatch.setattr(backends, "_wish_by", "DETFAMILY_OP_BACKEND=None")
    monkeypatch.setattr(backends, "SHIPPED", tmp_path / "package")
    for name in ("LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No library can be had; the list collects the attempts."""
    attempts: list[str] = []

    def cached(kind: build.Kind, *_: object, **__: object) -> Path:
        attempts.append(kind)
        raise build.MissingError(f"no compiler for {kind}; install one")

    monkeypatch.setattr(build, "cached", cached)
    return attempts


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that knows its instruction set and nothing else."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("library")
    (folder / "a.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) const char* detfamily_cpu_isa() { return "avx2"; }\n'
    )
    path = folder / build.library_name("cpu")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", path, folder / "a.cpp"], check=True)
    path.with_suffix(".json").write_text('{"compiler": "g++ 1.2"}')
    return path


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], driver: int = 13000) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(backends, "driver_version", lambda: driver)


# -- what is there ----------------------------------------------------------------------------------------------------


def test_compiled_just_in_time(library, monkeypatch, recwarn):
    monkeypatch.setattr(build, "cached", lambda *_, **__: library)
    assert backends.backend_for("cpu") == "cpu"
    assert backends.describe("cpu") == "compiled for this CPU (AVX2), built here by g++ 1.2"
    assert not recwarn


def test_the_wheels_library_comes_first(library, monkeypatch, nothing):
    monkeypatch.setattr(backends, "SHIPPED", library.parent)
    assert backends.backend_for("cpu") == "cpu"
    assert backends.describe("cpu").endswith("from the wheel")
    assert not nothing


def test_a_broken_library_of_the_wheel_is_replaced_or_named(library, monkeypatch, tmp_path, nothing):
    monkeypatch.setattr(backends, "SHIPPED", tmp_path)
    (tmp_path / build.library_name("cpu")).write_text("no library")
    with pytest.warns(RuntimeWarning, match=r"wheel's library does not fit .*cannot be loaded.*no compiler for cpu"):
        assert backends.backend_for("cpu") == "reference"
    monkeypatch.setattr(backends, "_state", backends._State())
    monkeypatch.setattr(build, "cached", lambda *_, **__: library)
    assert backends.backend_for("cpu") == "cpu"


def test_what_is_missing_is_said_once_and_tried_once(nothing):
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(3):
            assert backends.backend_for("cpu") == "reference"
            with backends.use_backend("reference"):
                backends.backend_for("cpu")
    (message,) = [str(one.message) for one in caught]
    assert "plain PyTorch, about 10 times slower" in message and "no compiler for cpu; install one" in message
    assert "\n" not in message
    assert nothing == ["cpu"]
    assert backends.describe("cpu") == "plain PyTorch: no compiler for cpu; install one"


@pytest.mark.parametrize(
    ("variables", "warned"), [({"LOCAL_RANK": "0", "RANK": "8"}, 1), ({"LOCAL_RANK": "1"}, 0), ({"RANK": "1"}, 0)]
)
def test_one_process_of_a_machine_speaks(nothing, monkeypatch, recwarn, variables, warned):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert backends.backend_for("cpu") == "reference"
    assert len(recwarn) == warned


def test_a_warning_that_is_an_error_does_not_repeat_the_search(nothing):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            backends.backend_for("cpu")
        assert backends.backend_for("cpu") == "reference"
    assert nothing == ["cpu"]


def test_devices_without_code_of_their_own(nothing, recwarn):
    assert backends.backend_for("meta") == "reference" and not recwarn
    with pytest.warns(RuntimeWarning, match="there is no compiled code for mps"):
        assert backends.backend_for("mps") == "reference"
    assert not nothing


# -- CUDA -------------------------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_loaded_or_compiled_for_one(nothing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "_load", None)
    with pytest.warns(RuntimeWarning, match=r"on cuda runs in plain PyTorch, about 5 .*(no GPU|without CUDA)"):
        assert backends.backend_for("cuda") == "reference"
    assert not nothing


def test_only_the_gpus_that_are_there_are_compiled_for(library, monkeypatch):
    gpus(monkeypatch, (9, 0), (8, 0), (9, 0))
    asked = []

    def cached(kind: str, archs: list[str], **_: object) -> Path:
        asked.append((kind, archs))
        return library

    monkeypatch.setattr(build, "cached", cached)
    assert backends.backend_for("cuda") == "cuda"
    assert asked == [("cuda", ["80", "90"])]


@pytest.mark.parametrize(
    ("archs", "compiler", "capability", "driver", "reason"),
    [
        ("code=sm_80", "nvcc 13.0", (9, 0), 13000, "no code for compute capability 9.0"),
        ("code=sm_90", "nvcc 13.0", (9, 0), 12080, "needs a driver for CUDA 13, and the one here is for CUDA 12"),
        ("code=sm_90", "nvcc 12.4", (9, 0), 13000, None),
        ("code=compute_80", "nvcc 12.9", (12, 0), 12000, None),
    ],
)
def test_a_cuda_library_of_the_wheel_must_fit_gpu_and_driver(
    library, monkeypatch, tmp_path, nothing, archs, compiler, capability, driver, reason
):
    gpus(monkeypatch, capability, driver=driver)
    shipped = tmp_path / build.library_name("cuda")
    shutil.copy(library, shipped)
    shipped.with_suffix(".json").write_text(f'{{"compiler": "{compiler}", "archs": ["{archs}"]}}')
    monkeypatch.setattr(backends, "SHIPPED", tmp_path)
    if reason is None:
        assert backends.backend_for("cuda") == "cuda"
        assert backends.describe("cuda") == "compiled for this GPU, from the wheel"
        return
    with pytest.warns(RuntimeWarning, match=reason):
        assert backends.backend_for("cuda") == "reference"


def test_a_gpu_that_is_too_old_and_one_that_is_not_nvidias(monkeypatch, nothing):
    gpus(monkeypatch, (9, 0), (7, 5))
    with pytest.warns(RuntimeWarning, match=r"GPU 1 has compute capability 7\.5, and 8\.0 is needed.*CUDA_VISIBLE_DEV"):
        assert backends.backend_for("cuda") == "reference"
    monkeypatch.setattr(backends, "_state", backends._State())
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.warns(RuntimeWarning, match="built for AMD GPUs"):
        assert backends.backend_for("cuda") == "reference"
    assert not nothing


# -- what is asked for ------------------------------------------------------------------------------------------------


def test_forced_for_a_while(library, monkeypatch):
    monkeypatch.setattr(build, "cached", lambda *_, **__: library)
    with backends.use_backend("reference"):
        assert backends.backend_for("cpu") == "reference"
        assert backends.describe("cpu") == "plain PyTorch, as use_backend('reference') asks for"
        with backends.use_backend(None):
            assert backends.backend_for("cpu") == "cpu"
        assert backends.backend_for("cpu") == "reference"
    assert backends.backend_for("cpu") == "cpu"


def test_a_typo(nothing):
    with (
        pytest.raises(ConfigError, match=r"use_backend\('cuad'\): there is no backend 'cuad': did you mean 'cuda'"),
        backends.use_backend("cuad"),
    ):
        pass
    assert backends._wish is None


def test_what_is_not_there(nothing, monkeypatch, recwarn):
    with (
        backends.use_backend("cpu"),
        pytest.raises(ConfigError, match=r"use_backend\('cpu'\) asks for .* not there: no compiler for cpu; inst"),
    ):
        backends.backend_for("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with backends.use_backend("cuda"), pytest.raises(ConfigError, match=r"not there: .*(no GPU|without CUDA)"):
        backends.backend_for("cuda")
    assert not recwarn


def test_what_cannot_serve_the_device(nothing):
    with (
        backends.use_backend("cuda"),
        pytest.raises(ConfigError, match="cannot serve tensors on cpu: expected 'reference' or 'cpu', or no backend"),
    ):
        backends.backend_for("cpu")
    with backends.use_backend("cpu"):
        assert backends.backend_for("meta") == "reference"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "reference"),
        ("", "cpu"),
        ("refrence", "DETFAMILY_OP_BACKEND=refrence: there is no backend 'refrence': did you mean 'reference'?"),
    ],
)
def test_the_variable(value, expected, library):
    code = (
        "from pathlib import Path\nfrom detfamily.errors import ConfigError\n"
        "from detfamily.ops import backends, build\n"
        f"build.cached = lambda *_, **__: Path({str(library)!r})\n"
        "try:\n    print(backends.backend_for('cpu'))\nexcept ConfigError as error:\n    print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "DETFAMILY_OP_BACKEND": value}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(expected)


# -- captured graphs --------------------------------------------------------------------------------------------------


def choosing(x: torch.Tensor) -> torch.Tensor:
    return x.sin() if backends.backend_for(x.device.type) == "reference" else x.cos()


def test_compiled_code_has_the_backend_as_a_constant_and_notices_another(library, monkeypatch):
    attempts = []

    def cached(*_: object, **__: object) -> Path:
        attempts.append(1)
        return library

    monkeypatch.setattr(build, "cached", cached)
    torch._dynamo.reset()
    compiled = torch.compile(choosing, fullgraph=True, backend="eager")
    x = torch.tensor(0.5)
    assert compiled(x) == x.cos(), "the library is loaded while the graph is captured"
    with backends.use_backend("reference"):
        assert compiled(x) == x.sin()
    assert compiled(x) == x.cos()
    assert len(attempts) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_exported_code_has_the_backend_of_that_moment(library, monkeypatch, strict):
    monkeypatch.setattr(build, "cached", lambda *_, **__: library)
    torch._dynamo.reset()

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return choosing(x)

    for name, function in ((None, "cos"), ("reference", "sin")):
        with backends.use_backend(name):
            graph = torch.export.export(Module(), (torch.ones(1),), strict=strict).graph
        assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == [f"aten.{function}.default"]
