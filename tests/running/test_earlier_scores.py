"""Scores of another run are copied where the same work would give the same bits, and nowhere else."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import evomerge
from evomerge import compose
from evomerge.api.configs import read
from evomerge.config import RunConfig
from evomerge.delivery.candidate import as_data
from evomerge.delivery.progress import Silent
from evomerge.delivery.spending import spending
from evomerge.delivery.summary import Summary
from evomerge.errors import UserError
from evomerge.running.earlier_scores import obstacles
from evomerge.running.store import StoreReader, facts
from evomerge.running.store.file import FILE
from evomerge.stored import StoredRun
from tests.running import quick

SPLITS = ("search", "select", "test")


class Counting(quick.InProcess):
    """Knows which jobs it was given, by the recipe's hash and the split; it has weights, like a workbench."""

    jobs: ClassVar[list[tuple[str, str]]] = []

    def run(self, jobs: Any) -> Any:
        for result in super().run(jobs):
            recipe, split = result.job.recipe.hash, result.job.split
            type(self).jobs.append((recipe, split))
            yield replace(result, weights=f"bfloat16 {recipe}" if split == "test" else None)


@pytest.fixture
def run(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[StoreReader, list[tuple[str, str]]]]:
    """Run a config; return its store and the jobs that were executed."""
    monkeypatch.setattr(compose.executors, "build", lambda _, worker: Counting(worker))

    def begin(name: str, **changes: Any) -> tuple[StoreReader, list[tuple[str, str]]]:
        settings = {"budget": {"generations": 1}, "out": str(tmp_path / name), **changes}
        path = config(generate=False, **settings)
        Counting.jobs = []
        compose.start(RunConfig.load(path), Silent())
        return StoreReader.read(tmp_path / name), Counting.jobs

    return begin


def references(store: StoreReader) -> set[str]:
    roles = ("base", "parent", "baseline")
    return {named.recipe.hash for role in roles for named in store.entries(role)}


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_run_that_copies_scores_ends_in_the_same_bits(run: Any, tmp_path: Path, blocks: int) -> None:
    racing = {"blocks": blocks, "error": 0.5}
    with run("first", racing=racing)[0] as first:
        known = references(first)
    other = {"racing": racing, "optimizer": {"name": "cma_es", "population": 6}}
    alone, executed = run("alone", **other)
    assert known & {recipe for recipe, _ in executed} == known
    copying, executed = run("copying", scores_from=str(tmp_path / "first"), **other)
    with alone, copying:
        assert copying.digest() == alone.digest()
        assert not [job for job in executed if job[0] in known and job[1] == "search"]
        for split in SPLITS:
            assert copying.scored_blocks(split) == alone.scored_blocks(split)
    _, executed = run("copying", scores_from=str(tmp_path / "first"), **other)
    assert executed == []  # all of it is stored, and a copy is not made again


@pytest.mark.end_to_end
def test_blocks_of_another_seed_are_not_copied_but_select_and_test_are(run: Any, tmp_path: Path) -> None:
    with run("first")[0] as first:
        known = references(first)
        drawn = {named.recipe.hash for named in first.entries("baseline") if "dare" in named.name.lower()}
        tested = {recipe for recipe in first.scored_blocks("test") if recipe in known}
    with run("alone", seed=1)[0] as alone:
        digest = alone.digest()
    second, executed = run("second", seed=1, scores_from=str(tmp_path / "first"))
    with second:
        assert second.digest() == digest
    assert {recipe for recipe, split in executed if split == "search"} & known == known - drawn
    assert tested
    assert not tested & {recipe for recipe, split in executed if split == "test"}


@pytest.mark.end_to_end
def test_a_run_goes_on_without_the_run_whose_scores_it_took(run: Any, tmp_path: Path) -> None:
    run("first")
    copied = {"scores_from": str(tmp_path / "first")}
    run("second", **copied)
    shutil.rmtree(tmp_path / "first")
    run("alone")
    with run("alone", budget={"generations": 2})[0] as alone:
        digest = alone.digest()
    store, _ = run("second", budget={"generations": 2}, **copied)
    with store:
        assert store.digest() == digest


