"""The command line: what is printed, where, and with which exit status."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from detfamily import __version__, cli
from detfamily.config import configs_dir, groups_of
from detfamily.errors import DataError, ElsewhereError, LostWorkerError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def seen(monkeypatch, tmp_path) -> list:
    """A command ``toy`` on two small configs; the list collects the configs that it was run with."""
    (tmp_path / "size").mkdir()
    (tmp_path / "size/small.yaml").write_text("# @package _global_\nwidth: 8\n")
    (tmp_path / "size/large.yaml").write_text("# @package _global_\nwidth: 64\n")
    (tmp_path / "toy.yaml").write_text(
        "defaults:\n  - _self_\n  - size: small\nseed: 1\nwidth: 1\ntwice: ${seed}\n"
        "layer: {_target_: torch.nn.Linear, in_features: '${width}', out_features: 2}\n"
    )
    collected: list = []
    monkeypatch.setattr("detfamily.config.registry.configs_dir", lambda: tmp_path)
    monkeypatch.setattr(cli, "run_toy", collected.append, raising=False)
    toy = cli.Command("toy", "does next to nothing", "toy", "detfamily.cli:run_toy", ("size=large seed=3",))
    monkeypatch.setitem(cli.COMMANDS, "toy", toy)
    return collected


def test_a_command_composes_checks_and_runs(seen, capsys):
    assert cli.main(["toy", "size=large", "seed=3"]) == 0
    assert [(cfg.width, cfg.seed, cfg.twice) for cfg in seen] == [(64, 3, 3)]
    assert capsys.readouterr().err == ""


def test_a_command_on_a_checkpoint_gets_the_overrides_as_they_are(seen, capsys, monkeypatch):
    again = cli.Command("again", "twice", "toy", "detfamily.cli:run_toy", (), composed=False)
    monkeypatch.setitem(cli.COMMANDS, "again", again)
    assert cli.main(["again", "checkpoint=a.pt", "size=larg"]) == 0
    assert seen == [["checkpoint=a.pt", "size=larg"]]
    assert cli.main(["again", "--cfg"]) == 2
    assert "has no config of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toi"], "unknown command 'toi': did you mean 'toy'?"),
        (["toy", "--cgf"], "unknown option '--cgf': did you mean '--cfg'?"),
        (["toy", "size=larg"], "size has no choice 'larg': did you mean 'large'?"),
        (["toy", "sede=1"], "did you mean 'seed'?"),
        (["toy", "layer.in_features=x"], "layer.in_features: 'x' given, expected an integer"),
        (["toy", "--cfg", "layer.in_features=x"], "layer.in_features: 'x' given, expected an integer"),
    ],
)
def test_a_mistake_ends_in_one_message_and_status_2(seen, capsys, words, message):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("detfamily: ") and message in error and "Traceback" not in error
    assert not seen


def test_cfg_prints_the_resolved_config_and_does_not_run(seen, capsys):
    assert cli.main(["toy", "--cfg", "size=large", "seed=5"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["width"], printed["twice"], printed["layer"]["in_features"]) == (64, 5, 64)
    assert not seen


def test_errors_while_running_keep_their_words(seen, capsys, monkeypatch):
    def fail(cfg):
        raise DataError("image 7 is broken")

    monkeypatch.setattr(cli, "run_toy", fail)
    monkeypatch.delenv("DETFAMILY_DEBUG", raising=False)
    assert cli.main(["toy"]) == 2
    assert capsys.readouterr().err == "detfamily: image 7 is broken\n"
    monkeypatch.setenv("DETFAMILY_DEBUG", "1")
    with pytest.raises(DataError):
        cli.main(["toy"])


def test_a_fault_of_ours_is_not_hidden(seen, monkeypatch):
    monkeypatch.setattr(cli, "run_toy", lambda cfg: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["toy"])


def test_ctrl_c_is_status_130(seen, monkeypatch, capsys):
    def interrupt(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_toy", interrupt)
    assert cli.main(["toy"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_help_lists_what_there_is_to_choose_from(seen, capsys):
    assert cli.main(["toy", "-h"]) == 0
    text = capsys.readouterr().out
    assert "size  large  small" in text and "detfamily toy size=large seed=3" in text
    for words in ([], ["--help"]):
        assert cli.main(words) == 0
        assert re.search(r"^  toy +does next to nothing$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_its_config_and_its_function(name, capsys):
    command = cli.COMMANDS[name]
    assert command.config is None or (configs_dir() / f"{command.config}.yaml").is_file()
    module, _, function = command.function.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    shown = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")}
    for group, choices in groups_of(command.config).items() if command.config else ():
        assert set(shown[group]) <= set(choices) and shown[group]
    assert max(map(len, text.splitlines())) <= 120


def test_help_does_not_wait_for_torch():
    code = "import sys, detfamily.cli as cli; cli.main([]); cli.main(['train', '-h']); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    "words", [["-m", "detfamily", "train", "seed=x"], [str(ROOT / "scripts" / "train.py"), "seed=x"]]
)
def test_the_other_doors_lead_to_the_same_place(words, tmp_path):
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr == "detfamily: seed: 'x' given, expected an integer (default 0)\n"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"detfamily {__version__}\n"


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "said"),
    [
        (None, None, DataError("no"), "detfamily: no\n"),
        ("0", "0", ElsewhereError("gone"), "detfamily: gone\n"),
        ("1", "1", DataError("no"), ""),
        ("8", "0", DataError("no"), "detfamily, process 8: no\n"),
        ("8", "0", ElsewhereError("gone"), ""),
        ("9", "1", LostWorkerError("killed"), "detfamily, process 9: killed\n"),
    ],
)
def test_one_process_of_each_machine_reports_an_error(monkeypatch, capsys, rank, local_rank, error, said):
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)

    def fails(words):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fails)
    assert cli.main(["train"]) == cli.FAILED
    assert capsys.readouterr().err == said
