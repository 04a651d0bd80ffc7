"""Runs begun before a part of the search was there go on without it, and end as they would have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge import compose, prepare
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.running.store import StoreReader, facts
from tests.running import quick

PATHS = {"kind": "layer_path", "name": "paths", "about": "two or three layers", "longest": 1.5}


def found_in(folder: Path, fact: facts.Fact[Any]) -> tuple[object, int, list[tuple[str, ...]], str]:
    """Return a fact, the number of starts, the recipes of every generation, and the winner."""
    with StoreReader.read(folder) as store:
        recipes = [tuple(generation.recipes) for generation in store.generations()]
        (winner,) = store.entries("winner")
        return fact.get(store), len(store.entries("start")), recipes, winner.recipe.hash


def begun(path: Path) -> Path:
    loaded = RunConfig.load(path)
    compose.start(loaded, Silent())
    return Path(loaded.out)


@pytest.mark.end_to_end
def test_genes_count_alike_in_a_run_that_began_so(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose.executors, "build", quick.build(0))

    def at(name: str, generations: int) -> Path:
        return config(generate=False, budget={"generations": generations}, out=str(tmp_path / name))

    with monkeypatch.context() as before:
        before.setattr(compose, "movements", lambda space, norms: None)
        whole = found_in(begun(at("whole", 3)), facts.MOVEMENTS)
        begun(at("cut", 2))
    assert found_in(begun(at("cut", 3)), facts.MOVEMENTS) == whole
    assert whole[0] is None
    now = found_in(begun(at("now", 3)), facts.MOVEMENTS)
    assert isinstance(now[0], list)
    assert begun(at("now", 3))
    assert found_in(tmp_path / "now", facts.MOVEMENTS) == now


@pytest.mark.end_to_end
@pytest.mark.usefixtures("formula")
def test_a_search_of_paths_that_began_without_stacks_has_none(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(name: str, generations: int) -> Path:
        return config(
            generate=False,
            space=PATHS,
            baselines=[],
            optimizer={"population": 4},
            budget={"generations": generations},
            out=str(tmp_path / name),
        )

    with monkeypatch.context() as before:
        before.setattr(prepare, "_stacks", lambda config: 0)
        whole = found_in(begun(at("whole", 2)), facts.STACKS)
        begun(at("cut", 1))
    assert found_in(begun(at("cut", 2)), facts.STACKS) == whole
    assert whole[:2] == (None, 0)
    now = found_in(begun(at("now", 2)), facts.STACKS)
    assert now[:2] == (4, 1)
    begun(at("now", 2))
    assert found_in(tmp_path / "now", facts.STACKS) == now
