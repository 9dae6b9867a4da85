from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/inspect_cuda.py"

NAME = "_ZN9detfamily4cuda15backward_kernelIfLi4ELi8ELb1ENS0_5PlainIfEEEEvNS0_7ProblemEPKT_S7_T3_"
USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function {name}:
  REG:72 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:1136 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	code for sm_{arch}
		Function : {name}
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
"""
GOOD = ["LDS.128 R4, [R32]", *4 * ["LDG.E.128.CONSTANT R16, desc[UR10][R56.64]"], *4 * ["FFMA R16, R16, R28, RZ"]]
GOOD += [*4 * ["@P0 REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR10][R64.64], R16"], "@!P5 BRA 0x0000"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inspect_cuda", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["inspect_cuda"] = module
    spec.loader.exec_module(module)
    return module


def listing(script: ModuleType, code: list[str], arch: int = 90, stack: int = 0, name: str = NAME) -> ModuleType:
    lines = [f"        /*{16 * i:04x}*/                   {text} ;   /* 0x0000 */" for i, text in enumerate(code)]
    sass = SASS.format(arch=arch, name=name) + "\n".join(lines)
    return script.parse(sass, USAGE.format(name=name, stack=stack))[0]


def test_a_kernel_as_it_was_meant(script: ModuleType) -> None:
    kernel = listing(script, GOOD)
    assert kernel.label == "backward float32 plain D=32"
    assert (kernel.arch, kernel.registers, kernel.stack) == (90, 72, 0)
    assert (kernel.wide_loads, kernel.vector_reductions, kernel.scalar_reductions, kernel.local_accesses) == (
        4,
        4,
        0,
        0,
    )
    assert kernel.per_sample == len(GOOD) * 8 / 32
    assert kernel.faults() == []
    assert kernel.label in script.report([kernel])


def test_what_is_wrong_is_said(script: ModuleType) -> None:
    scalar = [text.replace(".F32x4", ".F32") for text in GOOD]
    assert "vector reductions" in listing(script, scalar).faults()[0]
    assert listing(script, scalar, arch=80).faults() == []
    narrow = [text.replace(".128", ".64") for text in GOOD]
    assert "loads of 16 bytes" in listing(script, narrow).faults()[0]
    assert "local memory" in listing(script, [*GOOD, "STL [R1], R4"]).faults()[0]
    assert "local memory" in listing(script, GOOD, stack=8).faults()[0]
    assert "compare-and-swap" in listing(script, [*GOOD, "ATOMS.CAST.SPIN R25, [R26], R24, R25"]).faults()[0]


def test_other_kernels_need_not_be_fast(script: ModuleType) -> None:
    kernel = listing(script, ["LDG.E R4, [R2]", "STL [R1], R4"], name=NAME.replace("Lb1", "Lb0"))
    assert kernel.label == "backward float32 plain 16 bytes a lane"
    assert kernel.faults() == []


def test_the_kernels_of_this_package(script: ModuleType, tmp_path: Path) -> None:
    cuobjdump = script.find_cuobjdump()
    if shutil.which("nvcc") is None or cuobjdump is None:
        pytest.skip(f"no {'nvcc' if shutil.which('nvcc') is None else 'cuobjdump'}")
    kernels = script.read_kernels(script.compile_kernels(90, tmp_path), cuobjdump)
    assert {kernel.label: kernel.faults() for kernel in kernels if kernel.faults()} == {}
    fast = {kernel.label for kernel in kernels if kernel.fast}
    assert fast == {
        f"{way} {kind} {form} D={width}"
        for way in ("forward", "backward")
        for kind in ("float32", "float16", "bfloat16")
        for form in ("plain", "projected")
        for width in (16, 32, 64)
    }
