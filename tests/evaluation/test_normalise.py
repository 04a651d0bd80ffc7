"""0 is the base, 1 the specialist, and the mean is what the items say it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import ConfigError
from evomerge.evaluation import statistics
from evomerge.evaluation.gains import (
    ERRORS,
    Gain,
    dud_sentences,
    find_duds,
    find_gains,
    refuse_nothing,
    trusts,
)
from evomerge.evaluation.normalise import HEADROOM_FLOOR, Normaliser
from evomerge.evaluation.scores import Scores, TaskScores
from evomerge.evaluation.suite import Suite

SPLITS = {"search": "a", "select": "b", "test": "c"}


def suite_of(*tasks: dict[str, Any]) -> Suite:
    filled = [{"splits": SPLITS} | ({"metric": "acc"} if "role" not in t else {}) | t for t in tasks]
    return Suite.model_validate({"name": "s", "tasks": filled})


def scores_of(split: Any = "search", **tasks: float | tuple[float, float]) -> Scores:
    """Return scores of two items around each mean; a pair gives the metric's and the smooth mean."""
    found = []
    for task, value in tasks.items():
        metric, smooth = value if isinstance(value, tuple) else (value, None)
        spread = np.array([-0.01, 0.01])
        found.append(
            TaskScores(task=task, metric=metric + spread, smooth=None if smooth is None else smooth + spread)
        )
    return Scores(split=split, tasks=tuple(found))


SUITE = suite_of(
    {"task": "add", "specialist": "adder", "weight": 3},
    {"task": "sort"},
    {"task": "shown", "weight": 0},
    {"task": "text", "role": "retention"},
)
BASE = scores_of(add=(0.2, 0.1), sort=(0.1, 0.1), shown=0.0, text=-2.0)
PARENTS = {
    "adder": scores_of(add=(0.8, 0.5), sort=(0.0, 0.0), shown=0.5, text=-2.1),
    "sorter": scores_of(add=(0.9, 0.9), sort=(0.6, 0.3), shown=0.4, text=-2.1),
}
NORMALISER = Normaliser(SUITE, base=BASE, parents=PARENTS)
MERGED = scores_of(add=(0.5, 0.3), sort=(0.35, 0.2), shown=0.25, text=-2.05)


def test_base_is_zero_and_the_references_are_one() -> None:
    assert NORMALISER.task(BASE) == pytest.approx({"add": 0, "sort": 0, "shown": 0})
    assert NORMALISER.task(PARENTS["adder"])["add"] == pytest.approx(1)  # named, though sorter is better
    assert NORMALISER.task(PARENTS["sorter"])["add"] == pytest.approx(7 / 6)
    assert NORMALISER.task(PARENTS["sorter"])["sort"] == pytest.approx(1)  # the best parent
    assert NORMALISER.mean(BASE) == pytest.approx(0)


def test_means_are_weighted_and_leave_out_what_is_only_shown() -> None:
    better = scores_of(add=(0.8, 0.3), sort=(0.1, 0.1), shown=1.0, text=-2.0)
    assert NORMALISER.mean(better) == pytest.approx(0.75)
    assert NORMALISER.weights.tolist() == [0.75, 0.25]


def test_smooth_mean_uses_the_companions_own_scale() -> None:
    assert NORMALISER.smooth_mean(MERGED) == pytest.approx(0.75 * 0.5 + 0.25 * 0.5)
    assert NORMALISER.smooth_mean(PARENTS["adder"]) == pytest.approx(0.75 * 1 + 0.25 * -0.5)


def test_smooth_mean_falls_back_on_the_metric() -> None:
    suite = suite_of({"task": "add"}, {"task": "write"})
    normaliser = Normaliser(
        suite, base=scores_of(add=(0.0, 0.0), write=0.0), parents={"p": scores_of(add=(1.0, 0.5), write=0.8)}
    )
    assert normaliser.smooth_mean(scores_of(add=(0.0, 0.25), write=0.4)) == pytest.approx(0.5)


