"""Losses: what they reward, and what failures cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import ConfigError
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, TaskScores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.schema import parse
from evomerge.search.objective import (
    FAILURE_MARGIN,
    FLOOR,
    INFEASIBLE,
    SHORT,
    Objective,
    ObjectiveSpec,
    check_tokens,
)

SPLITS = {"search": "search", "select": "select", "test": "test"}
SUITE = Suite.model_validate(
    {
        "name": "s",
        "tasks": [
            {"task": "skill", "metric": "acc", "specialist": "p", "splits": SPLITS},
            {"task": "text", "metric": "loglikelihood", "role": "retention", "splits": SPLITS},
        ],
    }
)


def scores(accuracy: float, smooth: float, text: float = -2.0) -> Scores:
    hits = np.zeros(10)
    hits[: round(10 * accuracy)] = 1
    skill = TaskScores(task="skill", metric=hits, smooth=np.full(10, smooth))
    return Scores(split="search", tasks=(skill, TaskScores(task="text", metric=np.full(5, text))))


def objective(**settings: float) -> Objective:
    normaliser = Normaliser(SUITE, base=scores(0, 0.2), parents={"p": scores(1, 0.7)})
    return Objective(ObjectiveSpec.model_validate(settings), normaliser)


def test_base_and_specialist_are_zero_and_minus_one() -> None:
    assert objective().loss(scores(0, 0.2)) == pytest.approx(0)
    assert objective().loss(scores(1, 0.7)) == pytest.approx(-1)


def test_the_smooth_term_breaks_ties() -> None:
    assert objective(smooth=0.3).loss(scores(0.5, 0.45)) < objective(smooth=0.3).loss(scores(0.5, 0.4))
    assert objective(smooth=0).loss(scores(0.5, 0.45)) == objective(smooth=0).loss(scores(0.5, 0.4))


def test_lost_retention_costs_and_gained_retention_does_not_pay() -> None:
    plain = objective(retention=0.5)
    assert plain.loss(scores(0.5, 0.4, -2.1)) == pytest.approx(
        plain.loss(scores(0.5, 0.4)) + 0.5 * (1 - np.exp(-0.1))
    )
    assert plain.loss(scores(0.5, 0.4, -1.9)) == plain.loss(scores(0.5, 0.4))


def test_failures_are_worse_than_the_worst() -> None:
    failure = Failure(kind="crash", reason="died")
    losses = objective().losses([scores(1, 0.7), failure, scores(0, 0.0)])
    assert losses.shape == (3, 1)
    assert losses[1, 0] == pytest.approx(max(losses[0, 0], losses[2, 0]) + FAILURE_MARGIN)
    assert objective().losses([failure, failure]).tolist() == [[FAILURE_MARGIN], [FAILURE_MARGIN]]


# Several objectives, depth, weights ---------------------------------------------------------------------

TWO = Suite.model_validate(
    {
        "name": "two",
        "tasks": [
            {"task": "a", "metric": "acc", "specialist": "p", "splits": SPLITS},
            {"task": "b", "metric": "acc", "specialist": "q", "weight": 3, "splits": SPLITS},
            {"task": "text", "role": "retention", "splits": SPLITS},
            {"task": "free", "role": "coherence", "splits": SPLITS},
        ],
    }
)


def four(a: float, b: float, text: float = 1.0, free: float = 0.8) -> Scores:
    """Scores with these normalised values of the skills, this retention, and this share of distinct text."""
    tasks = [
        TaskScores(task="a", metric=np.full(4, 0.1 + 0.8 * a), smooth=np.full(4, 0.2 + 0.5 * a)),
        TaskScores(task="b", metric=np.full(4, 0.5 * b), smooth=np.full(4, 0.3 + 0.4 * b)),
        TaskScores(task="text", metric=np.full(4, -2.0 + np.log(text))),
        TaskScores(task="free", metric=np.full(4, free)),
    ]
    return Scores(split="search", tasks=tuple(tasks))


def of(layers: int | None = None, suite: Suite = TWO, **settings: object) -> Objective:
    references = Normaliser(suite, base=four(0, 0), parents={"p": four(1, 0), "q": four(0, 1)})
    return Objective(ObjectiveSpec.model_validate(settings), references, layers=layers)


def recipe(layers: int | None = None) -> Recipe:
    group = TensorGroup(method="linear", sources=("p",))
    return Recipe(models={"base": "x", "p": "y"}, base="base", groups=(group,), num_layers=layers)


def test_each_objective_is_zero_for_the_base_and_minus_one_for_the_specialist() -> None:
    objective = of(several=["a", "b", "mean", {"a": 2, "b": 2}, "retention", "coherence", "depth"])
    assert objective.count == 7
    base, one = objective.losses([four(0, 0), four(1, 0, text=0.9, free=0.4)])
    assert base == pytest.approx(0)
    assert one == pytest.approx([-1, 0, -0.25, -0.5, 0.1, 0.5, 0])


def test_a_group_of_all_tasks_with_the_suites_weights_is_the_mean() -> None:
    losses = of(several=["mean", {"a": 1, "b": 3}]).losses([four(0.3, 0.9), four(0.7, 0.2)])
    assert losses[:, 0] == pytest.approx(losses[:, 1])


def test_depth_counts_layers_against_the_bases() -> None:
    deep, flat = recipe(12), recipe()
    objective = of(layers=8, several=["mean", "depth"])
    losses = objective.losses([four(0, 0)] * 3, [deep, flat, recipe(6)])
    assert losses[:, 1] == pytest.approx([0.5, 0, -0.25])
    priced = of(layers=8, depth=0.2).losses([four(0, 0)] * 3, [deep, flat, recipe(6)])
    assert priced[:, 0] == pytest.approx([0.1, 0, -0.05])


def test_lost_coherence_has_a_price() -> None:
    assert of(coherence=0.5).loss(four(0, 0, free=0.6)) == pytest.approx(0.5 * 0.25)
    assert of(coherence=0.5).loss(four(0, 0, free=1.0)) == pytest.approx(0)


@pytest.mark.parametrize("free", [0.3, 0.8, 0.95])
def test_what_items_add_sums_to_the_loss(free: float) -> None:
    objective, found = of(coherence=0.5, retention=0.4), four(0.2, 0.6, text=0.9, free=free)
    added = objective.contributions(found)
    assert len(added) == 4
    assert sum(values.mean() for values in added) == pytest.approx(objective.loss(found))


def test_weights_replace_the_suites() -> None:
    suite = TWO.weighted({"a": 1, "b": 0})
    assert of(suite=suite).loss(four(0.4, 0.9)) == pytest.approx(-0.4)
    assert [task.weight for task in TWO.tasks] == [1, 3, 1, 1]


def test_scalar_losses_are_those_of_one_objective() -> None:
    results = [four(0.3, 0.9), Failure(kind="crash", reason="died"), four(0.7, 0.2, text=0.9)]
    assert of(several=["a", "b"]).scalar_losses(results).tolist() == of().losses(results)[:, 0].tolist()


WRONG: list[tuple[dict[str, object], str]] = [
    ({"several": ["a", "c"]}, "several: 'c' is no skill task"),
    ({"several": ["a", {"a": 1, "c": 1}]}, "several: 'c' is no skill task"),
    ({"several": ["a", {"b": 1, "retention": 1}]}, "can't be part of a group"),
    ({"several": ["a", "text"]}, "several: 'text' is no skill task"),
    ({"constraints": {"tasks": {"c": 0.5}}}, "constraints.tasks: 'c' is no skill task"),
    ({"constraints": {"tasks": {"mean": 0.5}}}, "constraints.tasks: 'mean' is no skill task"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_what_the_suite_does_not_have_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ObjectiveSpec.model_validate(settings).check(TWO, ["p"])


@pytest.mark.parametrize("role", ["retention", "coherence"])
def test_what_nothing_measures_is_refused(role: str) -> None:
    bare = Suite.model_validate({"name": "bare", "tasks": [task.model_dump() for task in TWO.tasks[:2]]})
    for settings in ({"several": ["mean", role]}, {"constraints": {role: 0.9}}):
        with pytest.raises(ConfigError, match=f"{role} is part of it, but no task"):
            ObjectiveSpec.model_validate(settings).check(bare, ["p"])
        ObjectiveSpec.model_validate(settings).check(TWO, ["p"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"several": ["mean"]}, "one objective is not several"),
        ({"several": ["a", "b", "a"]}, "stands twice"),
        ({"several": ["a", {"b": 0}]}, "a weight above 0"),
        ({"constraint": {}}, "did you mean 'constraints'"),
        ({"constraints": {"retension": 1}}, "did you mean 'retention'"),
    ],
)
def test_a_badly_written_objective_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ObjectiveSpec, settings, "objective")


# Constraints -------------------------------------------------------------------------------------------

SHARE = st.floats(-0.5, 1.5).map(lambda x: round(x, 3))
SCORED = st.builds(four, SHARE, SHARE, st.floats(0.5, 1.2), st.floats(0.0, 1.0))
LIMITS = {"tasks": {"a": 0.5, "b": 0.2}, "retention": 0.9, "coherence": 0.7}


@given(st.lists(SCORED, min_size=2, max_size=8), st.sampled_from([("a", "b"), ("mean", "retention", "b")]))
def test_feasible_before_infeasible_and_those_by_violation(
    found: list[Scores], several: tuple[str, ...]
) -> None:
    free, limited = of(several=several), of(several=several, constraints=LIMITS)
    failed = Failure(kind="crash", reason="died")
    losses = limited.losses([*found, failed])
    assert np.isfinite(losses).all()
    assert (losses[-1] >= losses[:-1].max(axis=0) + FAILURE_MARGIN).all()
    plain = free.losses(found)
    for i, one in enumerate(found):
        v = limited.violation(one)
        assert (v > 0) == bool(limited.shortfalls(one))
        if v > 0:
            assert losses[i] == pytest.approx(INFEASIBLE + v)
        else:
            assert (losses[i] < INFEASIBLE).all()
        for j, other in enumerate(found):
            w = limited.violation(other)
            if v == w == 0:  # the order of the losses themselves, objective by objective
                assert ((plain[i] < plain[j] - 1e-9) <= (losses[i] < losses[j])).all()
            elif v < w - 1e-9:
                assert (losses[i] < losses[j]).all()


def test_a_violation_is_what_is_missing() -> None:
    objective = of(constraints=LIMITS)
    assert objective.violation(four(0.5, 0.2, 0.9, 0.56)) == pytest.approx(0, abs=1e-9)
    assert objective.violation(four(0.3, 0.2, 0.9, 0.6)) == pytest.approx(0.2, abs=1e-9)
    assert objective.violation(four(0.3, 0.9, 0.85, 0.4)) == pytest.approx(0.2 + 0.05 + 0.2, abs=1e-9)
    short = objective.shortfalls(four(0.3, 0.9, 0.85, 0.6))
    assert {name: pytest.approx(pair) for name, pair in short.items()} == {
        "a": (0.3, 0.5),
        "retention": (0.85, 0.9),
    }


def test_one_share_for_all_tasks_of_the_mean() -> None:
    objective = of(constraints={"tasks": 0.5})
    assert set(objective.shortfalls(four(0.4, 0.1))) == {"a", "b"}
    assert not objective.shortfalls(four(0.6, 0.51))


def test_a_lost_skill_still_shows_the_way_back() -> None:
    objective = of(constraints={"tasks": 0.2})
    gone, nearly = four(0.0, 0.5), four(0.0, 0.5)
    hint = TaskScores(task="a", metric=gone["a"].metric, smooth=np.full(4, 0.24))
    nearly = Scores(split="search", tasks=(hint, *gone.tasks[1:]))
    assert 0 < objective.violation(nearly) < objective.violation(gone)


@given(st.lists(SCORED, min_size=1, max_size=8))
def test_no_infeasible_point_lies_before_the_reference(found: list[Scores]) -> None:
    objective = of(several=["a", "b"], constraints=LIMITS)
    reference = objective.reference_point([four(0, 0), *found])
    for losses, scores in zip(objective.losses(found), found, strict=True):
        if objective.violation(scores) > 0:
            assert not (losses < reference).all()
    assert (of(several=["a", "b"]).losses(found) < of(several=["a", "b"]).reference_point(found)).all()


@given(SCORED)
def test_of_one_loss_what_is_missing_has_a_price(found: Scores) -> None:
    free, limited = of(smooth=0, kind="mean"), of(smooth=0, kind="mean", constraints=LIMITS)
    tasks = free.normaliser.task(found)
    missing = sum(max(0.0, limit - tasks[task]) for task, limit in LIMITS["tasks"].items())  # type: ignore[attr-defined]
    kept = (free.normaliser.retention(found), 0.9), (free.normaliser.coherence(found), 0.7)
    missing += sum(max(0.0, least - value) for value, least in kept if value is not None)
    assert limited.loss(found) == pytest.approx(free.loss(found) + SHORT * missing)
    assert (missing < 1e-9) == (limited.violation(found) < 1e-9)


# Kinds ---------------------------------------------------------------------------------------------------


def test_floors_are_what_the_best_hand_made_merge_has_less_its_error() -> None:
    varied = four(0.4, 0.6)
    parts = {"a": np.array([0.0, 1.0, 0.0, 1.0]), "b": np.full(4, 0.3)}
    standard = Scores(
        split="search",
        tasks=tuple(
            TaskScores(task=t.task, metric=parts.get(t.task, t.metric), smooth=t.smooth) for t in varied
        ),
    )
    plain, floored = of(smooth=0), of(smooth=0).above("TIES", standard)
    assert floored.standard is not None
    error = np.std(parts["a"], ddof=1) / np.sqrt(4) / 0.8
    assert floored.floors() == pytest.approx({"a": 0.5 - error, "b": 0.6})
    above, below = four(0.5, 0.7), four(0.5, 0.4)
    assert floored.loss(above) == pytest.approx(plain.loss(above))
    assert floored.loss(below) == pytest.approx(plain.loss(below) + FLOOR * 0.2)
    assert floored.loss(standard) == pytest.approx(plain.loss(standard))  # the start keeps its own floors
    assert of(kind="mean").above("TIES", standard).standard is None
    assert of(several=["a", "b"]).above("TIES", standard).standard is None


def test_a_skill_that_is_nearly_lost_counts_most_where_the_kind_is_balanced() -> None:
    balanced = of(kind="balanced", smooth=0)
    assert balanced.losses([four(0, 0), four(1, 1)])[:, 0] == pytest.approx([0, -1])
    even, uneven = four(0.5, 0.5), four(0.0, 0.7)
    assert of(kind="mean", smooth=0).loss(uneven) < of(kind="mean", smooth=0).loss(even)
    assert balanced.loss(even) < balanced.loss(uneven)
    gains = [balanced.loss(four(a, 0.5)) - balanced.loss(four(a + 0.1, 0.5)) for a in (-0.2, 0.0, 0.4, 0.8)]
    assert gains == sorted(gains, reverse=True)


@given(SCORED, SCORED, st.sampled_from(["mean", "balanced", "floors"]), st.booleans())
def test_what_items_contribute_has_the_loss_as_its_sum_and_its_slope(
    found: Scores, standard: Scores, kind: str, limited: bool
) -> None:
    one = of(kind=kind, constraints=LIMITS if limited else {}).above("TIES", standard)
    parts = one.contributions(found)
    assert sum(float(part.mean()) for part in parts) == pytest.approx(one.loss(found))
    # One item of a task moves, and the loss with it: by the slope, where no border is crossed.
    step = 1e-6
    for index, name in enumerate(("a", "b")):
        tasks = []
        for task in found:
            metric = np.array(task.metric)
            if task.task == name:
                metric[0] += step
            tasks.append(TaskScores(task=task.task, metric=metric, smooth=task.smooth))
        moved = Scores(split="search", tasks=tuple(tasks))
        by_item = one.contributions(moved)[index] - parts[index]
        change = one.loss(moved) - one.loss(found)
        if abs(change) > 1e-9 and abs(by_item[0] - by_item[1]) < 1e-4:
            assert (by_item[0] - by_item[1]) / 4 == pytest.approx(change, rel=0.05, abs=1e-9)


# Generated tokens -----------------------------------------------------------------------------------------

WRITTEN = Suite.model_validate(
    {
        "name": "written",
        "tasks": [
            {"task": "a", "metric": "exact_match", "specialist": "p", "splits": SPLITS},
            {"task": "b", "metric": "acc", "specialist": "p", "splits": SPLITS},
            {"task": "free", "role": "coherence", "splits": SPLITS},
            {"task": "shown", "metric": "exact_match", "weight": 0, "splits": SPLITS},
        ],
    }
)


def written(a: float, tokens: Sequence[float], free: float = 10.0) -> Scores:
    """Scores with this accuracy of `a`, its tokens by item, and the tokens of every free answer."""
    tasks = [
        TaskScores(task="a", metric=np.full(4, a), tokens=np.array(tokens)),
        TaskScores(task="b", metric=np.full(4, a)),
        TaskScores(task="free", metric=np.full(2, 0.8), tokens=np.full(2, free)),
        TaskScores(task="shown", metric=np.zeros(4), tokens=np.full(4, 1000.0 * a)),
    ]
    return Scores(split="search", tasks=tuple(tasks))


def of_written(**settings: object) -> Objective:
    spec = ObjectiveSpec.model_validate(settings)
    base, parent = written(0.1, [10, 30, 20, 20]), written(0.9, [40] * 4, 30)
    normaliser = Normaliser(WRITTEN, base=base, parents={"p": parent}, tokens_of=spec.tokens_of)
    return Objective(spec, normaliser)


def test_tokens_are_the_mean_length_relative_to_the_bases_on_the_same_items() -> None:
    """Of tasks that generate and count: skills and coherence, not what is only reported."""
    both = of_written(several=["mean", "tokens"])
    assert both.names == ("mean", "tokens")
    assert both.point(written(0.1, [10, 30, 20, 20])) == pytest.approx([0, 0])
    assert both.point(written(0.9, [40] * 4, 30)) == pytest.approx([-1, 220 / 100 - 1])
    assert both.point(written(0.5, [0] * 4, 0)) == pytest.approx([-0.5, -1])
    part = both.on(written(0.1, [10, 10, 10, 10], 5))  # other items, on which the base is briefer
    assert part.point(written(0.1, [10, 10, 10, 10], 5))[1] == pytest.approx(0)


def test_tokens_relative_to_a_parent() -> None:
    both = of_written(several=["mean", "tokens"], tokens_of="p", constraints={"tokens": 0.5})
    base, parent = written(0.1, [10, 30, 20, 20]), written(0.9, [40] * 4, 30)
    assert both.point(parent) == pytest.approx([-1, 0])
    assert both.point(base) == pytest.approx([0, 100 / 220 - 1])
    assert both.violation(base) == 0
    assert both.violation(parent) == pytest.approx(0.5)
    part = both.on(written(0.1, [10, 10, 10, 10], 5))  # the unit stays
    assert part.point(written(0.1, [22, 22, 22, 22], 11))[1] == pytest.approx(0)
    silent = Normaliser(
        WRITTEN, base=base, parents={"p": written(0.9, [0] * 4, 0)}, tokens_of="p"
    )  # no division by zero
    assert silent.tokens(base) == pytest.approx(100)


def test_the_model_whose_answers_have_length_1_must_be_there() -> None:
    spec = ObjectiveSpec.model_validate({"several": ["mean", "tokens"], "tokens_of": "shrot"})
    with pytest.raises(ConfigError, match=r"tokens_of: no model is called 'shrot'[\s\S]*short"):
        spec.check(TWO, ["short", "long"])
    spec.model_copy(update={"tokens_of": "base"}).check(TWO, ["short"])


def test_a_limit_of_tokens() -> None:
    limited = of_written(constraints={"tokens": 1.2})
    long, short = written(0.9, [40] * 4, 30), written(0.5, [25] * 4, 10)
    assert limited.violation(short) == 0
    assert limited.shortfalls(short) == {}
    assert limited.violation(long) == pytest.approx(2.2 - 1.2)
    assert limited.shortfalls(long) == {"tokens": (pytest.approx(2.2), 1.2)}
    free = of_written()
    assert limited.losses([long, short])[:, 0] == pytest.approx(
        [free.loss(long) + SHORT * (2.2 - 1.2), free.loss(short)]
    )


def test_a_limit_of_tokens_leaves_the_search_to_the_optimizer() -> None:
    """The surrogate predicts no lengths."""
    assert not ObjectiveSpec.model_validate({"constraints": {"tokens": 1.2}}).items_decide
    assert ObjectiveSpec.model_validate({"constraints": {"tasks": 0.5}}).items_decide


@pytest.mark.parametrize(
    "settings",
    [{"several": ["mean", "tokens"]}, {"constraints": {"tokens": 1.5}}, {"tokens_of": "p"}],
)
def test_tokens_need_a_task_that_generates(settings: dict[str, object]) -> None:
    spec = ObjectiveSpec.model_validate(settings)
    with pytest.raises(ConfigError, match="tokens is part of it, but no task generates answers"):
        check_tokens(spec, generates=False)
    check_tokens(ObjectiveSpec(), generates=False)
    check_tokens(spec, generates=True)
