"""How a wheel gets compiled code: hatchling builds it, and this adds the op's libraries for the machine's processors.

Both a build backend (PEP 517), which asks for torch's headers where they are needed, and a hook of hatchling's.

DETFAMILY_BUILD_OPS says what to compile. Unset: what there are compilers for. 0: nothing. cpu, cuda or cpu,cuda:
these, and it is an error if one cannot be compiled. DETFAMILY_CUDA_ARCHS=80,90,120+PTX replaces the list of GPUs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import hatchling.build
from hatchling.build import *  # noqa: F403  the other functions of a build backend
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "src/detfamily/ops"
WHAT = "DETFAMILY_BUILD_OPS"
ARCHS = "DETFAMILY_CUDA_ARCHS"


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Packages that the build of a wheel needs: torch, if there is something to compile and it is not there yet."""
    needed = list(hatchling.build.get_requires_for_build_wheel(config_settings))
    compiler = _load_compiler(Path.cwd())
    if any(_possible(compiler, kind) for kind in _wanted(compiler)[0]):
        try:
            compiler.torch_version(compiler.find_torch())
        except compiler.BuildError:
            needed += ["torch>=" + ".".join(map(str, compiler.MINIMUM_TORCH)), "ninja"]
    return needed


class CompiledOps(BuildHookInterface):
    """Compiles the libraries into a temporary folder, from where they go into the wheel."""

    PLUGIN_NAME = "custom"
    folder: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is put together; an editable one compiles at first use."""
        if self.target_name != "wheel" or version == "editable":
            return
        compiler = _load_compiler(Path(self.root))
        kinds, required = _wanted(compiler)
        self.folder = Path(tempfile.mkdtemp(prefix="detfamily-ops-"))
        for kind in kinds:
            try:
                library = _compile(compiler, kind, self.folder / kind)
            except compiler.BuildError as error:
                if required:
                    raise SystemExit(f"detfamily: {kind} op, which {WHAT} asks for: {error}") from None
                self.app.display_warning(f"detfamily: the wheel has no compiled {kind} op: {error}")
                continue
            for file in (library, library.with_suffix(".json")):
                build_data["force_include"][str(file)] = f"detfamily/ops/{file.name}"
            # The libraries know nothing of Python: one wheel for all of its versions.
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        if not kinds:
            self.app.display_warning(f"detfamily: the wheel has no compiled op, as {WHAT}=0 asks for")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _wanted(compiler: ModuleType) -> tuple[list[str], bool]:
    """The libraries to compile, and whether it is an error if one of them cannot be."""
    text = os.environ.get(WHAT, "").strip()
    if text in ("", "0"):
        return list(compiler.KINDS) if not text else [], False
    kinds = text.split(",")
    if not set(kinds) <= set(compiler.KINDS):
        raise SystemExit(f"{WHAT}={text}: expected 0, or one or more of {','.join(compiler.KINDS)}")
    return kinds, True


def _possible(compiler: ModuleType, kind: str) -> bool:
    """Whether there is a compiler, whatever else is missing."""
    try:
        compiler.find_compiler(kind)
    except compiler.BuildError:
        return False
    return True


def _compile(compiler: ModuleType, kind: str, folder: Path) -> Path:
    given = os.environ.get(ARCHS)
    library: Path
    try:
        archs = compiler.parse_archs(given) if given else compiler.WHEEL_ARCHS
        library = compiler.build(kind, folder, archs)
    except ValueError as error:
        raise SystemExit(f"{ARCHS}: {error}") from None
    except compiler.MissingError:
        raise
    except compiler.BuildError:
        # The folder goes with its log: show it now.
        log = folder / "build.log"
        if log.is_file():
            print(log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
        raise
    return library


def _load_compiler(root: Path) -> ModuleType:
    """The package's own ``ops/build.py``, without importing the package."""
    file = root / PACKAGE / "build.py"
    spec = importlib.util.spec_from_file_location("detfamily_ops_build", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