def test_items_carry_the_mean() -> None:
    items = NORMALISER.items(MERGED)
    assert [len(task) for task in items] == [2, 2]
    assert not any(task.flags.writeable for task in items)
    means = [float(task.mean()) for task in items]
    assert sum(w * m for w, m in zip(NORMALISER.weights, means, strict=True)) == pytest.approx(
        NORMALISER.mean(MERGED)
    )


def test_retention_is_the_ratio_of_perplexities() -> None:
    assert NORMALISER.retention(BASE) == pytest.approx(1)
    assert NORMALISER.retention(MERGED) == pytest.approx(math.exp(2.0) / math.exp(2.05))


def test_what_one_text_gains_does_not_make_up_for_what_another_loses() -> None:
    suite = suite_of(
        {"task": "add"},
        {"task": "answers", "role": "retention", "weight": 3},
        {"task": "prose", "role": "retention"},
        {"task": "story", "role": "coherence"},
        {"task": "letter", "role": "coherence"},
    )
    base = scores_of(add=0.0, answers=-4.0, prose=-2.0, story=0.5, letter=0.8)
    normaliser = Normaliser(suite, base=base, parents={"p": base})
    merged = scores_of(add=0.0, answers=-1.0, prose=-2.5, story=0.9, letter=0.4)
    assert normaliser.retention(merged) == pytest.approx(0.75 + 0.25 * math.exp(-0.5))
    assert normaliser.coherence(merged) == pytest.approx(0.5 + 0.5 * 0.5)
    parts = normaliser.contributions(merged, smooth=0.0, retention=2.0, coherence=4.0)
    lost = 2.0 * 0.25 * (1 - math.exp(-0.5)) + 4.0 * 0.25
    assert sum(float(part.mean()) for part in parts) == pytest.approx(lost)
    assert [len(set(part.tolist())) for part in parts[1:]] == [1, 2, 1, 2]  # what is not lost has no error


def test_no_retention_task() -> None:
    suite = suite_of({"task": "add"})
    normaliser = Normaliser(suite, base=BASE, parents=PARENTS)
    assert normaliser.retention(MERGED) is None


@given(base=st.floats(0, 1), specialist=st.floats(0, 1), merged=st.floats(0, 1))
def test_little_headroom_does_not_blow_up_noise(base: float, specialist: float, merged: float) -> None:
    suite = suite_of({"task": "add"})
    normaliser = Normaliser(suite, base=scores_of(add=base), parents={"p": scores_of(add=specialist)})
    value = normaliser.mean(scores_of(add=merged))
    assert abs(value) <= abs(merged - base) / HEADROOM_FLOOR + 1e-9
    assert math.copysign(1, value) == math.copysign(1, merged - base) or abs(value) < 1e-9


def test_a_task_without_search_items_is_shown_but_never_counted() -> None:
    late = {"task": "late", "splits": {"select": "b", "test": "c"}}
    suite = suite_of({"task": "add"}, late)
    base, parent = scores_of("test", add=0.0, late=0.0), scores_of("test", add=1.0, late=1.0)
    normaliser = Normaliser(suite, base=base, parents={"p": parent})
    merged = scores_of("test", add=0.5, late=0.9)
    assert normaliser.task(merged) == pytest.approx({"add": 0.5, "late": 0.9})
    assert normaliser.mean(merged) == pytest.approx(0.5)


def test_an_unknown_specialist() -> None:
    with pytest.raises(ConfigError) as caught:
        Normaliser(SUITE, base=BASE, parents={"ader": PARENTS["adder"]})
    assert str(caught.value) == (
        "suite 's': task 'add' names the specialist 'adder', which is not among the sources\n"
        "  do: did you mean 'ader'? Valid: ader"
    )


def test_splits_are_never_mixed() -> None:
    with pytest.raises(AssertionError, match="another split"):
        NORMALISER.mean(scores_of("test", add=0.5, sort=0.5, shown=0.5, text=-2.0))


