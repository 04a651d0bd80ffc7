"""Warm starts: descent in genome space on losses with known slopes, and what the loop makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from evomerge.errors import UserError
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, Split, TaskScores
from evomerge.evaluation.smooth_loss import PASSES, Gradient, SmoothLoss, SmoothTask, smooth_loss
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.search.descent import Chain, StepLosses, descend, parameters
from evomerge.search.loop import Search
from evomerge.search.objective import FLOOR, Objective, ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.plan import Outcome, SearchPlan
from evomerge.search.ports import Named, OutOfTime
from evomerge.search.spaces.merge_space import SearchSpace
from evomerge.search.spaces.space import Coordinate, Genome
from evomerge.search.warm_start import (
    GradientSpec,
    WarmStart,
    WarmStartSpec,
    automatic,
    distinct,
)
from tests.search.fakes import SUITE, TARGET, FakeBudget, FakeJournal, FakeScorer, Quiet
from tests.search.spaces.test_merge_space import inline, make

LOSS = SmoothLoss(tasks=(SmoothTask(task="a", gain=1.0, items=(0, 1, 2)),), price=0.0, softness=1.0)


class Bowl:
    """The squared distance of all real parameters from a target; fails at a step if told to."""

    def __init__(self, target: dict[str, float], fail_at: int | None = None) -> None:
        self.target, self.fail_at = target, fail_at
        self.not_after: float | None = None
        self.asked: list[tuple[str, SmoothLoss]] = []

    def gradient(self, recipe: Recipe, loss: SmoothLoss, *, step: int, steps: int) -> Gradient | Failure:
        self.asked.append((recipe.hash, loss))
        if step == self.fail_at:
            return Failure(kind="non_finite", reason="told to fail")
        total, groups = 0.0, []
        for group in recipe.groups:
            found = {}
            for name, target in self.target.items():
                away = np.ravel(group.parameters[name]) - target
                total += float((away**2).sum())
                found[name] = tuple((2 * away).tolist())
            groups.append(found)
        return Gradient(loss=total, groups=tuple(groups))


def gene(low: float, high: float, **changes: Any) -> dict[str, Any]:
    return {"low": low, "high": high, **changes}


LAYERED = inline(layers=1, method="task_arithmetic", genes={"weight": gene(-0.5, 1.5)})
SHARED = inline(layers=1, genes={"weight": gene(0, 1, per=["source"]), "lambda": gene(0.1, 10, scale="log")})


@pytest.mark.parametrize(
    ("space", "target"),
    [
        (make(LAYERED), {"weight": 0.9}),
        (make(SHARED), {"weight": 0.25, "lambda": 2.0}),
        (make("slerp_layers"), {"t": 0.1}),
    ],
)
def test_descent_finds_the_bottom_of_a_bowl(space: SearchSpace, target: dict[str, float]) -> None:
    spec = GradientSpec(steps=120, rate=0.1)
    found = descend(space, np.full(space.dimension, 0.5), spec, lambda _: LOSS, Bowl(target))
    assert found.losses[-1] < 1e-3 * found.losses[0]
    assert found.items == 120 * PASSES * LOSS.items
    for genome in (found.last, found.mean):
        for group in space.decode(genome).groups:
            for name, value in target.items():
                assert np.ravel(group.parameters[name]) == pytest.approx(value, abs=0.05)


def test_it_stays_inside_the_cube_and_discrete_coordinates_stay_as_they_are() -> None:
    whole = make(LAYERED)

    class Mixed:
        """The first coordinate a switch that the gradient must not touch."""

        sources, dimension = whole.sources, whole.dimension
        coordinates = (Coordinate(levels=2), *whole.coordinates[1:])

        def decode(self, genome: Genome) -> Recipe:
            assert genome[0] == 0.25
            return whole.decode(genome)

        def encode(self, recipe: Recipe) -> Genome | None:
            return whole.encode(recipe)

        def describe(self) -> str:
            return "mixed"

    start = np.full(whole.dimension, 0.5)
    start[0] = 0.25
    found = descend(Mixed(), start, GradientSpec(steps=40, rate=0.3), lambda _: LOSS, Bowl({"weight": 9.0}))
    assert found.last[0] == 0.25
    assert (found.last[1:] == 1.0).all()


def test_a_failed_step_ends_at_the_last_good_point() -> None:
    space = make(LAYERED)
    bowl = Bowl({"weight": 0.9}, fail_at=3)
    found = descend(space, np.full(space.dimension, 0.5), GradientSpec(steps=9), lambda _: LOSS, bowl)
    assert found.failure is not None
    assert found.items == 4 * PASSES * LOSS.items  # what failed has cost, too
    assert space.decode(found.last).hash == bowl.asked[2][0]


def test_the_jacobian_is_found_once_where_it_is_constant_and_again_where_it_is_not() -> None:
    calls = 0

    def counting(space: SearchSpace) -> Any:
        class Counting:
            sources, dimension, coordinates = space.sources, space.dimension, space.coordinates

            def decode(self, genome: Genome) -> Recipe:
                nonlocal calls
                calls += 1
                return space.decode(genome)

        return Counting()

    for spec, again in ((LAYERED, 0), (SHARED, 2 * make(SHARED).dimension)):
        space = make(spec)
        chain = Chain(counting(space))
        calls = 0
        for level in (0.3, 0.6):
            genome = np.full(space.dimension, level)
            recipe = space.decode(genome)
            names = ("weight",) if spec is LAYERED else ("weight", "lambda")
            bowl = Bowl(dict.fromkeys(names, 0.1))
            gradient = bowl.gradient(recipe, LOSS, step=0, steps=1)
            assert isinstance(gradient, Gradient)
            slope = chain.carried(genome, recipe, gradient)
            for i in range(space.dimension):
                ends = []
                for by in (-1e-2, 1e-2):
                    moved = genome.copy()
                    moved[i] += by
                    at = bowl.gradient(space.decode(moved), LOSS, step=0, steps=1)
                    assert isinstance(at, Gradient)
                    ends.append(at.loss)
                assert slope[i] == pytest.approx((ends[1] - ends[0]) / 2e-2, rel=1e-2, abs=1e-3)
        assert calls == 2 * space.dimension + again


def test_parameters_are_flat_in_order_of_groups() -> None:
    space = make(SHARED)
    recipe = space.decode(np.linspace(0.1, 0.9, space.dimension))
    first = recipe.groups[0].parameters
    assert parameters(recipe)[:5].tolist() == [*first["weight"], *first["density"], first["lambda"]]  # type: ignore[misc]
    assert distinct([Named(name="x", recipe=recipe), Named(name="y", recipe=recipe)]) == [
        Named(name="x", recipe=recipe)
    ]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (False, "off"),
        ("auto", "auto"),
        ("off", "off"),
        (True, GradientSpec()),
        ("on", GradientSpec()),
        ({"steps": 3}, GradientSpec(steps=3)),
    ],
)
def test_gradients_are_switched_as_yaml_reads_it(written: object, meant: object) -> None:
    assert WarmStartSpec.model_validate({"gradients": written}).gradients == meant


def test_the_surrogate_is_the_objective_with_soft_accuracies() -> None:
    scorer = Margins()
    base, a, b = (scorer.one(kind) for kind in ("base", "a", "b"))
    normaliser = Normaliser(SUITE, base=base, parents={"a": a, "b": b})
    rng = np.random.default_rng(0)
    gains = {skill.task: skill.share / skill.headroom for skill in normaliser.skills}
    settings: Any = {"gains": gains, "price": 0.2, "softness": 0.5}
    whole = smooth_loss(normaliser, base, share=1.0, rng=rng, **settings)
    assert [(t.task, t.gain, t.items) for t in whole.tasks] == [
        ("a", 0.5, tuple(range(10))),
        ("b", 0.5, tuple(range(10))),
    ]
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state
    part = smooth_loss(normaliser, base, share=0.4, rng=rng, **settings)
    assert part.items == 8
    assert part.key != whole.key
    same = smooth_loss(normaliser, base, share=0.4, rng=np.random.default_rng(0), **settings)
    assert part.key == same.key


def test_a_step_follows_the_objective_at_the_scores_that_the_steps_before_had() -> None:
    """With floors first as in `balanced`; at the end a task below its floor has the price, the other none."""
    scorer = Margins()
    base, a, b = (scorer.one(kind) for kind in ("base", "a", "b"))
    normaliser = Normaliser(SUITE, base=base, parents={"a": a, "b": b})
    objective = Objective(ObjectiveSpec(), normaliser)
    spec = GradientSpec(steps=4, share=0.5)

    def losses(one: Objective) -> StepLosses:
        seeds = np.random.SeedSequence(0).spawn(4)
        return StepLosses(one, base=base, start=a, spec=spec, price=0.2, seeds=seeds)

    def gains(loss: SmoothLoss) -> dict[str, float]:
        return {task.task: task.gain for task in loss.tasks}

    plain = losses(Objective(ObjectiveSpec(kind="mean"), normaliser))
    assert [gains(plain(step)) for step in (0, 3)] == [{"a": 0.5, "b": 0.5}] * 2
    floored = losses(objective.above("b", b))  # its floor: all of b, nothing of a
    assert floored.scores == pytest.approx([0.462, 0.0], abs=1e-3)  # a soft accuracy, of margins of +-0.5
    first = gains(floored(0))
    assert first["b"] > 2 * first["a"]
    for step in range(3):
        loss = floored(step)
        floored.learn(loss, Gradient(loss=0.0, groups=(), values={"a": 0.7311, "b": 0.2689}))
    last = gains(floored(3))
    assert last["b"] == pytest.approx(0.5 * (0.5 / 0.1 / np.log(11)) + 0.5 * (0.5 + FLOOR), rel=1e-3)
    for _ in range(20):  # b has come back
        floored.learn(loss, Gradient(loss=0.0, groups=(), values={"a": 0.2689, "b": 0.7311}))
    assert floored.scores == pytest.approx([0.0, 0.462], abs=0.01)
    assert gains(floored(3))["b"] < 1.0


def test_a_task_without_right_answers_moves_by_the_agreement_with_its_specialist() -> None:
    """From the start's exact score on; a whole agreement counts like a whole headroom."""
    exact = {split: {"a": value, "b": value} for split, value in (("base", 0.2), ("parent", 0.8))}

    def scores(values: dict[str, float]) -> Scores:
        rows = (TaskScores(task=task, metric=np.full(10, value)) for task, value in values.items())
        return Scores(split="search", tasks=tuple(rows))

    base, parent = scores(exact["base"]), scores(exact["parent"])
    normaliser = Normaliser(SUITE, base=base, parents={"a": parent, "b": parent})
    spec = GradientSpec(steps=4, share=0.5)
    losses = StepLosses(
        Objective(ObjectiveSpec(kind="mean"), normaliser),
        base=base,
        start=scores({"a": 0.5, "b": 0.2}),
        spec=spec,
        price=0.2,
        seeds=np.random.SeedSequence(0).spawn(4),
        taught=["a"],
    )
    loss = losses(0)
    assert [(task.task, task.gain) for task in loss.tasks] == [("a", 0.5)]  # `b` has no likelihood
    losses.learn(loss, Gradient(loss=0.0, groups=(), values={"a": 0.3}))
    assert losses.scores == pytest.approx([0.5, 0.0])
    for _ in range(40):
        losses.learn(loss, Gradient(loss=0.0, groups=(), values={"a": 0.5}))
    assert losses.scores == pytest.approx([0.7, 0.0], abs=1e-3)


