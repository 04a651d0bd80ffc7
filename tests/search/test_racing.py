"""Racing: its error rate, its estimates, what it never scores twice, and that it repeats itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import pytest

from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, Split, TaskScores, joined
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.search.ledger import Ledger
from evomerge.search.objective import FAILURE_MARGIN, Objective, ObjectiveSpec
from evomerge.search.racing import RaceResult, RacingSpec, Views, block_order, race

SPLITS = {"search": "search", "select": "select", "test": "test"}
SUITE = Suite.model_validate(
    {
        "name": "s",
        "tasks": [
            {"task": "a", "metric": "acc", "specialist": "p", "splits": SPLITS},
            {"task": "b", "metric": "acc", "specialist": "p", "splits": SPLITS, "weight": 2},
            {"task": "text", "metric": "loglikelihood", "role": "retention", "splits": SPLITS},
        ],
    }
)
BLOCKS = 5
ITEMS = 8  # of a task in a block


def recipe(number: int) -> Recipe:
    group = TensorGroup(method="linear", sources=("p",))
    return Recipe(models={"base": "base", "p": "p"}, base="base", groups=(group,), seed=number)


class Table:
    """A scorer that draws every model's items from its skill; items are harder or easier for all alike.

    fail: (candidate, block) that fails. harder: how much harder block 3 is. Notes what it executes.
    """

    def __init__(
        self, skills: Sequence[float], seed: int, fail: tuple[int, int] | None = None, harder: float = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        hard = rng.normal(0, 1, (2, BLOCKS, ITEMS))
        hard[:, 3] += harder
        own = rng.normal(0, 0.7, (len(skills), 2, BLOCKS, ITEMS))
        self.level = np.asarray(skills)[:, None, None, None] - hard + own
        self.text = -2 + 0.1 * own[:, 0] + 0.2 * (np.asarray(skills)[:, None, None] - 1)
        self.fail = fail
        self.executed: list[tuple[int, int]] = []

    def part(self, number: int, block: int) -> Scores:
        level = self.level[number, :, block]
        tasks = tuple(
            TaskScores(task=name, metric=(x > 0).astype(float), smooth=1 / (1 + np.exp(-x)))
            for name, x in zip("ab", level, strict=True)
        )
        text = TaskScores(task="text", metric=self.text[number, block])
        return Scores(split="search", tasks=(*tasks, text), blocks=(block,))

    def score(
        self, recipes: Sequence[Recipe], split: Split, phase: str, blocks: Sequence[int] | None = None
    ) -> list[Scores | Failure]:
        assert split == "search"
        found: list[Scores | Failure] = []
        for one in recipes:
            wanted = range(BLOCKS) if blocks is None else blocks
            for block in wanted:
                if (one.seed, block) not in self.executed:
                    self.executed.append((one.seed, block))
            failed = self.fail is not None and one.seed == self.fail[0] and self.fail[1] in wanted
            found.append(
                Failure(kind="error", reason="no")
                if failed
                else joined([self.part(one.seed, block) for block in wanted])
            )
        return found

    def whole(self, number: int) -> Scores:
        return joined([self.part(number, block) for block in range(BLOCKS)])


@functools.cache
def views() -> Views:
    table = Table([-3.0, 3.0], seed=99)
    normaliser = Normaliser(SUITE, base=table.whole(0), parents={"p": table.whole(1)})
    objective = Objective(ObjectiveSpec(), normaliser)
    return Views(objective, [table.part(0, block) for block in range(BLOCKS)])


def run(table: Table, count: int, **spec: float) -> RaceResult:
    return race(
        [recipe(n) for n in range(count)],
        scorer=table,
        views=views(),
        spec=RacingSpec.model_validate({"blocks": BLOCKS, **spec}),
        order=(3, 0, 4, 1, 2),
        phase="generation 0",
    )


SPREAD = np.linspace(1, -2, 12).tolist()


def test_the_clearly_worse_stop_and_the_others_meet_everything() -> None:
    table = Table(SPREAD, seed=0)
    found = run(table, 12)
    assert found.complete[:3] == (True,) * 3
    assert not any(found.complete[-4:])
    assert len(table.executed) < 0.8 * 12 * BLOCKS
    for number, (done, blocks) in enumerate(zip(found.complete, found.blocks, strict=True)):
        result = found.results[number]
        assert isinstance(result, Scores)
        assert result.blocks == blocks
        assert done == (blocks == tuple(range(BLOCKS)))
        if done:
            assert found.losses[number, 0] == views()(range(BLOCKS)).loss(table.whole(number))


def test_losses_know_how_deep_the_recipes_are() -> None:
    table = Table([0.5, 0.5], seed=0)
    whole = views()(range(BLOCKS)).normaliser
    priced = Objective(ObjectiveSpec(depth=0.5), whole, layers=8)
    recipes = [recipe(0), dataclasses.replace(recipe(1), num_layers=12)]
    found = race(
        recipes,
        scorer=table,
        views=Views(priced, views().base),
        spec=RacingSpec(blocks=BLOCKS, keep=1.0),
        order=range(BLOCKS),
        phase="generation 0",
    )
    free = [views()(range(BLOCKS)).loss(table.whole(n)) for n in range(2)]
    assert found.losses[:, 0] == pytest.approx([free[0], free[1] + 0.25])


def test_who_left_is_told_its_distance_to_the_complete_on_the_items_both_met() -> None:
    table = Table(SPREAD, seed=0, harder=1.0)
    found = run(table, 12)
    whole = views()(range(BLOCKS))
    complete = [i for i in range(12) if found.complete[i]]
    level = np.mean([whole.loss(table.whole(i)) for i in complete])
    for number in sorted(set(range(12)) - set(complete)):
        blocks = found.blocks[number]
        seen = [views()(blocks).loss(joined([table.part(i, b) for b in blocks])) for i in (number, *complete)]
        assert found.losses[number, 0] == pytest.approx(level + seen[0] - np.mean(seen[1:]), abs=1e-12)
        assert found.losses[number, 0] > np.sort(found.losses[:, 0])[2]


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_the_error_rate_is_kept(spread: float) -> None:
    """How often one of the best 3 of 12 stops early, in 60 generations: at most 20 % is stated."""
    wrong = 0
    whole = views()(range(BLOCKS))
    for seed in range(60):
        skills = np.random.default_rng([7, seed]).normal(0, spread, 12)
        table = Table(skills.tolist(), seed=seed)
        found = run(table, 12, error=0.2)
        true = [whole.loss(table.whole(number)) for number in range(12)]
        wrong += not all(found.complete[i] for i in np.argsort(true, kind="stable")[:3])
    assert wrong <= 12


def test_a_race_repeats_itself_and_scores_nothing_twice() -> None:
    table = Table(SPREAD, seed=3)
    first = run(table, 12)
    executed = list(table.executed)
    assert len(set(executed)) == len(executed)
    again = run(table, 12)
    assert table.executed == executed
    assert again.losses.tobytes() == first.losses.tobytes()
    assert again.blocks == first.blocks


def test_a_failure_on_a_later_block_is_the_candidates_failure() -> None:
    table = Table(SPREAD, seed=0, fail=(1, 4))
    found = run(table, 12)
    assert isinstance(found.results[1], Failure)
    assert found.blocks[1] == (0, 3, 4)
    assert not found.complete[1]
    assert found.losses[1, 0] == pytest.approx(
        max(0, np.delete(found.losses[:, 0], 1).max()) + FAILURE_MARGIN
    )


def test_when_all_fail_there_are_losses_all_the_same() -> None:
    class Broken(Table):
        def score(
            self, recipes: Sequence[Recipe], split: Split, phase: str, blocks: Sequence[int] | None = None
        ) -> list[Scores | Failure]:
            return [Failure(kind="error", reason="no") for _ in recipes]

    found = run(Broken(SPREAD, seed=0), 4)
    assert found.losses.tolist() == [[FAILURE_MARGIN]] * 4
    assert found.blocks == ((3,),) * 4


@pytest.mark.parametrize(("settings", "jobs"), [({"keep": 1.0}, 1), ({"blocks_min": BLOCKS}, 1)])
def test_without_a_look_everything_is_scored_at_once(settings: dict[str, float], jobs: int) -> None:
    table = Table(SPREAD, seed=0)
    found = run(table, 12, **settings)
    assert all(found.complete)
    assert table.executed[:BLOCKS] == [(0, block) for block in (3, 0, 4, 1, 2)]
    expected = views()(range(BLOCKS)).losses([table.whole(n) for n in range(12)])
    assert found.losses.tobytes() == expected.tobytes()


def test_a_shorter_race_ends_on_its_own_blocks() -> None:
    table = Table(SPREAD, seed=0)
    found = race(
        [recipe(n) for n in range(12)],
        scorer=table,
        views=views(),
        spec=RacingSpec(blocks=BLOCKS),
        order=(2, 4),
        phase="g",
    )
    assert {blocks for blocks, done in zip(found.blocks, found.complete, strict=True) if done} == {(2, 4)}
    assert all(block in (2, 4) for _, block in table.executed)


def test_contributions_sum_to_the_loss_on_any_blocks() -> None:
    table = Table(SPREAD, seed=5)
    seen = views()
    for blocks in ((0,), (1, 3), tuple(range(BLOCKS))):
        for number in range(12):
            scores = joined([table.part(number, block) for block in blocks])
            total = sum(values.mean() for values in seen(blocks).contributions(scores))
            assert total == pytest.approx(seen(blocks).loss(scores), abs=1e-12)


def test_the_order_begins_with_the_block_that_ranks_like_all() -> None:
    """Block 2 ranks four models as they are, the others in some part wrongly."""
    wrong = {0: (3, 2, 1, 0), 1: (1, 0, 3, 2), 2: (0, 1, 2, 3), 3: (0, 2, 1, 3), 4: (0, 1, 2, 3)}

    def part(rank: int, block: int) -> Scores:
        value = 0.1 * rank * (10 if block in (2, 4) else 1)
        skills = tuple(TaskScores(task=name, metric=np.full(4, value)) for name in "ab")
        return Scores(
            split="search", tasks=(*skills, TaskScores(task="text", metric=np.full(4, -2.0))), blocks=(block,)
        )

    base = [part(0, block) for block in range(BLOCKS)]
    best = [part(4, block) for block in range(BLOCKS)]
    objective = Objective(
        ObjectiveSpec(smooth=0), Normaliser(SUITE, base=joined(base), parents={"p": joined(best)})
    )
    models = [[part(wrong[block][m], block) for block in range(BLOCKS)] for m in range(4)]
    order = block_order(Views(objective, base), models)
    assert order[0] == 2
    assert sorted(order) == list(range(BLOCKS))


def test_the_ledger_charges_a_block_of_a_recipe_once_but_every_generation_something() -> None:
    ledger = Ledger([10, 12])
    ledger.give("base", (0, 1))
    assert ledger.charge([("x", (0, 1)), ("y", (1,)), ("base", (0,))]) == 34
    assert ledger.charge([("x", (0, 1)), ("y", (0, 1))]) == 12  # new: block 0 of y
    assert ledger.charge([("x", (0, 1))]) == 12
    assert ledger.evaluations == pytest.approx(58 / 22)
