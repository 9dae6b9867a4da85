from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from detfamily.visualize.curves import plot_curves


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, to look into."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def lines(figure: Figure, panel: int) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in figure.axes[panel].lines
    }


def test_the_accuracy_of_a_classifier_on_the_right(tmp_path: Path, figures: list[Figure]) -> None:
    plot_curves([{"epoch": 1, "loss": 2.0, "top1": 0.25, "top5": 0.5, "val_loss": 1.0}], tmp_path / "curves.png")
    assert lines(figures[0], 1) == {"top1": [(1, 0.25)], "top5": [(1, 0.5)]}
    assert figures[0].axes[1].get_ylabel() == "accuracy (fraction)"


def test_loss_on_the_left_and_ap_where_present_on_the_right(tmp_path: Path, figures: list[Figure]) -> None:
    history = [
        {"epoch": 0, "images_seen": 100, "loss": 9.0, "lr": 1e-4},
        {"epoch": 1, "images_seen": 200, "loss": 7.0, "lr": 1e-4, "AP": 0.1, "AP50": 0.3, "APs": 0.0, "APl": -1.0},
        {"epoch": 2, "images_seen": 300, "loss": math.inf, "lr": 1e-4, "AP": 0.2, "AP50": 0.4, "APs": -1.0},
    ]
    path = tmp_path / "new" / "curves.png"
    plot_curves(history, path)
    left, right = lines(figures[0], 0), lines(figures[0], 1)
    assert left["loss"][:2] == [(100, 9.0), (200, 7.0)] and math.isnan(left["loss"][2][1])
    assert right["AP"] == [(200, 0.1), (300, 0.2)] and right["AP50"] == [(200, 0.3), (300, 0.4)]
    assert right["APs"][0] == (200, 0.0) and math.isnan(right["APs"][1][1])
    assert set(right) == {"AP", "AP50", "APs"}
    assert [panel.get_xlabel() for panel in figures[0].axes] == ["images seen"] * 2
    assert Image.open(path).format == "PNG" and list(path.parent.iterdir()) == [path]


def test_epoch_is_the_axis_where_images_are_not_counted(tmp_path: Path, figures: list[Figure]) -> None:
    plot_curves([{"epoch": 3, "loss": 1.0}, {"epoch": 4, "loss": 0.5, "images_seen": 9}], tmp_path / "curves.png")
    assert lines(figures[0], 0)["loss"] == [(3, 1.0), (4, 0.5)]
    assert figures[0].axes[0].get_xlabel() == "epoch"
    assert figures[0].axes[1].get_legend() is None


@pytest.mark.parametrize("row", [{"epoch": 0, "loss": 3.0}, {"epoch": 0, "AP": 0.5}, {"images_seen": 5}])
def test_one_row_is_enough(tmp_path: Path, row: dict[str, float]) -> None:
    plot_curves([row], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 800


def test_no_rows_or_no_axis_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 rows of metrics: need at least one"):
        plot_curves([], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="all with 'epoch'"):
        plot_curves([{"epoch": 0, "loss": 3.0}, {"loss": 2.0}], tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_the_backend_of_the_user_stays(tmp_path: Path) -> None:
    before = matplotlib.get_backend()
    plot_curves([{"epoch": 0, "loss": 3.0}], tmp_path / "curves.png")
    assert matplotlib.get_backend() == before