def answers(split: Any = "search", **right: tuple[int, int]) -> Scores:
    """Return scores of tasks of which so many of so many items are right, the first ones."""
    tasks = tuple(
        TaskScores(task=name, metric=(np.arange(n) < k).astype(float), smooth=np.full(n, 0.5))
        for name, (k, n) in right.items()
    )
    return Scores(split=split, tasks=tasks)


TWO = suite_of({"task": "add", "specialist": "adder"}, {"task": "sort", "specialist": "sorter"})
ONE_OF_TEN = {
    "adder": answers(add=(8, 10), sort=(0, 10)),
    "sorter": answers(add=(0, 10), sort=(1, 10)),
}
NOTHING = answers(add=(0, 10), sort=(0, 10))
ONE_OF_TEN_OF_FORTY = {
    "adder": answers(add=(32, 40), sort=(0, 40)),
    "sorter": answers(add=(0, 40), sort=(6, 40)),
}


def test_one_right_answer_of_ten_is_no_specialist() -> None:
    (dud,) = find_duds(TWO, base=NOTHING, parents=ONE_OF_TEN)
    assert (dud.task, dud.specialist) == ("sort", "sorter")
    assert "not shown to be better than the base" in dud.sentence
    scale = Normaliser(TWO, base=NOTHING, parents=ONE_OF_TEN, duds=["sort"])
    assert scale.counted == ("add",)
    assert scale.weights.tolist() == [1.0]
    merge = answers(add=(4, 10), sort=(7, 10))
    assert scale.mean(merge) == pytest.approx(0.5)
    assert scale.task(merge)["sort"] == pytest.approx(0.7)  # raw: no scale to stretch it on
    assert [s.task for s in scale.skills] == ["add"]
    assert {skill.task for skill in scale.skills} == {"add"}


def test_where_all_are_duds_points_are_raw() -> None:
    scale = Normaliser(TWO, base=NOTHING, parents=ONE_OF_TEN, duds=["add", "sort"])
    assert scale.counted == ("add", "sort")
    assert scale.mean(answers(add=(10, 10), sort=(10, 10))) == pytest.approx(1.0)
    duds = find_duds(TWO, base=NOTHING, parents=dict.fromkeys(ONE_OF_TEN, NOTHING))
    assert len(duds) == 2
    (sentence,) = dud_sentences(duds)
    assert sentence.startswith("no specialist is shown to be better than the base")


def drawn(rng: np.random.Generator, items: int, **accuracy: float) -> Scores:
    """Return random answers with these accuracies, independent of each other's."""
    tasks = (
        TaskScores(task=name, metric=(rng.random(items) < right).astype(float))
        for name, right in accuracy.items()
    )
    return Scores(split="search", tasks=tuple(tasks))


def test_four_gains_that_are_hardly_measured_do_not_shake_the_mean() -> None:
    """Four skills with 20 % against 15 % on 400 items: a model as good as the base should score about 0."""
    rng, names = np.random.default_rng(0), ("a", "b", "c", "d")
    suite = suite_of(*({"task": name, "specialist": "p"} for name in names))
    floors, weighted = [], []
    for _ in range(80):
        base = drawn(rng, 400, **dict.fromkeys(names, 0.15))
        parents = {"p": drawn(rng, 400, **dict.fromkeys(names, 0.20))}
        model = drawn(rng, 400, **dict.fromkeys(names, 0.15))
        gains = find_gains(suite, base=base, parents=parents)
        duds = [gain.task for gain in gains if not gain.shown]
        if len(duds) == len(names):
            continue
        old = Normaliser(suite, base=base, parents=parents, duds=duds)
        new = Normaliser(suite, base=base, parents=parents, duds=duds, trust=trusts(gains, ERRORS))
        assert all(0 < gain.trust < 1 for gain in gains if gain.shown)
        floors.append(old.mean(model))
        weighted.append(new.mean(model))
    assert 1.96 * np.std(floors) > 0.4
    assert 1.96 * np.std(weighted) < 0.2


