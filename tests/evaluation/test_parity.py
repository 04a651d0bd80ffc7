"""Every task shape, asked in every way: items and scores are those of lm-eval's own command line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from evomerge.evaluation.harness import Harness
from evomerge.evaluation.permissions import Permissions
from evomerge.evaluation.suite import Suite
from tests.rounding import of_log_likelihoods

from . import parity

pytestmark = pytest.mark.end_to_end

TOKENS = 60
"""Tokens of the longest scored answer."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    parity.write_model(folder / "model")
    parity.write_tasks(folder / "tasks")
    calls = [call(folder, name, names=tasks) for name, tasks in parity.QUICK.items()]
    parity.lm_eval([*calls, call(folder, "plain", out="group", names=["both"])])
    return folder


def call(place: Path, name: str, *, out: str = "", names: Sequence[str] = ()) -> list[str]:
    folder = place / "out" / (out or name)
    return parity.command_line(parity.WAYS[name], place / "model", place / "tasks", folder, names)


@pytest.fixture(scope="module")
def model(place: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(place / "model").eval()


def entries(task: str) -> list[dict[str, Any]]:
    """Return a suite's entries for a task: one for each pair of a metric and a filter."""
    splits = dict.fromkeys(parity.SPLITS, 1) if task == "own_class" else parity.NAMED
    if task == "own_class":
        return [{"task": task, "metric": "acc", "splits": {"search": 1, "select": 1, "test": 4}}]
    shape = parity.SHAPES[task]
    if shape["output_type"] == "loglikelihood_rolling":
        return [{"task": task, "role": "retention", "splits": splits}]
    filters = [row["name"] for row in shape.get("filter_list", [{"name": "none"}])]
    metrics = [row["metric"] for row in shape["metric_list"]]
    pairs = [(metric, chosen) for metric in metrics for chosen in filters]
    return [
        {
            "task": task if number == 0 else f"{task} by {metric} of {chosen}",
            "of": None if number == 0 else task,
            "metric": f"{metric},{chosen}",
            "splits": splits,
        }
        for number, (metric, chosen) in enumerate(pairs)
    ]


def harness(place: Path, way: parity.Way) -> Harness:
    data = {
        "name": "parity",
        "tasks_dir": str(place / "tasks"),
        "long_prompts": "cut",
        "tasks": [entry for task in way.tasks for entry in entries(task)],
        **way.suite,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    suite = Suite.from_mapping(data, folder=place, where="suite.yaml")
    trusted = Permissions(trust_tasks=True)
    return Harness(suite, tokenizer=tokenizer, batch_size=1, max_length=None, permissions=trusted)


def compare(asked: Harness, model: Any, logged: dict[str, list[dict[str, Any]]]) -> int:
    """Compare every item of the split `test`; return the number of comparisons."""
    items = asked.items("test")
    scores = asked.evaluate(model, items)
    slack = of_log_likelihoods(model, tokens=TOKENS)
    count = 0
    for task in items.tasks:
        spec, chosen, name = task.builder.spec, task.builder.filter, task.builder.metric
        found = [row for row in logged[spec.source] if row["filter"] == (chosen or "none")]
        theirs = {json.dumps(row["doc"], sort_keys=True): row for row in found}
        for number, group in enumerate(task.groups):
            row = theirs[json.dumps(group[0].doc, sort_keys=True)]
            place = f"{task.name}, item {number}"
            arguments = [list(row["arguments"][key].values()) for key in row["arguments"]]
            assert [list(request.args) for request in group] == arguments, place
            count += 1
            value = scores[task.name].metric[number]
            if task.texts:
                np.testing.assert_allclose(
                    value * len(task.texts[number]), float(row["resps"][0][0]), atol=slack * 10
                )
                continue
            if group[0].request_type == "generate_until":
                assert [request.resps for request in group] == row["resps"], place
                assert [request.filtered_resps[chosen] for request in group] == row["filtered_resps"], place
            else:
                ours = [[request.resps[0][0], request.resps[0][1]] for request in group]
                for (ll, greedy), response in zip(ours, row["resps"], strict=True):
                    their_ll, their_greedy = response[0]
                    assert math.isclose(ll, float(their_ll), abs_tol=slack), place
                    assert str(greedy) == str(their_greedy), place
            if name == "perplexity":
                assert math.isclose(value, float(row[name]), abs_tol=slack), place
            else:
                assert value == float(row[name]), place
    return count


def check(name: str, place: Path, model: Any, *, out: str = "", names: Sequence[str] = ()) -> None:
    way = replace(parity.WAYS[name], tasks=tuple(names) or parity.WAYS[name].tasks)
    logged = parity.samples(place / "out" / (out or name))
    assert compare(harness(place, way), model, logged) >= 4 * len(way.tasks)


@pytest.mark.parametrize("name", parity.QUICK)
def test_items_and_scores_are_those_of_lm_evals_command_line(name: str, place: Path, model: Any) -> None:
    check(name, place, model, names=parity.QUICK[name])


def test_tasks_of_a_group_are_asked_as_in_the_group(place: Path, model: Any) -> None:
    logged = parity.samples(place / "out" / "group")
    assert set(logged) == {"choice", "write"}
    way = replace(parity.WAYS["plain"], tasks=("choice", "write"))
    assert compare(harness(place, way), model, logged) == 24


@pytest.mark.slow
def test_every_other_way_to_ask(place: Path, model: Any) -> None:
    others = [name for name in parity.WAYS if name not in parity.QUICK]
    parity.lm_eval([call(place, name) for name in others])
    for name in others:
        check(name, place, model)


@pytest.mark.slow
def test_lm_eval_as_people_call_it(place: Path, model: Any) -> None:
    parity.lm_eval([call(place, "template", out="whole")], whole=True)
    check("template", place, model, out="whole")


def test_there_are_enough_shapes() -> None:
    assert len(parity.SHAPES) + 2 >= 20  # a class and a group, too
    assert {shape["output_type"] for shape in parity.SHAPES.values()} == {
        *("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"),
    }