@pytest.mark.end_to_end
def test_what_was_copied_is_said_and_not_counted_as_time(run: Any, tmp_path: Path) -> None:
    run("first")
    run("second", scores_from=str(tmp_path / "first"), optimizer={"name": "cma_es", "population": 6})
    with StoredRun.read(tmp_path / "second") as stored:
        summary = Summary(stored)
        parts = {part.part: part for part in spending(summary).parts}
        hand_made = parts["base, parents, baselines"]
        assert hand_made.copied == hand_made.items
        assert hand_made.seconds == 0
        assert parts["test"].copied > 0
        assert parts["candidates"].copied < parts["candidates"].items
        assert parts["candidates"].seconds
        base = stored.store.entries("base")[0].recipe.hash
        data = as_data(summary, base)
    assert data["splits"]["search"]["copied_from"] == "first"
    assert data["splits"]["search"]["worker"] is None
    assert "models whose scores were copied from the run first" in str(
        evomerge.load(tmp_path / "second").report()
    )


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"executor": {"name": "inline", "threads": 1, "batch_size": 16}}, "batch_size: 32 there, 16 here"),
        ({"stored_text": 0}, "stored text: 4000 there, 0 here"),
        ({"base": "upper"}, "other models there, or in another order"),
        ({"suite": "another"}, "another suite, or other task files there"),
    ],
)
def test_a_run_with_other_work_gives_no_scores(
    run: Any, tiny_zoo: Path, tmp_path: Path, changes: dict[str, Any], got: str
) -> None:
    run("first")
    if "base" in changes:
        sources = {"upper": str(tiny_zoo / "base"), "reverse": str(tiny_zoo / "reverse")}
        changes = {"models": {"base": str(tiny_zoo / "upper"), "sources": sources}}
    if "suite" in changes:
        text = (tmp_path / "suite.yaml").read_text().replace("search: 24", "search: 18")
        (tmp_path / "other.yaml").write_text(text)
        changes = {"suite": str(tmp_path / "other.yaml")}
    with pytest.raises(UserError, match=r"scores_from: the scores of .*first can't be this run's") as error:
        run("second", scores_from=str(tmp_path / "first"), **changes)
    assert got in str(error.value.got)
    assert not (tmp_path / "second").exists()


def test_a_missing_run_is_said_before_anything_begins(run: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scores_from: there is no run"):
        run("second", scores_from=str(tmp_path / "nowhere"))
    assert not (tmp_path / "second").exists()


def test_weights_of_tasks_and_of_the_objective_may_differ(run: Any, tmp_path: Path) -> None:
    with run("first")[0] as first:
        known = references(first)
    _, executed = run(
        "second", objective={"weights": {"demo_reverse": 3.0}}, scores_from=str(tmp_path / "first")
    )
    assert not known & {recipe for recipe, split in executed if split == "search"}


def test_the_order_of_the_models_counts(run: Any, tiny_zoo: Path, tmp_path: Path) -> None:
    run("first")
    sources = {name: str(tiny_zoo / name) for name in ("reverse", "upper")}
    with pytest.raises(UserError) as error:
        run(
            "second",
            models={"base": str(tiny_zoo / "base"), "sources": sources},
            scores_from=str(tmp_path / "first"),
        )
    assert error.value.got == "other models there, or in another order"


def test_what_a_damaged_run_lost_is_made_again(run: Any, tmp_path: Path) -> None:
    with run("first")[0] as first:
        base, *others = first.entries("base") + first.entries("parent")
    with closing(sqlite3.connect(tmp_path / "first" / FILE)) as db, db:
        db.execute("DELETE FROM timing WHERE recipe = ? AND split = 'search'", (base.recipe.hash,))
        db.execute("DELETE FROM run WHERE key = ?", (facts.WEIGHTS.of(others[0].recipe.hash).key,))
    _, executed = run("second", scores_from=str(tmp_path / "first"))
    jobs = {job for job in executed if job[0] in references(StoreReader.read(tmp_path / "first"))}
    assert jobs >= {(base.recipe.hash, "search")}
    assert (others[0].recipe.hash, "search") not in jobs


@pytest.mark.parametrize("damage", ["gone", "damaged", "empty"])
def test_a_begun_run_goes_on_whatever_became_of_the_other(run: Any, tmp_path: Path, damage: str) -> None:
    run("first")
    copied = {"scores_from": str(tmp_path / "first")}
    run("second", **copied)
    if damage == "gone":
        shutil.rmtree(tmp_path / "first")
    else:
        (tmp_path / "first" / FILE).write_bytes(b"" if damage == "empty" else b"no store" * 100)
    store, executed = run("second", **copied)
    assert executed == []
    store.close()


def test_a_begun_run_refuses_another_place_that_is_none(run: Any, tmp_path: Path) -> None:
    run("second")
    for place, what in ((tmp_path / "nowhere", "there is no run"), (tmp_path / "second", "own folder")):
        with pytest.raises(UserError, match=what):
            run("second", scores_from=str(place))


def test_a_new_run_takes_the_threads_of_the_other(run: Any, tmp_path: Path) -> None:
    with run("first", executor={"name": "inline", "threads": 2, "batch_size": 32})[0] as first:
        known = references(first)
    _, executed = run(
        "second", executor={"name": "inline", "batch_size": 32}, scores_from=str(tmp_path / "first")
    )
    assert not known & {recipe for recipe, split in executed if split == "search"}


def test_the_option_of_the_command_is_the_key_of_the_config(config: Callable[..., Path]) -> None:
    path = config(scores_from="runs/of-the-file")
    assert RunConfig.load(path).scores_from == str(Path("runs/of-the-file").absolute())
    assert read(path, scores_from=Path("runs/other")).scores_from == str(Path("runs/other").absolute())
    assert "scores_from" not in RunConfig.load(config()).model_dump(exclude_defaults=True)
    assert RunConfig.load(path).identity() == RunConfig.load(config()).identity()


def test_forward_facts_are_compared_key_by_key(run: Any) -> None:
    with run("first")[0] as first:
        forward = {**facts.FORWARD.require(first), "threads": 7}
        found = obstacles(first, lambda fact: forward if fact is facts.FORWARD else fact.get(first), {})
    assert found == ["threads: 1 there, 7 here"]