def test_gains_that_are_measured_well_keep_the_bits_of_the_mean() -> None:
    base = answers(add=(20, 100), sort=(10, 100))
    parents = {
        "adder": answers(add=(90, 100), sort=(0, 100)),
        "sorter": answers(add=(0, 100), sort=(60, 100)),
    }
    gains = find_gains(TWO, base=base, parents=parents)
    assert [gain.trust for gain in gains] == [1.0, 1.0]
    plain = Normaliser(TWO, base=base, parents=parents)
    scale = Normaliser(TWO, base=base, parents=parents, trust=trusts(gains, ERRORS))
    model = answers(add=(37, 100), sort=(41, 100))
    assert scale.mean(model) == plain.mean(model)
    assert scale.smooth_mean(model) == plain.smooth_mean(model)
    assert all((a == b).all() for a, b in zip(scale.items(model), plain.items(model), strict=True))
    assert trusts(gains, None) is None  # a run that was begun before the rule


def test_a_task_that_is_trusted_little_counts_little_everywhere_and_keeps_its_own_scale() -> None:
    base, parents = answers(add=(0, 40), sort=(0, 40)), ONE_OF_TEN_OF_FORTY
    gains = find_gains(TWO, base=base, parents=parents)
    trust = {gain.task: gain.trust for gain in gains}
    assert trust["add"] == 1.0
    assert 0.3 < trust["sort"] < 0.5
    scale = Normaliser(TWO, base=base, parents=parents, trust=trusts(gains, ERRORS))
    model = answers(add=(16, 40), sort=(3, 40))
    assert scale.task(model) == pytest.approx({"add": 0.5, "sort": 0.5})
    mean = 0.5 * (0.5 + trust["sort"] * 0.5)
    assert scale.mean(model) == pytest.approx(mean)
    shares = zip(scale.items(model), scale.weights, strict=True)
    assert sum(weight * float(values.mean()) for values, weight in shares) == pytest.approx(mean)
    skills = {part.task: part for part in scale.skills}
    assert sum(
        part.share * (model[part.task].mean - part.zero) / part.headroom for part in skills.values()
    ) == pytest.approx(mean)
    losses = scale.contributions(model, smooth=0.0, retention=0.0, coherence=0.0)
    assert sum(float(task.mean()) for task in losses) == pytest.approx(-mean)
    assert skills["sort"].share == pytest.approx(0.5 * trust["sort"])
    assert scale.interval(model).estimate == pytest.approx(mean)
    assert scale.p_kept(model, base=base, share=0.4)["sort"] > 0.05


def gain(task: str, shown: bool) -> Gain:
    return Gain(task=task, specialist="p", base=0.1, score=0.2, error=0.01, items=50, shown=shown)


@pytest.mark.parametrize(
    ("shown", "refused"),
    [
        ([True], False),
        ([False], True),
        ([True, False], False),
        ([True, False, False], True),
        ([True, True, False], False),
        ([True, True, False, False, False], True),
        ([False, False, False], True),
    ],
)
def test_a_run_is_refused_where_most_specialists_are_no_better(shown: list[bool], refused: bool) -> None:
    gains = [gain(f"t{number}", each) for number, each in enumerate(shown)]
    if not refused:
        refuse_nothing(gains)
        return
    with pytest.raises(ConfigError, match="hardly measures what the sources have learned") as caught:
        refuse_nothing(gains)
    assert all(f"{each.task}: p 0.2 against 0.1 on 50 items" in str(caught.value.got) for each in gains)
    assert "weak_specialists: allow" in str(caught.value.fix)


