"""What is the CPU backend's own: threads and instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detfamily.ops import ms_deform_attn_projected

pytestmark = pytest.mark.usefixtures("compiled")


def test_the_number_of_threads_changes_no_bit(make_call: Callable[..., Any]) -> None:
    call = make_call(queries=150, heads=8, width=16)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaves = call.projected(torch.float32)
            output = ms_deform_attn_projected(leaves[0], call.shapes, *leaves[1:])
            runs.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


CHECK = """
import torch
from detfamily.ops import backends, ms_deform_attn_projected
assert "{words}" in backends.describe("cpu"), backends.describe("cpu")
shapes = ((5, 7), (3, 2))
for width in (5, 8, 16, 32, 64):
    generator = torch.Generator().manual_seed(width)
    def normal(*size):
        return torch.randn(*size, generator=generator)
    inputs = [normal(2, 41, 3, width), normal(2, 9, 2, 2), normal(2, 9, 3, 2, 4, 2), normal(2, 9, 3, 8)]
    outcomes = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        with backends.use_backend(backend):
            leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
            output = ms_deform_attn_projected(leaves[0], shapes, *leaves[1:])
            outcomes.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize(("isa", "words"), [("baseline", "no vector"), ("avx2", "AVX2"), ("avx512", "AVX-512")])
def test_every_instruction_set(isa: str, words: str) -> None:
    flags = {"avx2": "avx2", "avx512": "avx512dq"}.get(isa)
    if flags and f" {flags} " not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {words}")
    environment = {**os.environ, "DETFAMILY_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", CHECK.format(words=words)], check=True, env=environment)


def test_an_instruction_set_that_is_not_there() -> None:
    environment = {**os.environ, "DETFAMILY_CPU_ISA": "avx3"}
    code = CHECK.format(words="").replace("outcomes.append", "print(1); outcomes.append")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode and "DETFAMILY_CPU_ISA names no instruction set" in done.stderr
