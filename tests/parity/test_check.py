"""The check passes on what the official code gave, and on nothing else."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from detfamily.errors import DataError
from detfamily.ops import backends
from detfamily.parity.case import MUST_COMPARE, role_of
from detfamily.parity.check import check, report

Copy = Callable[..., Path]
FAMILIES = ("detr", "deformable_detr", "coco_eval", "ms_deform_attn", "swin")
BY_SCRIPT = ("conditional_detr", "dab_detr", "dab_deformable_detr", "dn_dab_detr", "dn_dab_deformable_detr", "dino")
"""Families whose rounding hangs on the machine unless MKL is told before torch loads, which the script does."""
SCRIPT = Path(__file__).parents[2] / "scripts" / "check_goldens.py"


def rewrite(case: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the stored tensors of a case."""
    tensors = load_file(case / "io.safetensors")
    change(tensors)
    save_file(tensors, case / "io.safetensors")


def printed(folder: Path) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    passed = report(check([folder]), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return passed, text


@pytest.mark.parametrize("family", FAMILIES)
def test_all_stored_cases_pass_with_nothing_left_uncompared(goldens: Path, family: str) -> None:
    threads = torch.get_num_threads()
    verdicts = check([goldens / family])
    assert torch.get_num_threads() == threads
    assert {one.name for one in verdicts} == {
        f"{family}/{p.parent.name}" for p in goldens.glob(f"{family}/*/case.json")
    }
    for one in verdicts:
        assert one.passed and not one.missing and not one.failed and not one.error, one
        assert one.compared >= must_compare(goldens / one.name)


@pytest.fixture(scope="module")
def said(goldens: Path) -> str:
    """What the script says on all families that are to be run by it."""
    folders = [str(goldens / family) for family in BY_SCRIPT if (goldens / family).is_dir()]
    done = by_script(*folders)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("family", BY_SCRIPT)
def test_the_script_passes_all_stored_cases_with_nothing_left_uncompared(goldens: Path, said: str, family: str) -> None:
    names = {f"{family}/{path.parent.name}" for path in goldens.glob(f"{family}/*/case.json")}
    if not names:
        pytest.skip(f"no golden case of {family}")
    rows = re.findall(rf"│ ({family}/\w+)\s+│ (\d+)\s+│.*│ ok │", said)
    assert {name for name, _ in rows} == names
    for name, compared in rows:
        assert int(compared) >= must_compare(goldens / name)


def must_compare(case: Path) -> int:
    """How many stored tensors have a role that demands a comparison; at least one thing must be compared."""
    path = case / "io.safetensors"
    stored = load_file(path) if path.is_file() else {}
    return max(sum(role_of(key, case) in MUST_COMPARE for key in stored), 1)


def by_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own."""
    path = os.pathsep.join(filter(None, [str(SCRIPT.parents[1] / "src"), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


def beyond_the_limit(key: str, value: Tensor, role: str) -> Tensor:
    """The tensor with one number changed by a few times what FORMAT.md allows."""
    changed = value.clone()
    flat = changed.view(-1)
    index = flat.numel() // 2
    if not flat.is_floating_point():  # indices, counts, masks
        flat[index] = int(flat[index] == 0)
        return changed
    largest = float(value.nan_to_num().abs().max())
    number = 0.0 if flat[index].isnan() else float(flat[index])
    step = {
        "output": 1e-4 * max(1, largest),
        "loss": 6e-5 * abs(number) + 3e-6,
        "gradient": 6e-4 * largest + 3e-4 * (largest < 1e-5) + 3e-6,
        "training": 3e-3 if ".param." in key else 3e-3 * abs(number),
        "detections": 1e-4 if key.endswith("scores") else 6e-3,
    }[role]
    flat[index] = number + (step if number <= 0 else -step)
    return changed


@pytest.mark.parametrize(
    "name", ["detr/postnorm", "deformable_detr/two_stage", "detr/empty_image", "dino/4scale_train", "dino/empty_image"]
)
def test_every_single_number_counts(copy_of: Copy, name: str) -> None:
    """Each result is altered in one place: each must be found, by itself."""
    case = copy_of(name)
    roles: dict[str, str] = {}

    def change(tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            role = role_of(key, case)
            if role in MUST_COMPARE and value.numel() and not key.endswith("labels"):
                # of the three parts of detections the worst is named, so one image has one and one the other
                if role == "detections" and ("scores" in key) != key.startswith("post.0"):
                    continue
                roles[key] = role
                tensors[key] = beyond_the_limit(key, value, role)

    rewrite(case, change)
    (verdict,) = check([case])
    assert {"output", "loss", "match", "detections", "gradient"} <= set(roles.values())
    assert set(verdict.failed) == set(roles)
    assert not verdict.passed and not verdict.error and not verdict.missing


OTHER = {"core_float64": "float32", "module": "float64"}
"""The precision in which the cases of the op run besides the one that they are stored in."""


def in_both(name: str, keys: Iterable[str]) -> set[str]:
    """What the check calls these results; at whole pixels location gradients are compared in float64 only."""
    both = {key: f"{key} in {OTHER[name]}" for key in keys}
    one_sided = {key for key in both if key.startswith("exact_") and key.endswith("grad_sampling_locations")}
    return {*both, *(other for key, other in both.items() if key not in one_sided and "init" not in key)}


@pytest.mark.parametrize("backend", [backends.REFERENCE, "cpu"])
@pytest.mark.parametrize("name", OTHER)
def test_the_op_in_both_precisions_on_each_backend(goldens: Path, name: str, backend: str) -> None:
    if backend == "cpu" and (reason := backends.library("cpu").reason):
        pytest.skip(f"no compiled code for the CPU: {reason}")
    folder = goldens / "ms_deform_attn" / name
    keys = load_file(folder / "io.safetensors")
    wanted = {key for key in keys if role_of(key, folder) in MUST_COMPARE or "init" in key}
    with backends.use_backend(backend):
        (verdict,) = check([folder])
    assert verdict.passed and verdict.compared == len(in_both(name, wanted)), verdict


@pytest.mark.parametrize("name", OTHER)
def test_every_single_number_of_the_op_counts(copy_of: Copy, name: str) -> None:
    case = copy_of(f"ms_deform_attn/{name}")
    altered: set[str] = set()

    def change(tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            role = "output" if "init" in key else role_of(key, case)
            if role in MUST_COMPARE:
                altered.add(key)
                tensors[key] = beyond_the_limit(key, value, role)

    rewrite(case, change)
    with backends.use_backend(backends.REFERENCE):
        (verdict,) = check([case])
    assert len(altered) > 40 and set(verdict.failed) == in_both(name, altered)
    assert not verdict.passed and not verdict.error and not verdict.missing


@pytest.mark.parametrize("name", ["dino/cdn", "dino/functions", "dino/4scale_eval"])
def test_every_single_number_counts_without_training(copy_of: Copy, name: str) -> None:
    """Of noise alone, which is compared though a check is given it, of functions, and of a detector in evaluation."""
    case = copy_of(name)
    altered: set[str] = set()

    def change(tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            role = role_of(key, case)
            role = (
                "output" if re.search(r"(^|\.)cdn\.(?!draw\.)", key) else role
            )  # compared, though a check is given it
            if role in MUST_COMPARE and value.numel() and role != "detections":
                altered.add(key)
                tensors[key] = beyond_the_limit(key, value, role)

    rewrite(case, change)
    (verdict,) = check([case])
    assert len(altered) > 25 and set(verdict.failed) == altered
    assert not verdict.passed and not verdict.error and not verdict.missing


def test_either_gradient_is_right_where_the_official_ones_disagree(copy_of: Copy) -> None:
    case = copy_of("ms_deform_attn/core_float64")
    key, other = "exact_odd.grad_sampling_locations", "exact_odd.cuda_rule.grad_sampling_locations"

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors[key], tensors[other] = tensors[other], tensors[key]  # they differ where they disagree, only

    with backends.use_backend(backends.REFERENCE):
        rewrite(case, swap)
        (verdict,) = check([case])
        assert verdict.passed
        nowhere = torch.zeros_like(load_file(case / "io.safetensors")["exact_odd.disagree"])
        rewrite(case, lambda tensors: tensors.update({"exact_odd.disagree": nowhere}))
        (verdict,) = check([case])
        assert verdict.failed == [key]


def test_sub_cases_of_the_op_have_any_name(copy_of: Copy) -> None:
    core, module = copy_of("ms_deform_attn/core_float64"), copy_of("ms_deform_attn/module")
    with backends.use_backend(backends.REFERENCE):
        before = check([core, module])

    def core_names(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            new = key.replace("d8.", "group.wide.").replace("official.", "").replace("exact_odd.", "exact_other.")
            tensors[new] = tensors.pop(key)

    def module_names(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            if key.startswith("b."):
                tensors[f"second.{key[2:]}"] = tensors.pop(key)
        tensors["second.init_64_1_8_2.sampling_offsets.weight"] = torch.zeros(32, 64)

    rewrite(core, core_names)
    rewrite(module, module_names)
    info = json.loads((module / "case.json").read_text())
    info["args_second"] = info.pop("args_b")
    (module / "case.json").write_text(json.dumps(info))
    with backends.use_backend(backends.REFERENCE):
        after = check([core, module])
    assert all(one.passed for one in (*before, *after)), after
    assert [one.compared for one in after] == [before[0].compared, before[1].compared + 1]
    rewrite(core, lambda tensors: tensors.update({"orphan.output": torch.zeros(1, dtype=torch.float64)}))
    with backends.use_backend(backends.REFERENCE):
        (verdict,) = check([core])
    assert verdict.missing == ["orphan.output", "orphan.output in float32"] and not verdict.passed


def test_only_some_families_leave_the_cpu(copy_of: Copy) -> None:
    (verdict,) = check([copy_of("detr/postnorm")], device="cuda")
    assert "computed on the CPU only, not on cuda" in verdict.error and not verdict.passed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_op_on_a_gpu(goldens: Path) -> None:
    assert all(one.passed for one in check([goldens / "ms_deform_attn"], device="cuda"))


def one_more(key: str, index: int, by: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[index] += by

    return change


@pytest.mark.parametrize(
    ("key", "index", "by"),
    [
        ("out.aux.0.pred_logits", 37, 2e-4),
        ("match.aux.0.1.src", 1, 1),
        ("match.0.src", 0, 1000),  # no such query
        ("post.1.labels", 5, 1),
        ("grad.input_proj.bias", 2, float("nan")),
    ],
)
def test_one_altered_number_is_found(copy_of: Copy, key: str, index: int, by: float) -> None:
    case = copy_of("detr/postnorm")
    rewrite(case, one_more(key, index, by))
    passed, text = printed(case)
    assert not passed and "FAILED" in text
    assert re.search(rf"detr/postnorm: \d+ beyond the limit: .*{re.escape(key)}", text), text


@pytest.mark.parametrize(("key", "by"), [("pixels.resized.0", 3), ("crop.1.boxes", 0.1), ("hflip.0.boxes", 0.1)])
def test_one_altered_number_of_the_data_pipeline_is_found(copy_of: Copy, key: str, by: float) -> None:
    case = copy_of("detr/data_transforms")

    def change(tensors: dict[str, Tensor]) -> None:
        flat = tensors[key].view(-1)
        flat[4] = flat[4] + by if flat[4] < 128 else flat[4] - by

    rewrite(case, change)
    (verdict,) = check([case])
    assert verdict.failed == [key] and not verdict.passed


def test_numbers_in_the_json_of_a_case_count_too(copy_of: Copy) -> None:
    case = copy_of("detr/data_transforms")
    info = json.loads((case / "case.json").read_text())
    info["data"]["resize_sizes"][3]["result_hw"][1] += 1
    (case / "case.json").write_text(json.dumps(info))
    (verdict,) = check([case])
    assert verdict.failed == ["resize_sizes.3"]

    case = copy_of("coco_eval/basic")
    info = json.loads((case / "case.json").read_text())
    info["stats"][4] += 1e-6
    (case / "case.json").write_text(json.dumps(info))
    (verdict,) = check([case])
    name = info["stats_names"][4]
    assert sorted(verdict.failed) == [f"faster.stats.{name}", f"pycocotools.stats.{name}"] and not verdict.passed


def test_an_altered_input_or_weight_shows(copy_of: Copy) -> None:
    case = copy_of("detr/postnorm")
    rewrite(case, one_more("features.0", 100, 0.1))
    (verdict,) = check([case])
    assert "out.pred_boxes" in verdict.failed
    case = copy_of("deformable_detr/two_stage")
    weights = load_file(case / "weights.safetensors")
    weights["transformer.enc_output.bias"][0] += 0.1
    save_file(weights, case / "weights.safetensors")
    (verdict,) = check([case])
    assert "out.enc.pred_logits" in verdict.failed


def test_a_result_less_is_fine_and_one_that_we_do_not_compute_is_not(copy_of: Copy) -> None:
    case = copy_of("detr/postnorm")
    (before,) = check([case])
    rewrite(case, lambda tensors: [tensors.pop(key) for key in ("out.pred_boxes", "loss.loss_ce_0")] and None)
    (after,) = check([case])
    assert after.passed and after.compared == before.compared - 2
    rewrite(case, lambda tensors: tensors.update({"out.pred_angles": torch.zeros(2)}))
    passed, text = printed(case)
    assert not passed and "detr/postnorm: 1 results not computed: out.pred_angles" in text
    rewrite(case, lambda tensors: tensors.update({"something": torch.zeros(2)}))
    (verdict,) = check([case])
    assert not verdict.passed and "roles.json has no rule for 'something'" in verdict.error


def test_an_unknown_family_fails_with_the_nearest_name(copy_of: Copy) -> None:
    passed, text = printed(copy_of("detr/postnorm", family="deformable-detr"))
    assert not passed and "unknown family 'deformable-detr'" in text and "'deformable_detr'" in text


def test_broken_cases_fail_and_do_not_hide_the_others(copy_of: Copy, tmp_path: Path) -> None:
    good = copy_of("coco_eval/basic")
    without = copy_of("detr/empty_image")
    (without / "case.json").unlink()
    unreadable = copy_of("deformable_detr/base")
    (unreadable / "case.json").write_text("{")
    short = copy_of("detr/postnorm")
    (short / "io.safetensors").write_bytes((short / "io.safetensors").read_bytes()[:1000])
    unweighted = copy_of("deformable_detr/two_stage")
    (unweighted / "weights.safetensors").unlink()
    verdicts = {one.name: one for one in check([tmp_path / "cases"])}
    assert len(verdicts) == 5
    assert verdicts["coco_eval/basic"].passed
    assert "empty_image is not a golden case" in verdicts["detr/empty_image"].error
    assert "base is not a golden case" in verdicts["deformable_detr/base"].error
    for name in ("detr/postnorm", "deformable_detr/two_stage"):
        assert verdicts[name].error and not verdicts[name].passed
    with pytest.raises(DataError, match="no golden case"):
        check([good, tmp_path / "elsewhere"])


def test_a_case_that_stores_nothing_to_compare_fails(copy_of: Copy) -> None:
    case = copy_of("detr/data_transforms")
    info = json.loads((case / "case.json").read_text())
    info["data"] = {"convert": []}
    (case / "case.json").write_text(json.dumps(info))
    save_file({"pixels.in": torch.zeros(1)}, case / "io.safetensors")
    passed, text = printed(case)
    assert not passed and "nothing to compare" in text


def test_exit_codes_of_the_script(
    copy_of: Copy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = copy_of("coco_eval/basic"), copy_of("coco_eval/b")
    info = json.loads((bad / "case.json").read_text())
    info["AP_per_category"][next(iter(info["AP_per_category"]))] += 0.01
    (bad / "case.json").write_text(json.dumps(info))
    done = by_script("--backend", "reference", str(tmp_path / "cases"))
    assert done.returncode == 1, done.stderr
    assert re.search(r"coco_eval/b\b.*FAILED", done.stdout) and re.search(r"coco_eval/basic\b.*ok", done.stdout)
    assert "multi-scale deformable attention on cpu: plain PyTorch" in done.stdout
    monkeypatch.chdir(good)
    for arguments, code, said in (
        (["--backend=reference", "."], 0, "coco_eval/basic"),
        (["--backend=reference", str(tmp_path / "elsewhere")], 1, "no golden case"),
        (["--backend=cpu", "--device=cuda", "."], 1, "cannot serve tensors on cuda"),
        (["--backend=fastest", "."], 2, "invalid choice: 'fastest'"),
    ):
        monkeypatch.setattr(sys, "argv", ["check_goldens.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        captured = capsys.readouterr()
        assert stopped.value.code == code and said in captured.out + captured.err
