"""Costly models: a short list of baselines is raced, and the best of them are scored on `test`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.notes import notes
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.search import baselines
from evomerge.stored import StoredRun


def names_of(folder: Path) -> tuple[list[str], list[str], list[str], str]:
    """Return the baselines scored at all, in full on `search`, and on `test`; and the run's digest."""
    with StoredRun.read(folder) as run:
        store = run.store
        entries = store.entries("baseline")
        blocks = store.scored_blocks("search")
        some = [e.name for e in entries if blocks.get(e.recipe.hash)]
        whole = [e.name for e in entries if len(blocks.get(e.recipe.hash, ())) == store.blocks("search")]
        test = [e.name for e in entries if e.recipe.hash in store.scored_blocks("test")]
        said = any("short list of baselines" in note for note in notes(Summary(run)))
        assert said == (len(entries) < 20)
        return some, whole, test, store.digest()


@pytest.mark.end_to_end
def test_a_short_list_is_raced_and_the_best_are_tested(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(generate=False, budget={"generations": 1}, executor={"name": "inline", "batch_size": 32})
    with monkeypatch.context() as costly:
        costly.setattr(baselines, "COSTLY", 0)
        loaded = RunConfig.load(path)
        compose.start(loaded, Silent())
    some, whole, test, digest = names_of(Path(loaded.out))
    assert set(some) == set(baselines.SHORT)
    assert len(whole) >= 3
    assert set(test) <= set(whole)
    assert len(test) == min(len(whole), baselines.TESTED)
    compose.start(loaded, Silent())  # goes on with the list that it was begun with
    assert names_of(Path(loaded.out)) == (some, whole, test, digest)


@pytest.mark.usefixtures("formula")
def test_baselines_by_name(config: Callable[..., Path]) -> None:
    path = config(
        generate=False,
        budget={"generations": 1},
        executor={"name": "inline", "batch_size": 32},
        baselines=["TIES", "uniform average"],
    )
    loaded = RunConfig.load(path)
    compose.start(loaded, Silent())
    with StoredRun.read(Path(loaded.out)) as run:
        assert [entry.name for entry in run.store.entries("baseline")] == ["uniform average", "TIES"]
        rows = [row.name for row in Summary(run).rows() if row.role == "baseline"]
    assert rows == ["uniform average", "TIES"]
