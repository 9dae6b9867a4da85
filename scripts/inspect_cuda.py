"""Read the machine code of the CUDA kernels: is it what was meant?

    python scripts/inspect_cuda.py                 # compiles the kernels for sm_90
    python scripts/inspect_cuda.py --arch 120
    python scripts/inspect_cuda.py libdetfamily_cuda.so

Prints for every kernel its registers, stack, and how it reads and adds. Exits with 1 if a kernel of the fast path (16
bytes a lane, D known) uses local memory, reads without 16-byte loads, or, from sm_90 on, adds without vector
reductions; or if any kernel adds in a compare-and-swap loop. Needs cuobjdump, and nvcc to compile; no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "src/detfamily/ops/csrc"
TYPES = {"f": "float32", "d": "float64", "Half": "float16", "BFloat16": "bfloat16"}
VECTOR_REDUCTIONS = 90
"""The first architecture that adds 16 bytes at once."""


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code: instructions by address, in order.

    Attributes:
        name: mangled.
        arch: 90 for sm_90.
        registers: of a thread.
        stack: bytes of a thread's local memory.
    """

    name: str
    arch: int
    registers: int
    stack: int
    code: tuple[tuple[int, str], ...]

    @property
    def parameters(self) -> re.Match[str] | None:
        """Direction, value type, channels and lanes, of the two kernels that do the work; None for the small ones."""
        types = r"(?:(?P<simple>[fd])|NS\d*_\d+(?P<named>Half|BFloat16)E)"
        numbers = r"Li(?P<channels>\d+)ELi(?P<lanes>\d+)ELb(?P<exact>[01])E"
        return re.search(
            rf"(?P<way>forward|backward)_kernelI{types}{numbers}NS\d*_\d+(?P<form>Plain|Projected)", self.name
        )

    @property
    def fast(self) -> bool:
        return self.parameters is not None and self.parameters["exact"] == "1"

    @property
    def label(self) -> str:
        found = self.parameters
        if found is None:
            small = re.search(r"\d([a-z_]+_kernel)", self.name)
            return small[1] if small else self.name
        channels, lanes = int(found["channels"]), int(found["lanes"])
        width = f"D={channels * lanes}" if self.fast else "16 bytes a lane" if channels > 1 else "any D"
        return f"{found['way']} {TYPES[found['simple'] or found['named']]} {found['form'].lower()} {width}"

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, text)) for _, text in self.code)

    @property
    def wide_loads(self) -> int:
        return self.count(r"LDG\S*\.128")

    @property
    def vector_reductions(self) -> int:
        return self.count(r"(?:REDG?|ATOMG?)\S*F32x4")

    @property
    def scalar_reductions(self) -> int:
        return self.count(r"(?:REDG?|ATOMG?)\b(?!\S*F32x4)")

    @property
    def swap_loops(self) -> int:
        return self.count(r"ATOMS?\S*\.CAS")

    @property
    def local_accesses(self) -> int:
        return self.count(r"(?:LDL|STL)\b")

    @property
    def per_sample(self) -> float | None:
        """Instructions of a warp for each query, head and sample, in the loop over the samples."""
        found = self.parameters
        if found is None or not self.fast:
            return None
        bodies = ([text for at, text in self.code if start <= at <= end] for start, end in self._loops())
        loops = ((len(body), sum(text.startswith("LDG") and ".128" in text for text in body)) for body in bodies)
        size, loads = min(((size, loads) for size, loads in loops if loads >= 4), default=(0, 4))
        return size / (loads / 4) * int(found["lanes"]) / 32 if size else None

    def _loops(self) -> list[tuple[int, int]]:
        targets = ((at, re.match(r"BRA\S* .*?(0x[0-9a-f]+)", text)) for at, text in self.code)
        return [(int(found[1], 16), at) for at, found in targets if found and int(found[1], 16) <= at]

    def faults(self) -> list[str]:
        """What is not as it was meant."""
        faults = [f"{self.swap_loops} compare-and-swap loops"] if self.swap_loops else []
        if not self.fast:
            return faults
        if self.stack or self.local_accesses:
            faults.append(f"{self.stack} bytes of local memory, {self.local_accesses} accesses")
        if self.wide_loads < 4:
            faults.append(f"{self.wide_loads} loads of 16 bytes, expected one for each corner")
        if self.label.startswith("backward") and self.arch >= VECTOR_REDUCTIONS and self.vector_reductions < 4:
            faults.append(f"{self.vector_reductions} vector reductions, expected one for each corner")
        return faults


