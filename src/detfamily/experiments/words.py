"""The words of ``ablate``, ``sweep`` and ``rehearse``: files, settings of the command, overrides of every run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from detfamily.errors import ConfigError

RUNS_AT_ONCE = "how many runs at once"
"""What ``jobs`` is, in words."""


@dataclass(frozen=True)
class Words:
    """What was typed, in its three kinds.

    Attributes:
        files: files and folders.
        settings: of the command itself, such as ``jobs``; the last one counts where one is typed twice.
        overrides: of every run, in their order.
    """

    files: tuple[str, ...]
    settings: dict[str, str]
    overrides: tuple[str, ...]

    def one_file(self, what: str, usage: str) -> str:
        """The only file.

        Args:
            what: it should be, in words.
            usage: of the command.

        Raises:
            ConfigError: there is none, or several.
        """
        if len(self.files) != 1:
            given = f"{len(self.files)} are given: {', '.join(self.files)}" if self.files else "none is given"
            raise ConfigError(f"expected {what}, and {given}\nusage: {usage}")
        return self.files[0]


def read_words(
    words: Sequence[str], settings: Collection[str], is_setting: Callable[[str], bool] = lambda word: False
) -> Words:
    """Tell the three kinds apart.

    Args:
        words: as typed.
        settings: names of the command's own.
        is_setting: says it of a word that has no name among them.
    """
    files, own, overrides = [], {}, []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            files.append(word)
        elif key in settings or is_setting(word):
            own[key] = value
        else:
            overrides.append(word)
    return Words(tuple(files), own, tuple(overrides))


def positive(word: str, text: str, what: str = "a whole number") -> int:
    """A whole number, 1 or more.

    Raises:
        ConfigError: it is none.
    """
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{word}={text}: expected {what}, 1 or more")
    return int(text)
