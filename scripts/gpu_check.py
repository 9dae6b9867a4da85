"""Everything that has to be seen on a GPU, in one command: build, check, race, time; the report is a file to commit.

    python scripts/gpu_check.py                                       about ten minutes on one GPU
    python scripts/gpu_check.py --official CLONE/models/ops/src/cuda  also against the official kernels
    python scripts/gpu_check.py --only build tests                    some of the steps; the page keeps the others

Each step is a command of its own, so one that fails or runs out of time takes nothing with it. Checks run side by side,
then what is timed runs alone. What is not there (goldens, compute-sanitizer, another kernel) is said in the report.
Writes NAME.md and NAME.json into --output, NAME being the GPU's. Exits with 1 if a step failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from detfamily.files import write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
PYTHON = sys.executable
SANITIZED = "test_16_bit_values or test_number_of_queries or test_what_is_not_sampled or test_views"
"""Tests that the sanitizer watches: it makes kernels a hundred times slower."""

TESTED = (
    *("tests/ops/test_cuda.py", "tests/ops/test_compiled.py", "tests/ops/test_drop_in.py", "tests/ops/neighborhood"),
    *("tests/criterion/test_criterion.py", "tests/end_to_end/test_cuda.py"),
)
"""What does something else where there is a GPU."""

TAIL = 6000
TOLD = ("outcome", "seconds", "words", "record")


@dataclass
class Step:
    """One command and what became of it.

    Attributes:
        name: for --only.
        title: for the report.
        command: what is run; empty: what is missing is said in ``words``.
        seconds_allowed: after which it is ended.
        environment: on top of this process's.
        json: a file that the command writes, kept in the report.
        timed: what it says is a time, so nothing else may run beside it.
    """

    name: str
    title: str
    command: list[str] = field(default_factory=list)
    seconds_allowed: int = 300
    environment: dict[str, str] = field(default_factory=dict)
    json: Path | None = None
    words: str = ""
    timed: bool = False
    outcome: str = "not run"
    seconds: float = 0.0
    record: Any = None

    def run(self) -> None:
        if not self.command:
            self.outcome = "skipped"
            return
        started = time.perf_counter()
        environment = {**os.environ, **self.environment}
        try:
            done = subprocess.run(
                self.command,
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=self.seconds_allowed,
            )
            self.outcome, self.words = "passed" if done.returncode == 0 else "failed", done.stdout
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
            self.words = output.decode(errors="replace") if isinstance(output, bytes) else output
            self.outcome = f"ended after {self.seconds_allowed} s"
        self.seconds = time.perf_counter() - started
        if self.json is not None and self.json.is_file():
            self.record = json.loads(self.json.read_text())

    @property
    def failed(self) -> bool:
        return self.outcome not in ("passed", "skipped", "not run")


def script(name: str, *arguments: object) -> list[str]:
    return [PYTHON, str(SCRIPTS / name), *map(str, arguments)]


def steps(args: argparse.Namespace, folder: Path) -> list[Step]:
    makers: list[Callable[[argparse.Namespace, Path], Step]] = [
        build,
        doctor,
        machine_code,
        tests,
        goldens,
        lambda a, f: sanitizer("memcheck", "reads and writes out of bounds"),
        lambda a, f: sanitizer("racecheck", "races in shared memory"),
        op_float32,
        op_16_bits,
        neighborhood,
        neighborhood_with_bias,
        models,
        models_against_transformers,
        models_against_the_official_dino,
        training,
        matrix,
    ]
    made = [make(args, folder) for make in makers]
    cache = os.environ.get("DETFAMILY_CACHE", str(folder / "cache"))
    for step in made:  # one library for all, the one that the first step builds
        step.environment = {"DETFAMILY_CACHE": cache, **step.environment}
    return made


def doctor(args: argparse.Namespace, folder: Path) -> Step:
    return Step("doctor", "Versions, backends, a first check", [PYTHON, "-m", "detfamily", "doctor"])


def build(args: argparse.Namespace, folder: Path) -> Step:
    code = (
        "import time; from detfamily.ops import backends; start = time.perf_counter(); "
        "print(backends.library('cuda')); print(f'{time.perf_counter() - start:.1f} s'); "
        "raise SystemExit(backends.backend_for('cuda') != 'cuda')"
    )
    return Step("build", "Just-in-time build", [PYTHON, "-c", code], timed=True)


def machine_code(args: argparse.Namespace, folder: Path) -> Step:
    major, minor = torch.cuda.get_device_capability()
    return Step("sass", "Machine code", script("inspect_cuda.py", "--arch", f"{major}{minor}"))


def tests(args: argparse.Namespace, folder: Path) -> Step:
    command = [PYTHON, "-m", "pytest", "-q", *TESTED, "-p", "no:cacheprovider", "-rsf", "--tb=short"]
    command += ["--show-capture=no", "-W", "ignore"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(14, os.cpu_count() or 1))]
    return Step("tests", "Tests of the ops and of whole detectors", command, 900)


def goldens(args: argparse.Namespace, folder: Path) -> Step:
    title = "Golden cases of the op, on the GPU"
    if not args.goldens.is_dir():
        return Step("goldens", title, words=f"no folder {args.goldens}: pass --goldens")
    return Step("goldens", title, script("check_goldens.py", "--backend", "cuda", args.goldens))


def sanitizer(tool: str, what: str) -> Step:
    title = f"compute-sanitizer {tool}: {what}"
    if not shutil.which("compute-sanitizer"):
        return Step(tool, title, words="compute-sanitizer is not on the PATH")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    command += [PYTHON, "-m", "pytest", "-q", "-x", "tests/ops/test_compiled.py", "-p", "no:cacheprovider"]
    # pytorch's allocator hides what is read beyond a tensor, as one block holds several
    lone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, title, [*command, "-k", f"cuda and ({SANITIZED})"], 400, lone)


def rivals(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Arguments for benchmark_op, and the environment that they need."""
    names, environment = list(args.against), {}
    if args.official is not None:
        names.append("official:MSDeformAttnFunction")
        environment["OFFICIAL_OP"] = str(args.official.resolve())
    if importlib.util.find_spec("deformops"):
        names += ["deformops_op:triton"]
    words = [word for name in names for word in ("--against", name)]
    return ["--path", str(SCRIPTS / "rivals"), *words], environment


