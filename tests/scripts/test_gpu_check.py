"""The check of GPU machines, as far as it goes without a GPU: its steps, its report, what it does when one fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Some GPU 9000", multi_processor_count=7, total_memory=2**35)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def test_without_a_gpu(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 1
    assert "finds no GPU" in capsys.readouterr().err


@pytest.mark.usefixtures("gpu")
def test_report(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step passes and leaves figures, one fails, one runs out of time, one cannot be done: all of it is told."""
    figures = tmp_path / "figures.json"
    code = f"print('| a |\\n|---|\\n| 1 |'); open({str(figures)!r}, 'w').write('[1, 2]')"
    python = sys.executable
    monkeypatch.setattr(
        gpu_check,
        "steps",
        lambda args, folder: [
            gpu_check.Step("good", "Good step", [python, "-c", code], json=figures),
            gpu_check.Step("bad", "Bad step", [python, "-c", f"print({str(SCRIPT)!r}); raise SystemExit('broken')"]),
            gpu_check.Step("slow", "Slow step", [python, "-c", "import time; time.sleep(60)"], seconds_allowed=1),
            gpu_check.Step("none", "Missing step", words="no such tool"),
        ],
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path / "out")])
    assert gpu_check.main() == 1
    text = (tmp_path / "out" / "some-gpu-9000.md").read_text()
    for words in ("Good step: passed", "| 1 |", "Bad step: failed", "broken", "ended after 1 s", "no such tool"):
        assert words in text
    assert str(SCRIPT.parents[1]) not in text
    record = json.loads((tmp_path / "out" / "some-gpu-9000.json").read_text())
    assert [step["outcome"] for step in record["steps"]] == ["passed", "failed", "ended after 1 s", "skipped"]
    assert record["steps"][0]["record"] == [1, 2]

    # one of them anew: the page keeps what the others said
    words = ["gpu_check.py", "--output", str(tmp_path / "out"), "--only", "good"]
    figures.unlink()
    monkeypatch.setattr(sys, "argv", words)
    assert gpu_check.main() == 0
    text = (tmp_path / "out" / "some-gpu-9000.md").read_text()
    assert "Good step: passed" in text and "Bad step: failed" in text and "broken" in text


@pytest.mark.usefixtures("gpu")
def test_every_step_is_a_command_that_exists(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scripts are there and know the options that they are given."""
    args = SimpleNamespace(official=tmp_path, official_dino=tmp_path, against=["a:b"], goldens=tmp_path)
    made = gpu_check.steps(args, tmp_path)
    assert len({step.name for step in made}) == len(made)
    for step in made:
        called = [Path(word) for word in step.command if word.endswith(".py") and "tests" not in word]
        for path in called:
            assert path.is_file()
            help_text = subprocess.run(
                [sys.executable, path, "--help"], capture_output=True, text=True, check=True
            ).stdout
            for option in (word for word in step.command if word.startswith("--")):
                assert option in help_text, f"{path.name} has no {option}"


@pytest.mark.usefixtures("gpu")
def test_unknown_step(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path), "--only", "buidl"])
    with pytest.raises(SystemExit):
        gpu_check.main()
