"""The loop on fakes: order of events, splits kept apart, failures survived, a good winner."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from evomerge.errors import UserError
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.merging.recipe import Recipe
from evomerge.search.baselines import STRENGTHS
from evomerge.search.loop import Search
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.plan import Outcome, SearchPlan
from tests.search.fakes import SUITE, FakeBudget, FakeJournal, FakeScorer, Quiet
from tests.search.spaces.test_merge_space import make


def search(
    scorer: FakeScorer, journal: FakeJournal, *, generations: int = 12, seed: int = 0, **parts: Any
) -> Outcome:
    space = make("global_weights")
    plan = SearchPlan(
        suite=SUITE,
        space=space,
        template=space.decode(np.full(2, 0.5)),
        norms={"a": 1.0, "b": 2.0},
        optimizer=OptimizerSpec(),
        objective=ObjectiveSpec(),
        finalists=3,
        seed=seed,
    )
    return Search(
        plan, scorer=scorer, journal=journal, budget=FakeBudget(generations), observer=Quiet(), **parts
    ).run()


def test_finds_what_the_baselines_miss() -> None:
    outcome = search(FakeScorer(), FakeJournal())
    assert outcome.stopped == "enough"
    assert outcome.winner.recipe.groups[0].per_source("weight") == pytest.approx((0.8, 0.6), abs=0.05)


def test_asks_and_tells_alternate_and_entries_come_in_order() -> None:
    journal = FakeJournal()
    search(FakeScorer(), journal, generations=3)
    assert journal.events == [(kind, g) for g in range(3) for kind in ("ask", "tell")]
    roles = list(dict.fromkeys(role for role, _, _ in journal.entries))
    assert [role for role in roles if role != "unlimited"] == [
        *("base", "parent", "baseline", "standard", "finalist", "winner")
    ]
    names = [entry.name for role, _, entry in journal.entries if role == "baseline"]
    assert names[0] == "uniform average"
    assert names[-7:-5] == ["TIES", "DARE-TIES"]
    assert names[-3:] == ["SLERP", "Model Stock", "greedy soup"]
    assert len(names) == 2 * len(STRENGTHS) + 8


def test_test_items_are_read_last_and_search_never_sees_select() -> None:
    scorer = FakeScorer()
    search(scorer, FakeJournal(), generations=3)
    splits = [split for _, split, _ in scorer.asked]
    changes = [a for a, b in zip(splits, [*splits[1:], ""], strict=True) if a != b]
    assert changes == ["search", "select", "search", "test"]
    assert {phase for _, split, phase in scorer.asked[splits.index("select") :] if split == "search"} == {
        "winner on all items"
    }


def test_idle_workers_hear_of_the_finalists_before_their_soups_are_tried() -> None:
    """And of nothing that is not scored later: two runs with one seed have equal contents."""
    scorer = FakeScorer()
    heard: list[tuple[str, Split, int]] = []

    def ahead(recipes: Sequence[Recipe], split: Split) -> None:
        heard.extend((recipe.hash, split, len(scorer.asked)) for recipe in recipes)

    search(scorer, FakeJournal(), generations=3, ahead=ahead)
    selected = {recipe for recipe, split, _ in scorer.asked if split == "select"}
    first = next(n for n, (_, split, _) in enumerate(scorer.asked) if split == "select")
    soups = next(n for n, (*_, phase) in enumerate(scorer.asked) if phase == "soup of the finalists")
    finalists = {recipe for recipe, split, at in heard if split == "select" and at == soups}
    assert soups < first
    assert len(finalists) == 3
    assert finalists <= selected
    assert {(recipe, split) for recipe, split, _ in heard} <= {(r, split) for r, split, _ in scorer.asked}


def test_the_search_starts_at_the_best_expressible_baseline() -> None:
    journal = FakeJournal()
    outcome = search(FakeScorer(), journal, generations=1)
    assert outcome.winner.recipe.groups[0].method == "task_arithmetic"
    assert journal.tells[0].mean() < -0.6  # around weights (0.6..0.8), not around the middle of the box


def test_failures_get_one_defined_loss_and_the_run_goes_on() -> None:
    journal = FakeJournal()
    outcome = search(FakeScorer(fail_share=0.3), journal)
    assert outcome.winner.recipe.groups[0].per_source("weight") == pytest.approx((0.8, 0.6), abs=0.1)
    assert all(np.isfinite(losses).all() for losses in journal.tells)
    assert any((losses >= 1.0).any() for losses in journal.tells)


def test_when_everything_fails_there_is_a_sentence() -> None:
    with pytest.raises(UserError, match="could be scored, so there is no winner"):
        search(FakeScorer(fail_share=1.0), FakeJournal(), generations=2)


def test_when_no_finalist_can_be_scored_there_is_no_winner() -> None:
    class FailsOnSelect(FakeScorer):
        def score(
            self, recipes: Sequence[Recipe], split: Split, phase: str, blocks: Sequence[int] | None = None
        ) -> list[Scores | Failure]:
            found = super().score(recipes, split, phase)
            return [Failure(kind="error", reason="no")] * len(found) if phase == "selection" else found

    journal = FakeJournal()
    with pytest.raises(UserError, match="none of the finalists"):
        search(FailsOnSelect(), journal, generations=2)
    assert not [entry for entry in journal.entries if entry[0] == "winner"]


def test_same_seed_same_search() -> None:
    first, second, third = FakeScorer(), FakeScorer(), FakeScorer()
    search(first, FakeJournal())
    search(second, FakeJournal())
    search(third, FakeJournal(), seed=1)
    assert first.asked == second.asked != third.asked


def test_importing_the_search_leaves_torch_out() -> None:
    code = (
        "import sys, evomerge.search.loop, evomerge.merging.recipe, evomerge.config, evomerge.cli;"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules); print(heavy); "
        "raise SystemExit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