def test_how_many_steps_a_budget_pays_for_is_recorded_once() -> None:
    class Small(FakeBudget):
        def evaluations(self, full: int, population: int) -> float | None:
            return 60.0

    journal, bowl = FakeJournal(), Bowl({"weight": 0.7})
    warm = WarmStart(gradients=GradientSpec(), automatic=True)
    search(Margins(), journal, warm, bowl, Small(1))
    decided = automatic(GradientSpec(), 60.0, items=10)
    assert decided is not None
    assert (journal.steps, journal.share) == (decided.steps, decided.share)
    assert len(bowl.asked) == decided.steps
    nothing = Bowl({"weight": 0.7})
    search(FakeScorer(), FakeJournal(), warm, nothing)  # no likelihoods, and no error
    assert not nothing.asked


def test_a_budget_whose_rest_pays_for_no_generation_goes_to_gradients() -> None:
    class Few(FakeBudget):
        allowed = 20.0

        def evaluations(self, full: int, population: int) -> float | None:
            return self.allowed

    class Refuses(FakeJournal):
        def record_ask(self, *args: object) -> None:
            raise AssertionError("a generation was begun")

    warm, bowl = WarmStart(gradients=GradientSpec(), automatic=True), Bowl({"weight": 0.7})
    outcome = search(Margins(), Refuses(), warm, bowl, Few(1))
    assert outcome.winner.name == "gradient start"
    assert outcome.stopped.startswith("gradients took the budget")
    whole = automatic(GradientSpec(), 20.0, items=10, generation=16.0)
    assert whole is not None
    assert (len(bowl.asked), whole.cost) == (whole.steps, pytest.approx(18.0, abs=0.3))

    larger = Few(1)
    larger.allowed = 40.0  # such as a run that goes on with a larger budget
    journal = FakeJournal()
    assert search(Margins(), journal, warm, Bowl({"weight": 0.7}), larger).stopped == "enough"

    class Generations(Few):  # a limit in generations alone
        def evaluations(self, full: int, population: int) -> float | None:
            return float(population)

    assert search(Margins(), FakeJournal(), warm, Bowl({"weight": 0.7}), Generations(1)).stopped == "enough"

    class Breaks(Bowl):
        def gradient(self, recipe: Recipe, loss: SmoothLoss, *, step: int, steps: int) -> Gradient | Failure:
            if step == 3:
                return Failure(kind="error", reason="no")
            return super().gradient(recipe, loss, step=step, steps=steps)

    assert search(Margins(), FakeJournal(), warm, Breaks({"weight": 0.7}), Few(1)).stopped == "enough"


