"""The words of the launchers."""

from __future__ import annotations

import builtins

import pytest

from detfamily.errors import ConfigError
from detfamily.experiments.launchers.choice import default_jobs, is_option, make_launcher, read_options
from detfamily.experiments.launchers.local import LocalOptions
from detfamily.experiments.launchers.ray import RayOptions
from detfamily.experiments.launchers.slurm import SlurmOptions


def test_words_become_options():
    slurm = read_options(
        "slurm",
        {
            "slurm.partition": "gpu",
            "slurm.account": "4711",
            "slurm.time": "720",
            "slurm.mem_gb": "32",
            "slurm.setup": "[module load cuda, source env/bin/activate]",
            "slurm.additional": "{reservation: mine}",
        },
    )
    setup = ["module load cuda", "source env/bin/activate"]
    assert slurm == SlurmOptions(
        partition="gpu", account="4711", time=720, mem_gb=32, setup=setup, additional={"reservation": "mine"}
    )
    given = {key: value for key, value in slurm.parameters().items() if value is not None}
    assert given == {
        "timeout_min": 720,
        "gpus_per_node": 1,
        "mem_gb": 32,
        "slurm_partition": "gpu",
        "slurm_account": "4711",
        "slurm_signal_delay_s": 120,
        "slurm_setup": setup,
        "slurm_additional_parameters": {"reservation": "mine"},
    }
    assert read_options("ray", {"ray.address": "auto", "ray.num_gpus": "0.5"}) == RayOptions("auto", 2, 0.5)
    assert read_options("ray", {"ray.address": "null"}).address is None
    assert read_options("local", {}) == LocalOptions()
    assert is_option("slurm.time=720") and not is_option("optimizer.lr=1") and not is_option("local=mine")
    assert default_jobs("local") == 1 and default_jobs("slurm") is None


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("slrum", {}, "launcher=slrum: did you mean 'slurm'"),
        ("slurm", {"slurm.partitoin": "gpu"}, "no slurm.partitoin: did you mean 'slurm.partition'"),
        ("slurm", {"ray.num_gpus": "1"}, "ray.num_gpus=1 is a word of launcher=ray, and this is launcher=slurm"),
        ("slurm", {"slurm.time": "soon"}, "slurm.time: 'soon' given, expected"),
        ("slurm", {"slurm.time": "0"}, "slurm.time is 0; expected at least 1"),
        ("slurm", {"slurm.setup": "module load cuda"}, "slurm.setup: .* expected a list"),
        ("slurm", {"slurm.setup": "["}, "slurm.setup=. cannot be read"),
        ("slurm", {"slurm.cluster": "locl"}, "did you mean 'local'"),
        ("ray", {"ray.num_gpus": "1.5"}, "ray.num_gpus=1.5: expected a part of one GPU, or whole ones"),
        ("ray", {"ray.num_cpus": "-1"}, "ray.num_cpus=-1: expected 0 or more"),
        ("local", {"local.gpus": "0"}, "local.gpus is 0; expected at least 1"),
    ],
)
def test_mistakes_end_in_a_message(name, words, message):
    with pytest.raises(ConfigError, match=message):
        read_options(name, words)


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_what_is_not_installed_is_named_with_the_command(name, monkeypatch):
    found = builtins.__import__

    def without(module, *rest):
        if module in ("submitit", "ray"):
            raise ImportError(module)
        return found(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'detfamily\[launchers\]'"):
        make_launcher(read_options(name, {}), jobs=2)
