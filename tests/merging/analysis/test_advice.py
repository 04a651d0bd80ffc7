"""Advice: every rule is reached by numbers that meet it, and says them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from evomerge.merging import methods
from evomerge.merging.analysis.advice import RULES, Advised, advise
from evomerge.merging.analysis.interference import Interference, tally
from evomerge.schema import preset_folder

SIZE = 40_000


def noise(seed: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def advised(*layers: Sequence[Tensor], base: float = 10.0) -> Advised:
    """Advise on models whose task vectors are given, layer by layer."""
    count = len(layers[0])
    return advise(
        Interference(
            base="base",
            models=tuple("abcdef"[:count]),
            locations={},
            threshold=1.0,
            top=0.2,
            tensors={
                f"model.layers.{i}.mlp.up_proj.weight": tally(torch.full((SIZE,), base), vectors)
                for i, vectors in enumerate(layers)
            },
        )
    )


def rules(found: Advised) -> list[str]:
    return [each.rule for each in found.advice]


def test_unrelated_models_are_complementary() -> None:
    found = advised([noise(0), noise(1), noise(2)])
    assert (found.verdict, found.method, found.preset) == (
        "complementary",
        "task_arithmetic",
        "task_arithmetic_layers",
    )
    assert set(found.relations.values()) == {"complementary"}
    assert found.equal_weights == {}
    assert "cosine 0.00; tops overlap 11 %, chance 11 %; opposite on 50 %" in found.advice[0].text


def test_models_that_moved_together_are_averaged() -> None:
    shared = noise(0)
    two = advised([shared + noise(1), shared + noise(2)])
    assert (two.verdict, two.method, two.preset) == ("aligned", "slerp", "slerp_layers")
    three = advised([shared + noise(i) for i in (1, 2, 3)])
    assert (three.verdict, three.method, three.preset) == ("aligned", "model_stock", "global_weights")
    assert "(cosine 0.50)" in three.advice[0].text


def test_models_that_pull_apart() -> None:
    found = advised([noise(0), noise(1) - 0.2 * noise(0)])
    assert (found.verdict, found.method, found.preset) == ("conflicting", "ties", "ties_layers")
    assert found.relations[0, 1] == "opposed"
    assert "a and b change in opposite directions: cosine -0.20" in found.advice[0].text
    assert any("retrain on the mixed data, or route" in each.text for each in found.advice)


def test_models_that_undo_each_other_are_not_to_be_merged() -> None:
    found = advised([noise(0), noise(1) - noise(0), noise(2)])
    assert found.verdict == "opposed"
    assert "a and b undo each other: cosine -0.71" in found.advice[0].text
    assert "retrain on the mixed data, or route" in found.advice[0].text
    assert found.relations[0, 1] == "opposed"
    assert found.relations[0, 2] == "complementary"


def test_models_that_want_the_same_elements_compete() -> None:
    few = (torch.arange(SIZE) % 5 == 0) * 10.0 + 1.0  # the same fifth is large in both
    found = advised([noise(0) * few, noise(1) * few], base=30.0)
    assert found.relations == {(0, 1): "competing"}
    assert (found.verdict, found.method) == ("conflicting", "ties")
    assert "change the same elements most: tops overlap 57 % (chance 11 %)" in found.advice[0].text


def test_uneven_lengths_get_equal_weights() -> None:
    found = advised([noise(0), 3 * noise(1)])
    assert found.equal_weights["a"] / found.equal_weights["b"] == pytest.approx(3, rel=0.02)
    assert "3.0 times as long" in next(each.text for each in found.advice if each.rule == "uneven")
    assert "uneven" not in rules(advised([noise(0), 1.4 * noise(1)]))


def test_copies_idlers_and_strangers_are_named() -> None:
    found = advised([noise(0), 2 * noise(0), noise(1)])
    assert next(e.text for e in found.advice if e.rule == "same").startswith("a and b are the same")
    found = advised([noise(0), noise(1), 1e-3 * noise(2)])
    assert next(e.text for e in found.advice if e.rule == "empty").startswith("c changes next to nothing")
    assert found.relations[0, 2] == "empty"
    assert "c" not in found.equal_weights
    found = advised([noise(0), noise(1)], base=1.0)
    assert rules(found)[:2] == ["far", "far"]
    nothing = advised([torch.zeros(SIZE)] * 2)
    assert nothing.verdict == "nothing to merge"


def test_the_layer_of_most_conflict_is_named() -> None:
    calm = noise(0) + 0.4 * noise(1), noise(2) + 0.4 * noise(1)
    torn = noise(3), noise(4) - 0.4 * noise(3)
    hot = advised(calm, calm, torn, calm).advice[-1]
    assert hot.rule == "hot"
    assert hot.text.startswith("most conflict: layer 2 81 % (whole model 49 %)")
    even = advised(calm, calm).advice[-1]
    assert "no layer stands out" in even.text
    assert "hot" not in rules(advised(calm))


def test_the_table_names_what_exists() -> None:
    presets = {path.stem for path in preset_folder("search_spaces").glob("*.yaml")}
    shared = noise(9)
    cases = [
        advised([noise(0), noise(1)]),
        advised([noise(0), -noise(0)]),
        advised([shared + noise(1), shared + noise(2)]),
        advised([shared + noise(i) for i in (1, 2, 3)]),
        advised([torch.zeros(SIZE)] * 2),
    ]
    for found in cases:
        assert found.method in methods.names()
        assert found.preset in presets
        assert set(rules(found)) <= set(RULES)
    for rule in RULES.values():
        assert f"{rule.limit:g}" in rule.condition
        assert "arXiv" in rule.source or rule.source == "rule of thumb"
