"""What a sweep leaves for people: a table of all trials as Markdown, and a picture."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from detfamily.experiments.results import FINISHED
from detfamily.files import write_text_atomically
from detfamily.sweeps.distribution import override_words, short
from detfamily.sweeps.plots import plot_trials
from detfamily.sweeps.request import Recipe
from detfamily.sweeps.sweep import Sweep
from detfamily.sweeps.trial import Trial

TABLE, PICTURE = "trials.md", "trials.png"
_NO_MATTER = ("data.root=", "tracking", "runtime.threads=", "runtime.num_workers=")
"""Overrides that say nothing of what was trained."""


def write_report(recipe: Recipe, trials: Sequence[Trial], method: str, folder: Path) -> Path:
    """Write ``trials.md`` and ``trials.png``, as far as there is something to draw.

    Args:
        recipe: what the trials share.
        trials: all that were started.
        method: how the values were chosen, in a word.
        folder: of the sweep.

    Returns:
        The table's file.
    """
    sweep = recipe.sweep
    ordered = sorted(trials, key=lambda one: one.number)
    pictured = plot_trials(sweep, ordered, folder / PICTURE)
    parts = [f"# {sweep.title}", describe(recipe, method), table(sweep, ordered)]
    if (found := best(sweep, ordered)) is not None:
        words = [f"experiment={sweep.base}", *recipe.words, *override_words(found.point)]
        words = [one for one in dict.fromkeys(words) if not one.startswith(_NO_MATTER)]
        command = shlex.join(["detfamily", sweep.task.command, *words])
        parts.append(
            f"Best: trial {found.number}, {sweep.label} {sweep.shown(found.value)}. By hand:\n\n```bash\n{command}\n```"
        )
    parts += [f"![{sweep.label} against each parameter]({PICTURE})"] if pictured else []
    write_text_atomically(folder / TABLE, "\n\n".join(parts) + "\n")
    return folder / TABLE


def best(sweep: Sweep, trials: Sequence[Trial]) -> Trial | None:
    """The finished trial with the best value; of equal ones the first."""
    finished = [one for one in trials if one.state == FINISHED and one.value is not None]
    sign = 1 if sweep.maximizes else -1
    return max(finished, key=lambda one: sign * (one.value or 0.0), default=None)


def describe(recipe: Recipe, method: str) -> str:
    """What was varied on what, in a sentence."""
    sweep = recipe.sweep
    given = [one for one in recipe.words if not one.startswith(("experiment=", "+scale=", *_NO_MATTER))]
    also = f", with `{shlex.join(given)}`" if given else ""
    return (
        f"`{sweep.base}` on `scale={sweep.scale}`{also}; method {method}, seed {sweep.seed}, "
        f"{sweep.direction}s {sweep.label} after the last epoch."
    )


def table(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """A line per trial; the best one's value is bold."""
    keys, first = list(sweep.parameters), best(sweep, trials)
    rows = [["trial", *keys, sweep.label, "state", "epochs", "seconds"]]
    for one in trials:
        value = sweep.shown(one.value)
        values = [short(one.point[key]) if key in one.point else "" for key in keys]
        state = one.state if one.error is None else f"{one.state}: {_cell(one.error)}"
        shown = f"**{value}**" if one is first else value
        rows.append([str(one.number), *map(_cell, values), shown, state, str(one.epochs), f"{one.seconds:.0f}"])
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def _cell(text: str, most: int = 80) -> str:
    line = (text.splitlines() or [""])[0].replace("|", "\\|")
    return line if len(line) <= most else line[:most] + "..."
