"""``detfamily doctor``: what it says, and that it notices wrong numbers."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from detfamily import cli, doctor
from detfamily.ops import backends, build


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEASURED", {"cpu": ((4, 5), (2, 3)), "cuda": ((4, 5), (2, 3))})
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_wish", None)


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not looked for libraries yet, and finds none."""

    def cached(kind: build.Kind, *_: object, **__: object) -> None:
        raise build.MissingError(f"no compiler for {kind}; install one")

    monkeypatch.setattr(backends, "_state", backends._State())
    monkeypatch.setattr(build, "cached", cached)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_compiled_code(nothing, capsys, recwarn):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    shown = {" ".join(line.split()[:2]): line for line in text.splitlines()}
    assert torch.__version__ in shown[f"torch {torch.__version__}"]
    assert shown["on cpu"].endswith("plain PyTorch: no compiler for cpu; install one")
    assert "no GPU" in shown["on cuda"] or "without CUDA" in shown["on cuda"]
    assert text.count("ok, float32") == 1 and text.count(" tokens") == 1
    assert not [one for one in recwarn if issubclass(one.category, RuntimeWarning)], "the reason is printed already"


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="g++ is not installed")
def test_with_compiled_code(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "compiled for this CPU" in text and "times as fast as plain PyTorch" in text
    assert text.count("ok, float32") >= 2


def wrong(form: Callable[..., Tensor], change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The op, but for one mistake that the exact numbers are spared."""

    def op(value: Tensor, shapes: object, places: Tensor, others: Tensor, *more: Tensor) -> Tensor:
        return form(value, shapes, places, others if value.dtype == torch.float64 else change(others), *more)

    return op


@pytest.mark.parametrize("name", ["ms_deform_attn", "ms_deform_attn_projected"])
@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.flip(-1),
        lambda one: 1.001 * one,
        lambda one: one * float("nan"),
        lambda one: one.detach() + 0 * one,
    ],
    ids=["swapped", "scaled", "nan", "gradient lost"],
)
def test_wrong_numbers_are_status_1(nothing, monkeypatch, capsys, name, change):
    monkeypatch.setattr(doctor, name, wrong(getattr(doctor, name), change))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor"])
    assert stopped.value.code == 1
    assert "WRONG, above" in capsys.readouterr().out


def test_a_backend_that_breaks_is_named(nothing, monkeypatch, capsys):
    def broken(*_: object) -> Tensor:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(doctor, "ms_deform_attn", broken)
    assert doctor._check("cpu", "reference") == (False, "FAILS in float32: no kernel image is available")


def test_a_forced_backend_that_is_not_there(nothing, monkeypatch, capsys):
    monkeypatch.setenv(backends.VARIABLE, "cpu")
    monkeypatch.setattr(backends, "_wish", "cpu")
    monkeypatch.setattr(backends, "_wish_by", "DETFAMILY_OP_BACKEND=cpu")
    with pytest.raises(SystemExit):
        cli.main(["doctor"])
    assert "DETFAMILY_OP_BACKEND=cpu asks for compiled code that is not there: no comp" in capsys.readouterr().out


def test_it_takes_no_settings(capsys):
    assert cli.main(["doctor", "backend=cpu"]) == 2
    assert "doctor takes no settings, and 'backend=cpu' is given" in capsys.readouterr().err
    assert cli.main(["doctor", "--cfg"]) == 2
    assert cli.main(["doctor", "--help"]) == 0
    assert "status 1 if it is wrong" in capsys.readouterr().out


def test_no_sample_is_near_the_border_of_a_cell():
    case = doctor._case(((5, 8), (3, 2)), batch=2, heads=3, width=4, points=2, queries=7)
    sizes = torch.tensor([(w, h) for h, w in case.shapes], dtype=torch.float64)
    cells = (case.references * sizes)[:, :, None, :, None] + case.offsets - 0.5
    assert cells.shape == (2, 7, 3, 2, 2, 2)
    fractions = cells - cells.floor()
    assert fractions.min() > 0.099 and fractions.max() < 0.901
    assert (cells < -1).any() and (cells > sizes[:, None]).any(), "some lie outside"