def test_a_descent_ends_where_time_does() -> None:
    class Late(Bowl):
        def gradient(self, recipe: Recipe, loss: SmoothLoss, *, step: int, steps: int) -> Gradient | Failure:
            if step == 3:
                raise OutOfTime
            return super().gradient(recipe, loss, step=step, steps=steps)

    space, late = make(LAYERED), Late({"weight": 0.9})
    found = descend(space, np.full(space.dimension, 0.5), GradientSpec(steps=9), lambda _: LOSS, late)
    assert len(found.losses) == 3
    assert found.items == 3 * PASSES * LOSS.items


class Margins(FakeScorer):
    """The fake scorer with likelihoods."""

    def one(self, kind: str) -> Scores:
        tasks = []
        for task in TARGET:
            items = np.full(10, 1.0 if kind == task else 0.0)
            tasks.append(TaskScores(task=task, metric=items, smooth=items, margin=items - 0.5))
        return Scores(split="search", tasks=tuple(tasks))

    def _one(self, recipe: Recipe, split: Split, phase: str) -> Scores | Failure:
        found = super()._one(recipe, split, phase)
        if isinstance(found, Failure):
            return found
        tasks = tuple(dataclasses.replace(task, margin=task.metric - 0.5) for task in found)
        return Scores(split=split, tasks=tasks)


