"""All runs on one screen."""

from __future__ import annotations

import io
import json

from rich.console import Console

from detfamily.experiments import screen
from detfamily.experiments.notes import note
from detfamily.experiments.screen import Progress, Screen


def epoch(run, number: int, **changes) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    row = {"epoch": number, "AP": 0.1 * number, "images_per_second": 70.25, "seconds_left": 3725.0, **changes}
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def drawn(runs, height: int = 30) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=height, color_system=None)
    shown = Screen(runs, "AP", print, console)
    with console.capture() as captured:
        console.print(shown.picture())
    return [line.rstrip() for line in captured.get().splitlines()]


def test_each_run_says_how_far_it_is(run_of):
    running, waiting, failed = run_of("plain"), run_of("refined"), run_of("plain", 1)
    evaluated = run_of("no NMS", source=running)
    shown = Screen([running, evaluated, waiting, failed], "AP", print, Console(force_terminal=True, height=30))
    epoch(running, 1)
    epoch(running, 2)
    note(running.folder, status="running")
    note(failed.folder, status="failed")
    cells = [shown.progress[run.folder].cells(shown._status(run.folder)) for run in (running, waiting, failed)]
    assert cells[0][:6] == ("plain", "0", "running", "2/3", "20.0", "70.2")
    assert cells[0][6] in ("1:02:05", "1:02:04"), "what was left when the epoch ended, less the time since"
    assert cells[1] == ("refined", "0", "waiting", "0/3", "", "", "")
    assert cells[2][2] == "failed"
    assert shown.progress[evaluated.folder].cells(None)[3] == "evaluated only"
    # One that was left running by a call that was killed does not run.
    assert Screen([running], "AP", print)._status(running.folder) == "cut off"


def test_where_there_is_not_room_for_all_those_that_run_are_shown(run_of):
    runs = [run_of("plain", seed) for seed in range(8)]
    for run in runs:
        run.folder.mkdir(parents=True)
    for run in runs[:6]:
        note(run.folder, status="finished")
        (run.folder / "metrics.json").write_text("{}")
    note(runs[7].folder, status="failed")
    lines = drawn(runs, height=screen.MARGIN + 2)
    assert lines[0].split() == ["row", "seed", "status", "epoch", "AP", "images/s", "left"]
    assert [line.split()[1:3] for line in lines[1:3]] == [["6", "waiting"], ["7", "failed"]]
    assert lines[3] == "1 failed, 1 waiting, 6 finished; 6 more than there is room for"


def test_without_a_terminal_lines_go_where_they_went(run_of):
    said: list[str] = []
    run = run_of()
    with Screen([run], "AP", said.append, Console(file=io.StringIO())) as shown:
        shown.say("a line")
        shown.draw()
    assert said == ["a line"] and not shown.shows_epochs


def test_epochs_are_told_once(run_of):
    run = run_of()
    epoch(run, 1)
    progress = Progress(run)
    assert [row["epoch"] for row in progress.new()] == [1] and progress.new() == []
    epoch(run, 2, AP=None)
    assert [sorted(row) for row in progress.new()] == [["epoch", "images_per_second", "seconds_left"]]
