"""What tells two runs apart: the keys of their configs, their winners, and the winners' scores on `test`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evomerge.delivery import style
from evomerge.delivery.figures import group_label
from evomerge.delivery.summary import Summary
from evomerge.merging.recipe import Recipe
from evomerge.running.store import ID, facts

MOST = 30
"""Rows of a table in the terminal; `--json` has all."""


def as_data(first: Summary, second: Summary) -> dict[str, Any]:
    """Return the differences of two runs as plain data: pairs of values, None where a run has none."""
    pair = (first, second)
    configs = [facts.CONFIG.require(summary.store) for summary in pair]
    recipes = [None if s.winner is None else _by_group(s.winner.recipe) for s in pair]
    return {
        "runs": [str(summary.store.folder) for summary in pair],
        "same_suite": len({facts.SUITE_DIGEST.require(summary.store) for summary in pair}) == 1,
        "config": differences(configs[0], configs[1]),
        "winners": [_winner(summary) for summary in pair],
        "recipe": None if None in recipes else differences(recipes[0], recipes[1]),
    }


def differences(first: Any, second: Any, place: str = "") -> dict[str, list[Any]]:
    """Return the keys in which two nested values differ, dotted, with both values.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": [1]})
    {'a.c': [2, 3], 'd': [None, [1]]}
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        found: dict[str, list[Any]] = {}
        for key in dict.fromkeys((*first, *second)):
            found |= differences(first.get(key), second.get(key), f"{place}.{key}" if place else str(key))
        return found
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        found = {}
        for number, values in enumerate(zip(first, second, strict=True)):
            found |= differences(values[0], values[1], f"{place}[{number}]")
        return found
    return {} if first == second else {place: [first, second]}


def _by_group(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain data with its groups by their labels, where no two share one."""
    data = recipe.to_data()
    labels = [group_label(recipe, number) for number in range(len(recipe.groups))]
    if len({*labels, *data}) < len(labels) + len(data):
        return data
    groups = [{**group.pop("parameters", {}), **group} for group in data.pop("groups")]
    return {**data, **dict(zip(labels, groups, strict=True))}


def _winner(summary: Summary) -> dict[str, Any] | None:
    rows = summary.rows()
    row = next((row for row in rows if row.role == "winner"), None)
    if row is None:
        return None
    verdict = summary.verdict(rows)
    return {
        "name": row.name,
        "id": row.recipe[:ID],
        "mean": [row.mean.estimate, row.mean.low, row.mean.high],
        "tasks": {task: [i.estimate, i.low, i.high] for task, i in row.tasks.items()},
        "verdict": None if verdict is None else verdict.sentence,
        "level": None if verdict is None else verdict.level,
    }


def text(data: dict[str, Any]) -> RenderableType:
    """Return the data of `as_data` as tables for a rich console."""
    names = [f"A: {data['runs'][0]}", f"B: {data['runs'][1]}"]
    parts: list[RenderableType] = [Text("\n".join(names))]
    if data["config"]:
        parts.append(_differing("config", data["config"]))
    else:
        parts.append(Text("\nthe configs are equal"))
    first, second = data["winners"]
    if first is None and second is None:
        return Group(*parts, Text("no winners yet"))
    parts.append(_scores(first, second))
    if not data["same_suite"]:
        parts.append(Text("the suites differ, so the scores may be on other items", style="yellow"))
    for letter, winner in (("A", first), ("B", second)):
        verdict = "no winner yet" if winner is None else winner["verdict"] or "no verdict"
        parts.append(Text(f"{letter}: {verdict}"))
    if data["recipe"]:
        parts.append(_differing("winner's recipe", data["recipe"]))
    elif data["recipe"] is not None:
        parts.append(Text("the winners are one recipe"))
    return Group(*parts)


def _differing(title: str, found: Mapping[str, list[Any]]) -> Table:
    more = len(found) - MOST
    caption = f"and {more} more: --json has them" if more > 0 else None
    table = style.table(style.words(title), style.words("A"), style.words("B"), caption=caption)
    for key, values in list(found.items())[:MOST]:
        table.add_row(Text(key), *(Text(_value(value)) for value in values))
    return table


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return style.MISSING if value is None else str(value)


def _scores(first: dict[str, Any] | None, second: dict[str, Any] | None) -> Table:
    table = style.table(style.words("winners on test"), style.numbers("A"), style.numbers("B"))
    shown = [winner or {"mean": None, "tasks": {}} for winner in (first, second)]
    table.add_row("mean, points", *(_score(winner["mean"]) for winner in shown))
    for task in dict.fromkeys(task for winner in shown for task in winner["tasks"]):
        table.add_row(Text(f"{task}, %"), *(_score(winner["tasks"].get(task)) for winner in shown))
    return table


def _score(interval: list[float] | None) -> str:
    if interval is None:
        return style.MISSING
    estimate, low, high = interval
    return f"{style.percent(estimate)} {style.bounds(low, high)}"
