"""What is typed: its three kinds, and what is said of wrong ones."""

from __future__ import annotations

import pytest

from detfamily.errors import ConfigError
from detfamily.experiments.words import positive, read_words


def test_files_settings_and_overrides_are_told_apart():
    typed = read_words(
        ["a.yaml", "jobs=1", "~model.x", "+y=2", "slurm.time=3", "jobs=2", "model.jobs=4"],
        ("jobs", "seeds"),
        lambda word: word.startswith("slurm."),
    )
    assert typed.files == ("a.yaml",)
    assert typed.settings == {"jobs": "2", "slurm.time": "3"}
    assert typed.overrides == ("~model.x", "+y=2", "model.jobs=4")


@pytest.mark.parametrize(("words", "given"), [([], "none is given"), (["a", "b"], "2 are given: a, b")])
def test_one_file_is_expected(words, given):
    with pytest.raises(ConfigError, match=f"expected one table, and {given}\nusage: do it"):
        read_words(words, ()).one_file("one table", "do it")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", ""])
def test_what_is_no_positive_number_is_named(text):
    with pytest.raises(ConfigError, match=f"jobs={text}: expected how many, 1 or more"):
        positive("jobs", text, "how many")
    assert positive("jobs", "12") == 12
