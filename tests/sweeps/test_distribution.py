from __future__ import annotations

import math
from random import Random

import pytest

from detfamily.sweeps.distribution import Choice, Integer, LogUniform, Uniform, override_words, read_distribution


def test_files_say_what_values_there_are():
    assert read_distribution({"log_uniform": ["1e-4", 1.0]}) == LogUniform(1e-4, 1.0)
    assert read_distribution({"uniform": [-1, 1]}) == Uniform(-1.0, 1.0)
    assert read_distribution({"int": [2, 4]}) == Integer(2, 4)
    assert read_distribution({"choice": ["a", 1, None, True]}) == Choice(("a", 1, None, True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0.1, "expected one of"),
        ({"uniform": [0, 1], "int": [0, 1]}, "expected one of"),
        ({"loguniform": [1, 2]}, "did you mean 'log_uniform'"),
        ({"uniform": 3}, "uniform: expected a list"),
        ({"uniform": [1]}, "the lowest and the highest value, not 1 values"),
        ({"uniform": [2, 1]}, "the lower one first"),
        ({"uniform": ["low", 1]}, "expected a number, not 'low'"),
        ({"uniform": [0, math.inf]}, "expected two numbers"),
        ({"log_uniform": [0, 1]}, "above 0"),
        ({"int": [1.5, 2]}, "expected a whole number, not 1.5"),
        ({"int": [3, 3]}, "the lower one first"),
        ({"choice": []}, "at least one"),
        ({"choice": [1, 1]}, "different values"),
        ({"choice": [[1, 2]]}, "in quotes"),
    ],
)
def test_mistakes_say_what_was_expected(given, message):
    with pytest.raises(ValueError, match=message):
        read_distribution(given)


def test_values_are_drawn_from_the_whole_range_and_only_from_it():
    random = Random(0)
    drawn = [LogUniform(1e-4, 1e-2).draw(random) for _ in range(2000)]
    assert 1e-4 <= min(drawn) < 1.1e-4 and 9e-3 < max(drawn) <= 1e-2
    assert 0.45 < sum(one < 1e-3 for one in drawn) / 2000 < 0.55  # as many in each factor of ten
    drawn = [Uniform(0, 1).draw(random) for _ in range(2000)]
    assert 0.45 < sum(one < 0.5 for one in drawn) / 2000 < 0.55
    assert {Integer(2, 4).draw(random) for _ in range(100)} == {2, 3, 4}
    assert {Choice(("a", None)).draw(random) for _ in range(100)} == {"a", None}


def test_values_are_written_as_overrides():
    point = {"a.b": 1e-05, "c": None, "d": True, "e": "[x,y]", "f": 3}
    assert override_words(point) == ("a.b=1e-05", "c=null", "d=true", "e=[x,y]", "f=3")
