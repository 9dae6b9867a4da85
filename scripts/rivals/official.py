"""The official CUDA op on today's torch, as a rival for ``benchmark_op.py``; only its kernels are used, from a clone.

export OFFICIAL_OP=.../Deformable-DETR/models/ops/src/cuda
python scripts/benchmark_op.py --path scripts/rivals --against official:MSDeformAttnFunction
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EMPTY = ("ATen/ATen.h", "ATen/cuda/CUDAContext.h", "THC/THCAtomics.cuh")
"""Headers that the kernels include without need."""


def compile_library(kernels: Path, target: Path, arch: str) -> None:
    """Compile the official header ``ms_deform_im2col_cuda.cuh`` of a folder into a library of two ops."""
    if not (kernels / "ms_deform_im2col_cuda.cuh").is_file():
        raise SystemExit(f"OFFICIAL_OP={kernels}: expected the folder of ms_deform_im2col_cuda.cuh")
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        for name in EMPTY:
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).touch()
        command = [os.environ.get("NVCC", "nvcc"), "-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC", "-w"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        command += [f"-I{folder}", f"-I{kernels}", f"-I{torch_folder / 'include'}"]
        command += [str(Path(__file__).with_suffix(".cu")), "-o", str(target)]
        command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-cudart", "static", "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the official kernels do not compile:\n{done.stderr[-2000:]}")


def load() -> None:
    kernels = os.environ.get("OFFICIAL_OP")
    if not kernels:
        raise SystemExit("OFFICIAL_OP is not set: the folder of the official ms_deform_im2col_cuda.cuh")
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "official.so"
        compile_library(Path(kernels), library, f"{major}{minor}")
        torch.ops.load_library(library)


class MSDeformAttnFunction(torch.autograd.Function):
    """With the official arguments."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, step: int
    ) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        output: Tensor = torch.ops.official_ms_deform_attn.forward(value, shapes, starts, locations, weights, step)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        value, locations, weights = torch.ops.official_ms_deform_attn.backward(*saved, grad.contiguous(), ctx.step)
        return value, None, None, locations, weights, None


if torch.cuda.is_available():
    load()