def op_float32(args: argparse.Namespace, folder: Path) -> Step:
    return _op("op-float32", "The op in float32", args, folder, "float32")


def op_16_bits(args: argparse.Namespace, folder: Path) -> Step:
    return _op("op-bfloat16", "The op in bfloat16", args, folder, "bfloat16")


def _op(name: str, title: str, args: argparse.Namespace, folder: Path, dtype: str) -> Step:
    more, environment = rivals(args)
    path = folder / f"{name}.json"
    options = ["--device", "cuda", "--dtypes", dtype, "--json", path]
    return Step(name, title, script("benchmark_op.py", *options, *more), 500, environment, path, timed=True)


def neighborhood(args: argparse.Namespace, folder: Path) -> Step:
    """Equality of all backends, then their speed; encoders have no biases."""
    return _neighborhood("neighborhood", "Neighborhood attention in bfloat16", folder, "--no-bias")


def neighborhood_with_bias(args: argparse.Namespace, folder: Path) -> Step:
    title = "Neighborhood attention in bfloat16, biases by relative position"
    return _neighborhood("neighborhood-bias", title, folder)


def _neighborhood(name: str, title: str, folder: Path, *more: str) -> Step:
    path = folder / f"{name}.json"
    options = ["--device", "cuda", "--dtype", "bfloat16", "--batch", "4", "--heads", "8"]
    options += ["--sizes", "14x14", "56x56", "100x134", "--json", path, *more]
    return Step(name, title, script("benchmark_neighborhood.py", *options), 500, json=path, timed=True)


def models(args: argparse.Namespace, folder: Path) -> Step:
    path = folder / "models.json"
    options = ["--device", "cuda", "--precision", "bf16", "--train-batch", "4", "--train-size", "800", "1066"]
    options += ["--inference-batch", "4", "--json", path]
    return Step("models", "Whole models, ours", script("benchmark_models.py", *options), 400, json=path, timed=True)


def models_against_transformers(args: argparse.Namespace, folder: Path) -> Step:
    title, name = "Whole models against Hugging Face's", "transformers"
    if not importlib.util.find_spec("transformers"):
        return Step(name, title, words="the package transformers is not installed")
    path = folder / "transformers.json"
    options = ["--device", "cuda", "--against", "transformers", "--train-batch", "4", "--train-size", "800", "1066"]
    options += ["--experiments", "deformable_detr_r50", "--json", path]
    return Step(name, title, script("benchmark_models.py", *options), 400, json=path, timed=True)


def models_against_the_official_dino(args: argparse.Namespace, folder: Path) -> Step:
    title, name = "DINO against the official one", "official-dino"
    if args.official_dino is None:
        return Step(name, title, words="no clone of the official code: pass --official-dino")
    path = folder / "official_dino.json"
    options = ["--device", "cuda", "--path", SCRIPTS / "rivals", "--against", "official_dino:dino"]
    options += ["--experiments", "dino_r50_4scale_12ep", "--train-size", "800", "1066", "--json", path]
    environment = {"OFFICIAL_DINO": str(args.official_dino.resolve())}
    command = script("benchmark_models.py", *options)
    return Step(name, title, command, 400, environment, path, timed=True)


