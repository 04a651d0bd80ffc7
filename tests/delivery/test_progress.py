"""Live progress: what it says with a terminal, without one, and after failures."""

from __future__ import annotations

import io
import re
from datetime import datetime

from rich.console import Console

from evomerge import steps
from evomerge.delivery.progress import Live
from evomerge.evaluation.scores import Failure
from evomerge.running.observers import Estimate
from tests.running.fakes import TIMING, recipe, scores


def play(console: Console) -> None:
    end = datetime(2026, 11, 23, 3, 40).timestamp()
    estimate = Estimate(made=end - 3600, search_ends=end - 2880, ends=end, cost=5.2, spent=1.25)
    with Live(console) as live:
        live.phase("base and parents", 3, 1)
        live.phase("generation 0", 4, 0)
        for number in range(3):
            live.scored(recipe(number), scores(number), TIMING)
        live.scored(recipe(9), Failure(kind="error", reason="odd [/dev/shm/x] [red]"), None)
        live.noted("tried again [twice]")
        live.expected(estimate)
        live.generation_done(0, 4, 0.523)
        live.phase("generation 1", 4, 0)


def test_in_a_file_there_is_a_line_per_phase_and_per_failure() -> None:
    out = io.StringIO()
    play(Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert lines[0] == "base and parents: 3 models"
    assert lines[1] == "search started"
    assert lines[2] == f"failed: {recipe(9).hash[:12]}: odd [/dev/shm/x] [red]"
    assert lines[3] == "tried again [twice]"
    assert lines[4].endswith("run ends about 03:40, cost 1.25 of about 5.20")
    assert lines[4].startswith("generation 0: best 52 points, 1 failed, search ends in about 12 min, run")


def test_on_a_terminal_best_failures_and_time_left_are_shown() -> None:
    out = io.StringIO()
    play(Console(file=out, width=120, force_terminal=True, color_system=None))
    text = out.getvalue()
    assert "best 52 points, 1 failed" in text
    assert "search ends in about 12 min, run ends about 03:40" in text


def test_narrow_terminals_keep_bar_best_and_end_in_one_line() -> None:
    out = io.StringIO()
    play(Console(file=out, width=80, force_terminal=True, color_system=None))
    frames = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).split("\r")]
    last = next(frame for frame in reversed(frames) if "generation 1" in frame)
    assert "best 52 points, 1 failed, ends 03:40" in last
    assert len(last) <= 80


def test_steps_of_the_start_are_shown_until_something_is_scored() -> None:
    out = io.StringIO()
    with Live(Console(file=out, width=80, force_terminal=True, color_system=None)) as live:
        steps.say("tokenising 3/7 tasks")
        live._bar.refresh()
        live.phase("base and parents", 3, 0)
        steps.say("tokenising 4/7 tasks")
        live._bar.refresh()
    steps.say("without a listener")
    assert "tokenising 3/7 tasks" in out.getvalue()
    assert "4/7" not in out.getvalue()
