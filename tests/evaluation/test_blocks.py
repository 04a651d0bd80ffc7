"""Item blocks: a split cut into them is the same items, with the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.scores import Scores
from evomerge.evaluation.suite import Suite
from tests.rounding import of_log_likelihoods

from .conftest import CHOICE_TOKENS, ITEMS, TASKS, MakeSuite, entry

BLOCKS = 4


def make(suite: Suite, tokenizer: Any, **settings: Any) -> Harness:
    return Harness(suite, tokenizer=tokenizer, batch_size=16, max_length=None, **settings)


@pytest.fixture(scope="module")
def whole(full_suite: Suite, tokenizer: Any) -> Harness:
    return make(full_suite, tokenizer)


@pytest.fixture(scope="module")
def cut(full_suite: Suite, tokenizer: Any) -> Harness:
    return make(full_suite, tokenizer, blocks=BLOCKS)


@pytest.fixture(scope="module")
def scores(cut: Harness, model: Any) -> Scores:
    return cut.evaluate_split(model, "search")


def places(whole: Harness, cut: Harness) -> dict[str, list[list[int]]]:
    """For each task, which of its items each block holds."""
    found: dict[str, list[list[int]]] = {}
    for task in whole.items("search").tasks:
        known = {str(group[0].doc): place for place, group in enumerate(task.groups)}
        assert len(known) == len(task.groups)
        blocks = [cut.items("search", block).tasks for block in range(BLOCKS)]
        found[task.name] = [
            [known[str(group[0].doc)] for part in tasks if part.name == task.name for group in part.groups]
            for tasks in blocks
        ]
    return found


def test_every_item_is_in_one_block_and_blocks_are_alike(whole: Harness, cut: Harness) -> None:
    assert cut.blocks("search") == BLOCKS
    for blocks in places(whole, cut).values():
        assert sorted(item for block in blocks for item in block) == list(range(ITEMS["search"]))
        assert all(block == sorted(block) for block in blocks)  # in item order
        sizes = [len(block) for block in blocks]
        assert max(sizes) - min(sizes) <= 1
        assert blocks[0] != list(range(sizes[0]))  # at random, not the first ones
    totals = [cut.items("search", block).total for block in range(BLOCKS)]
    assert max(totals) - min(totals) <= 1
    assert sum(totals) == ITEMS["search"] * len(TASKS)


def test_other_splits_are_not_cut(whole: Harness, cut: Harness, model: Any) -> None:
    assert cut.blocks("select") == cut.blocks("test") == 1
    assert cut.evaluate_split(model, "select").same_as(whole.evaluate_split(model, "select"))


def test_joined_blocks_have_the_results_of_the_whole(
    whole: Harness, cut: Harness, scores: Scores, model: Any
) -> None:
    """Up to rounding: an item's batch has other rows beside it, which changes the last bits."""
    slack = of_log_likelihoods(model, tokens=CHOICE_TOKENS)
    assert scores.blocks == tuple(range(BLOCKS))
    expected = whole.evaluate_split(model, "search")
    assert expected.blocks == (0,)
    for name, blocks in places(whole, cut).items():
        order = [item for block in blocks for item in block]
        found, own = scores[name], expected[name]
        assert found.metric == pytest.approx(own.metric[order], abs=slack)
        for vector, other in ((found.smooth, own.smooth), (found.margin, own.margin)):
            assert (vector is None) == (other is None)
            if vector is not None and other is not None:
                assert vector == pytest.approx(other[order], abs=slack)
        assert found.mean == pytest.approx(own.mean, abs=slack)


def test_a_block_alone_has_the_bits_it_has_among_all(cut: Harness, scores: Scores, model: Any) -> None:
    alone = cut.evaluate(model, cut.items("search", 2))
    assert alone.blocks == (2,)
    sizes = [cut.items("search", block).counts for block in range(BLOCKS)]
    for task in alone:
        start = sum(counts[task.task] for counts in sizes[:2])
        part = scores[task.task].metric[start : start + len(task.metric)]
        assert (task.metric == part).all()


def test_the_block_seed_decides_which_items_meet(full_suite: Suite, tokenizer: Any, whole: Harness) -> None:
    seeded = [places(whole, make(full_suite, tokenizer, blocks=BLOCKS, block_seed=s)) for s in (1, 1, 2)]
    assert seeded[0] == seeded[1]
    assert seeded[0] != seeded[2]
    assert seeded[0]["first"] != seeded[0]["copy"]  # tasks are cut on their own


def test_more_blocks_than_items_are_refused(make_suite: MakeSuite, tokenizer: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make(make_suite(entry("first")), tokenizer, blocks=ITEMS["search"] + 1)
    assert str(caught.value) == (
        "task 'first' has too few search items for 31 item blocks\n"
        "  expected: 31 or more\n"
        "  got: 30\n"
        "  do: give the task more items, or set racing.blocks to 30 (1 turns racing off)"
    )
    most = make(make_suite(entry("first")), tokenizer, blocks=ITEMS["search"])
    assert np.unique([most.items("search", block).total for block in range(ITEMS["search"])]).tolist() == [1]
