"""Why published figures are not ours: the reasons hold where they are given, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from detfamily.config import configs_dir, groups
from detfamily.info import published
from detfamily.info.cost import Cost, MultiplyAdds, Parameters
from detfamily.info.published import CONVENTIONS, GFLOPS, PARAMETERS, REASONS, SIZE, Convention, compare, convention_of


class Known(Cost):
    """41.3 of 41.5 million trained, 41.6 stored; 100 G at SIZE and 120 G at 800 x 1333, 20 of them linear."""

    def __init__(self) -> None:
        self.parameters = Parameters({"all": 41_500_001}, {"all": 41_300_000}, stored=42_600_000)

    def work(self, size: tuple[int, int]) -> MultiplyAdds:
        rest = {SIZE: 80, (800, 1333): 100}[size]
        kinds = {"convolution": rest * 10**9, "linear": 20 * 10**9}
        return MultiplyAdds({}, kinds)


def reasons(entry: dict[str, Any], family: str = "detr", recipe: str = "some_recipe") -> tuple[str | None, str | None]:
    found = compare(recipe, entry, Known(), convention_of(family))
    return found.parameters_reason, found.gflops_reason


@pytest.mark.parametrize(
    ("printed", "reason"),
    [(41, None), (41.3, None), (41.2, "unknown"), (42, "frozen"), (43, "stored"), (44, "unknown")],
)
def test_parameters(printed: float, reason: str | None) -> None:
    assert reasons({"params_m": printed}) == (reason, None)


@pytest.mark.parametrize(
    ("family", "printed", "reason"),
    [
        ("detr", 100, None),
        ("detr", 103, "elements"),
        ("detr", 99, "unknown"),
        ("detr", 110, "unknown"),
        ("deformable_detr", 100, None),
        ("deformable_detr", 101, "unknown"),
        ("dab_detr", 100, "no linear"),
        ("dab_detr", 104, "no linear"),
        ("dab_detr", 120, "unknown"),
        ("a_new_family", 100, None),
        ("a_new_family", 103, "unknown"),
    ],
)
def test_gflops(family: str, printed: int, reason: str | None) -> None:
    assert reasons({"gflops": printed}, family) == (None, reason)


def test_what_is_not_printed_is_not_compared() -> None:
    found = compare("some_recipe", {"AP": 40.0}, Known(), convention_of("detr"))
    assert (found.counted_so, found.reasons) == (None, [])


def test_ours_are_counted_as_the_authors_did() -> None:
    only = Convention((800, 1333), ("convolution",), "no linear")
    assert compare("some_recipe", {"gflops": 101}, Known(), only).counted_so == 100 * 10**9


def test_exceptions_are_of_figures_that_are_published() -> None:
    folder = configs_dir() / "experiment"
    for key, table in (("params_m", PARAMETERS), ("gflops", GFLOPS)):
        for (recipe, figure), reason in table.items():
            entries = yaml.safe_load((folder / f"{recipe}.yaml").read_text())["published"]
            assert figure in [entry.get(key) for entry in entries] and reason in REASONS
            assert reasons({key: figure}, recipe=recipe)[key == "gflops"] == reason


def test_every_family_with_published_gflops_has_its_convention() -> None:
    assert set(CONVENTIONS) == set(groups()["family"])
    assert {one.reason for one in CONVENTIONS.values()} - {None} <= set(REASONS)
    assert published.SIZE[0] * published.SIZE[1] == pytest.approx(888477, rel=0.001)