def training(args: argparse.Namespace, folder: Path) -> Step:
    """A detector learns and is evaluated, on images that are drawn first."""
    command = [PYTHON, "-m", "detfamily", "train", "experiment=demo", "runtime=bf16", "tracking=files"]
    command += ["schedule.epochs=1", f"data.root={folder / 'shapes'}", f"output_dir={folder / 'run'}"]
    return Step("training", "An epoch of the demo in bfloat16", command, timed=True)


def matrix(args: argparse.Namespace, folder: Path) -> Step:
    """All attentions of an encoder at the size of a detector on COCO."""
    command = [PYTHON, "-m", "detfamily", "matrix", "families=[deformable_detr]", "backbones=[resnet50]"]
    command += ["runtime=bf16", "overrides=[]", "size=[800,1056]", f"output_dir={folder / 'matrix'}"]
    return Step("matrix", "Attentions in the encoder of Deformable DETR", command, 500, timed=True)


# -- the report -------------------------------------------------------------------------------------------------------


def as_markdown(machine: dict[str, str], done: list[Step]) -> str:
    lines = [f"# {machine['gpu']}", "", "Written by `scripts/gpu_check.py`.", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in machine.items()), ""]
    lines += ["| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {step.title} | {step.outcome} | {step.seconds:.0f} |" for step in done]
    for step in (one for one in done if one.outcome != "not run"):
        text = without_paths(step.words.strip())[-TAIL:]
        lines += ["", f"## {step.title}: {step.outcome}", ""]
        lines += [text] if is_table(text) else ["```text", text, "```"]
    return "\n".join(lines) + "\n"


def is_table(text: str) -> bool:
    return "|---|" in text


def without_paths(text: str) -> str:
    """What is printed about this machine's folders is of no use to others."""
    return re.sub(rf"{re.escape(str(ROOT))}/?", "", text).replace(str(Path.home()), "~")


def describe_machine() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="folder of the official ms_deform_im2col_cuda.cuh")
    parser.add_argument("--official-dino", type=Path, help="clone of IDEA-Research/DINO")
    parser.add_argument("--against", action="append", default=[], metavar="MODULE:FUNCTION", help="for benchmark_op.py")
    parser.add_argument("--goldens", type=Path, default=ROOT.parent / "shared" / "goldens" / "ms_deform_attn")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="names of steps")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: PyTorch finds no GPU here", file=sys.stderr)
        return 1
    args.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    name = re.sub(r"\W+", "-", machine["gpu"].lower()).strip("-")
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"gpu_check_{os.getpid()}"
    folder.mkdir()
    chosen = done = steps(args, folder)
    if args.only:
        unknown = set(args.only) - {step.name for step in done}
        if unknown:
            parser.error(f"--only {' '.join(sorted(unknown))}: expected some of {' '.join(step.name for step in done)}")
        chosen = [step for step in done if step.name in args.only]
        recall(done, args.output / f"{name}.json", machine)
    lock = threading.Lock()

    def go(step: Step) -> None:
        print(f"{step.title} ...", flush=True)
        step.run()
        with lock:
            failure = f"\n{step.words[-1500:]}" if step.failed else ""
            print(f"  {step.title}: {step.outcome}, {step.seconds:.0f} s{failure}", flush=True)
            # after every step: what was measured is kept if the next one takes the machine down
            write_text_atomically(args.output / f"{name}.md", as_markdown(machine, done))
            record = {"machine": machine, "steps": [as_record(one) for one in done]}
            write_text_atomically(args.output / f"{name}.json", json.dumps(record, indent=1) + "\n")

    try:
        for timed, some in itertools.groupby(chosen, key=lambda step: step.timed):
            with ThreadPoolExecutor(1 if timed else 8) as pool:
                list(pool.map(go, some))
    finally:
        shutil.rmtree(folder)
    print((args.output / f"{name}.md").read_text())
    return int(any(step.failed for step in chosen))


def recall(steps: list[Step], path: Path, machine: dict[str, str]) -> None:
    """Take over what an earlier call found on this very machine, by the file that it wrote."""
    if not path.is_file():
        return
    record = json.loads(path.read_text())
    if {**record["machine"], "date": ""} != {**machine, "date": ""}:
        return
    known = {one["name"]: one for one in record["steps"]}
    for step in steps:
        if before := known.get(step.name):
            step.outcome, step.seconds, step.words, step.record = (before[key] for key in TOLD)


def as_record(step: Step) -> dict[str, Any]:
    told = asdict(step)
    return {**{key: told[key] for key in ("name", "title", *TOLD)}, "words": without_paths(step.words)[-TAIL:]}


if __name__ == "__main__":
    sys.exit(main())
