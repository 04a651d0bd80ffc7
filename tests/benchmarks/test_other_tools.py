"""The benchmark of other tools, without their packages: what they are told, what is counted and read back."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from evomerge.config import DEMO_CONFIG
from evomerge.merging.reading import read_recipe

FOLDER = Path(__file__).parents[2] / "benchmarks" / "perf"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("other_tools")


def test_their_task_asks_as_ours_and_has_the_search_documents_alone(tools: ModuleType) -> None:
    ours = yaml.safe_load((tools.TASKS / "demo_add.yaml").read_text())
    documents = tools.TASKS / "data" / "demo_add.search.jsonl"
    theirs = tools.task_file(ours, "search_demo_add", documents)
    assert theirs["dataset_kwargs"] == {"data_files": {"test": str(documents.resolve())}}
    assert (theirs["task"], theirs["test_split"]) == ("search_demo_add", "test")
    told = {"task", "dataset_kwargs", "test_split"}
    assert {key: value for key, value in theirs.items() if key not in told} == {
        key: value for key, value in ours.items() if key not in told
    }


def test_mergekit_evolve_is_told_all_models_and_one_task_per_skill(tools: ModuleType) -> None:
    config = tools.genome("base", ["a", "b"])
    assert config["genome"]["models"] == ["a", "b"]
    assert config["genome"]["base_model"] == "base"
    assert [task["name"] for task in config["tasks"]] == [f"search_{skill}" for skill in tools.SKILLS]


def test_weights_become_a_recipe(tools: ModuleType, tmp_path: Path) -> None:
    base, *sources = (str(DEMO_CONFIG.parent / "demo" / name) for name in ("base", "add", "upper"))
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(tools.arithmetic(base, sources, [0.25, 0.75])))
    recipe = read_recipe(path)
    assert recipe.base is not None
    assert {group.method for group in recipe.groups} == {"task_arithmetic"}


def test_the_best_candidate_is_the_latest_that_the_budget_allows(tools: ModuleType) -> None:
    assert tools.latest([48, 16, 64, 128], 100) == 64
    with pytest.raises(SystemExit, match="15 evaluations"):
        tools.latest([16], 15)


def test_items_are_counted_with_and_without_baselines_but_never_test(tools: ModuleType) -> None:
    parts = [
        {"part": "base, parents, baselines", "items": 100},
        {"part": "gradients", "items": 20},
        {"part": "candidates", "items": 3},
        {"part": "finalists on select", "items": 7},
        {"part": "test", "items": 1000},
    ]
    assert tools.items_of(parts) == {"candidates": 23, "everything": 130}


def test_a_difference_is_that_of_the_seeds_both_have(tools: ModuleType) -> None:
    def run(seed: int, score: float) -> dict[str, object]:
        items = [np.full(50, score).tolist(), np.full(50, score).tolist()]
        return {"seed": seed, "test_items": items, "weights": [0.5, 0.5]}

    assert tools.paired([run(0, 0.75), run(1, 0.0)], [run(0, 0.5)]).startswith("+25.0 [")
    assert tools.paired([run(0, 0.75)], [run(1, 0.5)]) == "-"
