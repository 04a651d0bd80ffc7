"""An event reaches every observer, in order; an observer ignores what it does not define."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.running.observers import Estimate, Observer, Observers
from evomerge.running.store import RunStore
from tests.running.fakes import TIMING, recipe, scores

EVENTS: dict[str, tuple[Any, ...]] = {
    "phase": ("generation 0", 8, 0),
    "scored": (recipe(0), scores(0), TIMING),
    "generation_done": (0, 8.0, 0.5),
    "expected": (Estimate(made=0.0, search_ends=None, ends=None, cost=None, spent=None),),
    "noted": ("tried again",),
    "recorded": ("asked", {"generation": 0}),
}


def listener(name: str, heard: list[tuple[str, str, tuple[Any, ...]]]) -> Observer:
    """An observer that writes every event down."""
    methods = {event: lambda _, *values, event=event: heard.append((name, event, values)) for event in EVENTS}
    observer: Observer = type("Listener", (Observer,), methods)()
    return observer


def test_every_event_is_tested() -> None:
    methods = {name for name, _ in inspect.getmembers(Observer, inspect.isfunction) if name[0] != "_"}
    assert methods == EVENTS.keys()
    assert methods == {name for name in vars(Observers) if name[0] != "_"}


def test_events_reach_all_in_order() -> None:
    heard: list[tuple[str, str, tuple[Any, ...]]] = []
    everyone = Observers(listener("first", heard), Observer(), Observers(listener("second", heard)))
    for event, values in EVENTS.items():
        getattr(everyone, event)(*values)
    assert heard == [(name, event, EVENTS[event]) for event in EVENTS for name in ("first", "second")]


def test_the_store_reports_what_it_has_committed(tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []

    class Reads(Observer):
        def recorded(self, event: str, values: Any) -> None:
            with RunStore.read(tmp_path) as reader:
                seen.append((event, reader.has_ask(values["generation"])))

    with RunStore.create(tmp_path, {}) as store:
        store.report_to(Reads())
        store.record_ask(0, np.array([[0.25, 0.5]]), [recipe(0)])
    assert seen == [("asked", True)]