class Counts(FakeBudget):
    """A budget that records the items it receives."""

    def __init__(self, generations: int) -> None:
        super().__init__(generations)
        self.seen: list[int] = []

    def stop_reason(self, *, generations: int, items: int, **kwargs: int) -> str | None:
        self.seen.append(items)
        return super().stop_reason(generations=generations, items=items, **kwargs)


def search(
    scorer: FakeScorer, journal: FakeJournal, warm: WarmStart, slopes: Bowl, budget: FakeBudget | None = None
) -> Outcome:
    space = make("global_weights")
    plan = SearchPlan(
        suite=SUITE,
        space=space,
        template=space.decode(np.full(2, 0.5)),
        norms={"a": 1.0, "b": 2.0},
        optimizer=OptimizerSpec(sigma=0.01),
        objective=ObjectiveSpec(),
        finalists=3,
        seed=0,
        warm=warm,
    )
    budget = budget or FakeBudget(1)
    return Search(plan, scorer=scorer, journal=journal, budget=budget, observer=Quiet(), slopes=slopes).run()


def test_gradients_seed_the_search_have_their_own_row_and_count_towards_the_budget() -> None:
    scorer, journal, budget, bowl = Margins(), FakeJournal(), Counts(1), Bowl({"weight": 0.7})
    spec = GradientSpec(steps=50, share=0.5)
    outcome = search(scorer, journal, WarmStart(gradients=spec), bowl, budget)
    (start,) = (entry for role, _, entry in journal.entries if role == "start")
    assert start.name == "gradient start"
    assert start.recipe.groups[0].per_source("weight") == pytest.approx((0.7, 0.7), abs=0.01)
    assert (start.recipe.hash, "test", "test of the baselines") in scorer.asked
    assert outcome.winner.recipe.groups[0].per_source("weight") == pytest.approx((0.7, 0.7), abs=0.15)
    ends = 2 * 20  # the last point and the mean of the last ones, on all 20 items
    assert budget.seen[0] == 50 * PASSES * 10 + ends  # each step takes half of them, three times
    draws = {loss.key for _, loss in bowl.asked}
    assert len(draws) == 50  # other items at each step
    again = Bowl({"weight": 0.7})
    search(Margins(), FakeJournal(), WarmStart(gradients=spec), again)
    assert again.asked == bowl.asked


