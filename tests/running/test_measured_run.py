"""Runs whose space weights sources by what was measured of them: Fisher information and Gram matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery import export
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, ModelError
from evomerge.evaluation.scores import Scores
from evomerge.merging.analysis import fisher, gram
from evomerge.prepare import prepare
from evomerge.running.inputs import changed_models
from evomerge.running.store import RunStore
from evomerge.stored import StoredRun

SPACE = {
    "name": "measured",
    "about": "two methods that need files",
    "method": {"choices": ["fisher", "regmean"], "per": []},
    "genes": {"weight": {"low": 0.1, "high": 1.0, "per": ["source"]}},
}


@pytest.fixture
def models(tiny_zoo: Path, tmp_path: Path) -> dict[str, Any]:
    """The models of a config, with files beside it."""
    text = tmp_path / "text.txt"
    text.write_text("abc = cba\nhello there\n")
    sources = {name: str(tiny_zoo / name) for name in ("upper", "reverse")}
    for name, place in sources.items():
        fisher.estimate(place, text, tmp_path / f"{name}.fisher.st")
        gram.measure(place, text, tmp_path / f"{name}.gram.st")
    return {
        "base": str(tiny_zoo / "base"),
        "sources": sources,
        "fisher": {name: f"{name}.fisher.st" for name in sources},
        "gram": {name: f"{name}.gram.st" for name in sources},
    }


@pytest.mark.end_to_end
def test_a_run_searches_methods_that_need_files(
    config: Callable[..., Path], models: dict[str, Any], tmp_path: Path
) -> None:
    path = config(
        space=SPACE,
        models=models,
        optimizer={"name": "random", "population": 6},
        budget={"generations": 1},
        racing="off",
        generate=False,
    )
    loaded = RunConfig.load(path)
    assert loaded.models.gram["upper"] == str(tmp_path / "upper.gram.st")
    compose.start(loaded, Silent())
    with RunStore.read(tmp_path / "run") as store:
        recipes = [store.recipe(r) for g in store.generations() for r in g.recipes]
        assert {group.method for recipe in recipes for group in recipe.groups} == {"fisher", "regmean"}
        results = [store.result(recipe.hash, "search") for recipe in recipes]
        assert all(isinstance(result, Scores) for result in results)
        chosen = next(recipe for recipe in recipes if recipe.groups[0].method == "regmean")
        before = store.result(chosen.hash, "search")
        out = export.export(Summary(StoredRun(store)), tmp_path / "out", pick=chosen.hash[:12]).folder
    again = export.rescore(out, prepare(loaded).worker, "search")
    assert isinstance(before, Scores)
    for one, other in zip(again.tasks, before.tasks, strict=True):
        assert (one.metric == other.metric).all()


def test_files_are_part_of_the_identity_only_where_there_are_any(
    config: Callable[..., Path], models: dict[str, Any]
) -> None:
    plain = RunConfig.load(config()).identity()
    bare = {key: models[key] for key in ("base", "sources")}
    assert RunConfig.load(config(models=bare)).identity() == plain
    assert RunConfig.load(config(models=models)).identity() != plain


def test_files_that_do_not_fit_are_refused_before_the_run(
    config: Callable[..., Path], models: dict[str, Any], tmp_path: Path
) -> None:
    def refused(error: type[Exception], message: str, **changes: Any) -> None:
        path = config(space=SPACE, optimizer={"name": "random"}, models={**models, **changes})
        with pytest.raises(error, match=message):
            prepare(RunConfig.load(path))

    refused(ConfigError, "none of the sources", gram={"absent": "x"})
    refused(ModelError, "no such Gram file", gram={**models["gram"], "upper": "absent.st"})
    refused(ModelError, "of another model", fisher={**models["fisher"], "upper": "reverse.fisher.st"})
    refused(ConfigError, "none for reverse", fisher={"upper": "upper.fisher.st"})
    assert not (tmp_path / "run").exists()


def test_a_space_of_adapters_refuses_whole_models_before_the_run(
    config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="merges LoRA adapters on the base, and 'upper' is none"):
        prepare(RunConfig.load(config(space="core_space_layers")))
    assert not (tmp_path / "run").exists()
    lora = f"{tiny_zoo / 'base'}+{tiny_zoo / 'add'}"
    models = {"base": str(tiny_zoo / "base"), "sources": {"upper": lora, "reverse": lora}}
    assert prepare(RunConfig.load(config(space="core_space_layers", models=models))).space.dimension


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_run_notices_another_measured_file(
    kind: str, config: Callable[..., Path], models: dict[str, Any], tmp_path: Path
) -> None:
    prepared = prepare(RunConfig.load(config(space=SPACE, models=models, optimizer={"name": "random"})))
    guard = prepared.worker.guard()
    assert guard is not None
    guard.compare()
    file = tmp_path / f"upper.{kind}.st"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match=f"upper: {kind.title()} file"):
        guard.check()
    file.unlink()
    with pytest.raises(ModelError, match=f"{kind.title()} file \\(missing\\)"):
        guard.check()
    file.write_bytes(content)
    guard.check()
    overlooked = ("Fisher file", "Gram file", "generation_config.json")
    older = {
        name: {file: known for file, known in files.items() if file not in overlooked}
        for name, files in prepared.inputs.files.items()
    }
    assert len(older["upper"]) == len(prepared.inputs.files["upper"]) - 3
    assert not changed_models(
        replace(prepared.inputs, files=older), prepared.inputs
    )  # begun by an older version