def find_cuobjdump() -> str | None:
    """On the PATH, beside nvcc, or in Triton's package."""
    if found := shutil.which("cuobjdump"):
        return found
    folders = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc")] if nvcc]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return next((found for folder in folders if (found := shutil.which("cuobjdump", path=str(folder)))), None)


def compile_kernels(arch: int, folder: Path) -> Path:
    """cuda.cu to machine code for one architecture.

    Raises:
        FileNotFoundError: no nvcc, or no torch.
        subprocess.CalledProcessError: nvcc fails; its output has gone to stderr.
    """
    nvcc = shutil.which("nvcc")
    torch = importlib.util.find_spec("torch")
    if nvcc is None or torch is None or torch.origin is None:
        raise FileNotFoundError(f"no {'nvcc on the PATH' if nvcc is None else 'torch'} to compile with")
    output = folder / f"cuda_{arch}.cubin"
    flags = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-cubin", f"-arch=sm_{arch}"]
    include = ["-I", str(Path(torch.origin).parent / "include"), "-I", str(SOURCES)]
    subprocess.run([nvcc, *flags, *include, str(SOURCES / "cuda.cu"), "-o", str(output)], check=True)
    return output


def read_kernels(path: Path, cuobjdump: str) -> list[Kernel]:
    """Every kernel of a .cubin, or of a library for all its architectures."""

    def dump(option: str) -> str:
        return subprocess.run([cuobjdump, option, str(path)], check=True, capture_output=True, text=True).stdout

    return parse(dump("-sass"), dump("-res-usage"))


def parse(sass: str, usage: str) -> list[Kernel]:
    """Kernels from what cuobjdump prints."""
    resources: dict[tuple[int, str], tuple[int, int]] = {}
    arch = 0
    lines = usage.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        arch = _arch(line, arch)
        if (named := re.match(r"\s*Function (\S+):", line)) and (
            used := re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", following)
        ):
            resources[arch, named[1]] = int(used[1]), int(used[2]) + int(used[3])
    kernels: dict[tuple[int, str], list[tuple[int, str]]] = {}
    code: list[tuple[int, str]] = []
    arch = 0
    for line in sass.splitlines():
        arch = _arch(line, arch)
        if named := re.match(r"\s*Function : (\S+)", line):
            code = kernels.setdefault((arch, named[1]), [])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?)\s*;", line):
            code.append((int(found[1], 16), found[2]))
    # of a .cubin, which is for one architecture only, the usage does not say for which
    used_by = {key: resources.get(key) or resources[0, key[1]] for key in kernels}
    return [Kernel(name, arch, *used_by[arch, name], tuple(code)) for (arch, name), code in kernels.items()]


def _arch(line: str, before: int) -> int:
    found = re.match(r"\s*(?:arch =|\.target|code for) sm_(\d+)", line)
    return int(found[1]) if found else before


def report(kernels: list[Kernel]) -> str:
    """A table; instructions are those of a warp for each query, head and sample."""
    rows: list[tuple[str, ...]] = [
        ("kernel", "sm", "regs", "stack", "16-byte loads", "vector adds", "other adds", "local", "instructions")
    ]
    for one in sorted(kernels, key=lambda one: (one.arch, not one.fast, one.label)):
        numbers = (one.arch, one.registers, one.stack, one.wide_loads, one.vector_reductions, one.scalar_reductions)
        instructions = "" if one.per_sample is None else f"{one.per_sample:.1f}"
        rows.append((one.label, *map(str, numbers), str(one.local_accesses), instructions))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", nargs="?", type=Path, help="a .cubin or a compiled library; compiled if it is missing")
    parser.add_argument("--arch", type=int, default=90, help="what to compile for (default: 90)")
    arguments = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("inspect_cuda: no cuobjdump on the PATH, beside nvcc or in Triton's package", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = arguments.file or compile_kernels(arguments.arch, Path(folder))
            kernels = read_kernels(file, cuobjdump)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"inspect_cuda: {error}", file=sys.stderr)
        return 2
    print(report(kernels))
    faults = [f"{one.label} (sm_{one.arch}): {fault}" for one in kernels for fault in one.faults()]
    if not any(one.fast for one in kernels):
        faults.append("there is no kernel of the fast path")
    print("\n".join(["", *faults] if faults else ["", "all as meant"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