def test_given_recipes_are_scored_like_baselines_and_may_win() -> None:
    space = make("global_weights")
    template = space.decode(np.full(2, 0.5))
    group = TensorGroup(
        method="task_arithmetic", sources=("a", "b"), parameters={"weight": tuple(TARGET.values())}
    )
    given = Named(name="earlier run", recipe=dataclasses.replace(template, groups=(group,)))
    failing = Named(name="bad", recipe=space.decode(np.full(2, 0.123)))
    scorer, journal = Margins(fail=frozenset({failing.recipe.hash})), FakeJournal()
    outcome = search(scorer, journal, WarmStart(recipes=(given, failing)), Bowl({}))
    assert [entry for role, _, entry in journal.entries if role == "start"] == [given]
    assert outcome.winner.recipe == given.recipe  # nothing beats the target itself
    assert journal.tells[0].mean() < -0.9  # and the search began there


def test_without_likelihoods_there_is_nothing_to_follow() -> None:
    with pytest.raises(UserError, match="no task on `search` has answers with a likelihood"):
        search(FakeScorer(), FakeJournal(), WarmStart(gradients=GradientSpec()), Bowl({"weight": 0.5}))


def test_an_off_warm_start_asks_for_nothing() -> None:
    bowl, journal = Bowl({}), FakeJournal()
    search(Margins(), journal, WarmStart(), bowl)
    assert not bowl.asked
    roles: Sequence[str] = [role for role, _, _ in journal.entries]
    assert "start" not in roles


class Lucky(Margins):
    """What generations find is better than it is on `search`, and better by a gain on `select`."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.plain: set[str] = set()

    def _one(self, recipe: Recipe, split: Split, phase: str) -> Scores | Failure:
        found = super()._one(recipe, split, phase)
        if phase in ("base and parents", "baselines", "greedy soup", "gradient start"):
            self.plain.add(recipe.hash)
        if isinstance(found, Failure) or recipe.hash in self.plain:
            return found
        better = np.tile([0.05, -0.05], 5) + (self.gain if split == "select" else 0.3)
        tasks = [(task.task, task.metric + better) for task in found]
        return Scores(
            split=split,
            tasks=tuple(TaskScores(task=t, metric=m, smooth=m, margin=m - 0.5) for t, m in tasks),
        )


@pytest.mark.parametrize(("gain", "stays"), [(-0.1, True), (0.2, False)])
def test_only_a_clear_gain_on_select_takes_the_place_of_the_gradients_end(gain: float, stays: bool) -> None:
    warm = WarmStart(gradients=GradientSpec(steps=50))
    outcome = search(Lucky(gain), FakeJournal(), warm, Bowl({"weight": 0.7}))
    assert (outcome.winner.name == "gradient start") == stays
