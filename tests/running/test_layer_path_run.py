"""Layer paths from config to exported model: a run, its replay, and the hybrid's second step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery import export, predict
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.evaluation.scores import Scores
from evomerge.prepare import prepare
from evomerge.running.store import RunStore, facts
from evomerge.search.warm_start import WarmStartSpec
from evomerge.stored import StoredRun

PATHS = {
    "kind": "layer_path",
    "name": "paths",
    "about": "two or three layers, scaled",
    "shortest": 0.75,
    "longest": 1.5,
    "reach": 1,
    "scale": {"low": 0.5, "high": 1.5},
}


@pytest.mark.slow
def test_weights_first_then_paths_through_the_winner(
    config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path
) -> None:
    compose.start(RunConfig.load(config(budget={"generations": 1})), Silent())
    with RunStore.read(tmp_path / "run") as store:
        merged = export.export(Summary(StoredRun(store)), tmp_path / "merged").folder

    sources = {"upper": str(tiny_zoo / "upper"), "reverse": str(tiny_zoo / "reverse"), "merged": str(merged)}
    models = {"base": str(tiny_zoo / "base"), "sources": sources}
    path = config(
        space=PATHS,
        models=models,
        optimizer={"population": 4},
        budget={"generations": 2},
        racing="off",
        out=str(tmp_path / "paths"),
    )
    loaded = RunConfig.load(path)
    compose.start(loaded, Silent())
    with RunStore.read(tmp_path / "paths") as store:
        winner = store.entries("winner")[0].recipe.hash
        assert "no candidate" not in str(facts.STOPPED.get(store))
        recipes = [recipe for generation in store.generations() for recipe in generation.recipes]
        stacks = [store.recipe(found) for found in recipes]
        assert {stack.num_layers for stack in stacks} == {2, 3}
        assert {group.sources[0] for stack in stacks for group in stack.groups} <= set(sources)
        scored = [store.result(stack.hash, "search") for stack in stacks]
        assert all(isinstance(scores, Scores) for scores in scored)
        averages = [store.result(entry.recipe.hash, "search") for entry in store.entries("baseline")]
        assert all(isinstance(scores, Scores) for scores in averages)
        chosen = next(stack for stack in stacks if stack.num_layers == 3)
        before = store.result(chosen.hash, "search")
        out = export.export(Summary(StoredRun(store)), tmp_path / "out", pick=chosen.hash[:12]).folder

    again = export.rescore(out, prepare(loaded).worker, "search")
    assert isinstance(before, Scores)
    for one, other in zip(again.tasks, before.tasks, strict=True):
        assert np.array_equal(one.metric, other.metric)

    known = RunConfig.load(path).model_copy(update={"out": str(tmp_path / "next")})
    started = known.model_copy(update={"warm_start": WarmStartSpec(recipes=(str(out / "recipe.yaml"),))})
    (start,) = prepare(started).warm.recipes
    assert start.recipe.hash == chosen.hash  # what a run exports, the next one can begin with
    with RunStore.read(tmp_path / "paths") as store:
        assert predict.find(store, prepare(loaded), str(out / "recipe.yaml")).hash == chosen.hash

    compose.start(RunConfig.load(path), Silent())  # replayed: every ask is compared with the stored one
    with RunStore.read(tmp_path / "paths") as store:
        assert [entry.recipe.hash for entry in store.entries("winner")] == [winner]
