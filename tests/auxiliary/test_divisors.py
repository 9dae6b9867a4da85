"""What is averaged over processes, with two of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from detfamily.auxiliary.divisors import mean_over_processes

SCRIPT = """
import json, sys, torch
import torch.distributed as dist
from detfamily.auxiliary.divisors import mean_over_processes

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
mine = (torch.tensor([1.0, 5.0]) * (1 + 2 * rank)).requires_grad_()
mean = mean_over_processes(mine)
print(json.dumps([mean.tolist(), mean.requires_grad, mine.tolist()]))
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store")] for rank in range(2)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    found = [json.loads(one.communicate(timeout=600)[0].splitlines()[-1]) for one in both]
    assert found == [[[2.0, 10.0], False, [1.0, 5.0]], [[2.0, 10.0], False, [3.0, 15.0]]]


def test_one_process() -> None:
    own = torch.tensor(3.5, requires_grad=True)
    mean = mean_over_processes(own)
    assert mean.item() == 3.5 and not mean.requires_grad