def test_good_specialists_are_no_duds_and_a_best_of_many_needs_more() -> None:
    good = {"adder": answers(add=(40, 50), sort=(0, 50)), "sorter": answers(add=(0, 50), sort=(30, 50))}
    assert find_duds(TWO, base=answers(add=(0, 50), sort=(0, 50)), parents=good) == ()
    five = answers(add=(5, 50))
    none = answers(add=(0, 50))
    named, unnamed = suite_of({"task": "add", "specialist": "p0"}), suite_of({"task": "add"})
    parents = {f"p{i}": five for i in range(8)}
    assert find_duds(named, base=none, parents=parents) == ()
    assert len(find_duds(unnamed, base=none, parents=parents)) == 1


def test_the_error_of_the_references_widens_a_large_difference_only() -> None:
    base, high = answers("test", add=(0, 20)), answers("test", add=(10, 20))
    scale = Normaliser(suite_of({"task": "add", "specialist": "p"}), base=base, parents={"p": high})
    a, b = answers("test", add=(18, 20)), answers("test", add=(0, 20))
    exact = statistics.paired_difference(
        scale.items(a), scale.items(b), scale.weights, seed=0, spans=scale.spans
    )
    wide = scale.compare(a, b, seed=0)
    assert wide.high - wide.low > 1.3 * (exact.high - exact.low)
    same = scale.compare(a, a, seed=0)
    assert same.low < 0 < same.high


def test_the_best_of_many_rivals_does_not_pull_the_interval_down() -> None:
    """The best is chosen on the items of the test itself; all are equally good here, so the truth is 0."""
    rng, contains, naive, above = np.random.default_rng(0), 0, 0, 0
    suite = suite_of({"task": "add", "specialist": "adder"})

    def drawn(accuracy: float, shared: Any) -> Scores:
        right = np.where(shared[0], shared[1], rng.random(150)) < accuracy
        return Scores(split="test", tasks=(TaskScores(task="add", metric=right.astype(float)),))

    draws = 150
    for _ in range(draws):
        shared = rng.random(150) < 0.6, rng.random(150)
        scale = Normaliser(suite, base=drawn(0.2, shared), parents={"adder": drawn(0.8, shared)})
        winner, *rivals = [drawn(0.5, shared) for _ in range(9)]
        named = {str(number): rival for number, rival in enumerate(rivals)}
        best, test = scale.compare_with_best(winner, named, fixed="3", seed=0)
        alone = scale.compare(winner, named[best], seed=0)
        least = min(scale.compare(winner, rival, seed=0).estimate for rival in rivals)
        assert test.estimate == alone.estimate == pytest.approx(least)
        assert test.low <= alone.low
        assert test.high >= alone.high
        contains += test.low <= 0 <= test.high
        naive += alone.low <= 0 <= alone.high
        above += test.low > 0
    assert contains / draws >= 0.95
    assert naive < contains
    assert above == 0


@pytest.mark.parametrize(
    ("right", "items", "share", "below"),
    [(40, 200, 0.5, True), (130, 200, 0.5, False), (130, 200, 0.8, True), (9, 20, 0.5, False)],
)
def test_a_share_of_the_specialist_is_missed_where_the_items_show_it(
    right: int, items: int, share: float, below: bool
) -> None:
    suite = suite_of({"task": "add"})
    base, specialist = answers(add=(0, items)), answers(add=(items, items))
    scale = Normaliser(suite, base=base, parents={"p": specialist})
    p = scale.p_kept(answers(add=(right, items)), base=base, share=share)
    assert (p["add"] <= 0.05) == below


def test_the_specialist_keeps_its_own_share_and_duds_have_none() -> None:
    suite, base = suite_of({"task": "add"}, {"task": "sort"}), answers(add=(20, 100), sort=(20, 100))
    specialist = answers(add=(80, 100), sort=(20, 100))
    scale = Normaliser(suite, base=base, parents={"p": specialist}, duds=["sort"])
    assert scale.p_kept(specialist, base=base, share=1.0).keys() == {"add"}
    assert scale.p_kept(specialist, base=base, share=1.0)["add"] > 0.4
