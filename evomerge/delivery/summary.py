"""The summary of a run on `test`: comparison table, verdict, paired comparisons; read from the store alone.

Both reports (terminal and HTML), `status` and the model card show the numbers of this file, so they can't
disagree. Points are hundredths of the distance from the base (0) to a specialist (100).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evomerge.config import VerdictSpec
from evomerge.delivery.style import percent, short_task
from evomerge.delivery.verdict import TaskResult, Verdict
from evomerge.evaluation import statistics
from evomerge.evaluation.gains import Gain, find_gains, trusts
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Scores, Split
from evomerge.evaluation.statistics import Interval, PairedTest
from evomerge.evaluation.suite import SuiteTask
from evomerge.running.store import BASE, facts
from evomerge.schema import parse
from evomerge.search.companions import Companion, companions, without
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.ports import Named
from evomerge.stored import OLDEST, StoredRun

SEED = 20240
"""Seed of every bootstrap: a report of the same run always shows the same digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the comparison table, on the `test` split.

    tasks: task -> mean raw metric with its 95 % interval, in suite order. normalised: task -> the same on the
    scale 0 = base, 1 = specialist, for tasks with a weight. mean: weighted mean of those. retention: ratio to
    the base, None without a retention task. tokens: generated tokens, ratio to the objective's `tokens_of`
    (the base unless it says otherwise), None where no task that counts generates.
    """

    role: str
    name: str
    recipe: str
    tasks: dict[str, Interval]
    normalised: dict[str, float]
    mean: Interval
    retention: float | None
    tokens: float | None

    def as_data(self) -> dict[str, Any]:
        """Return the row as plain data; intervals as [estimate, low, high]."""
        return {
            "role": self.role,
            "name": self.name,
            "recipe": self.recipe,
            "tasks": {task: [i.estimate, i.low, i.high] for task, i in self.tasks.items()},
            "normalised": self.normalised,
            "mean": [self.mean.estimate, self.mean.low, self.mean.high],
            "retention": self.retention,
            "tokens": self.tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One paired comparison of the winner with another row, on `test`.

    task: None for the mean over the tasks, in normalised scores; else the task whose raw scores are compared.
    role: of the rival: "best baseline", "specialist" or "parent". adjusted: p after Holm's correction over
    all claims of the run.
    """

    task: str | None
    role: str
    rival: str
    test: PairedTest
    adjusted: float

    def as_data(self) -> dict[str, Any]:
        """Return the claim as plain data, differences in points."""
        return {
            "task": self.task,
            "against": self.role,
            "rival": self.rival,
            **_points(self.test),
            "p_holm": self.adjusted,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptShare:
    """Which share of a specialist's raw score on its task three models keep; None where that score is 0."""

    task: str
    specialist: str
    score: float
    winner: float | None
    baseline: float | None
    uniform: float | None

    def as_data(self) -> dict[str, Any]:
        """Return the shares as plain data."""
        return asdict(self)


class Summary:
    """The tables and the verdict of a stored run, finished or not.

    Every method reads the store when it is called. The search itself is described by
    `evomerge.delivery.course`.

    Args:
        run: an open run folder. It must stay open as long as the summary is used.

    Attributes:
        parents: the base, then the sources.
        baselines: the hand-made merges that were scored before the search.
        starts: recipes that the search started from because the user or gradient steps named them.
        standard: the baseline that sets the floors, None where the objective has none.
        unlimited: the candidate that was best by the mean alone, where that is not the winner.
        winner: the recipe that was tested, None before the search has stopped.

    Example:
        >>> def print_verdict(folder: Path) -> None:
        ...     with StoredRun.read(folder) as run:
        ...         summary = Summary(run)
        ...         verdict = summary.verdict(summary.rows())
        ...         print(verdict.sentence if verdict else "no verdict yet")
    """

    def __init__(self, run: StoredRun) -> None:
        self.run, self.store, self.suite = run, run.store, run.suite
        self.parents = self.store.entries("base") + self.store.entries("parent")
        self.baselines = self.store.entries("baseline")
        self.starts = self.store.entries("start")
        self.standard = next(iter(self.store.entries("standard")), None)
        self.unlimited = next(iter(self.store.entries("unlimited")), None)
        winners = self.store.entries("winner") if facts.STOPPED.get(self.store) else []
        self.winner: Named | None = winners[0] if winners else None
        self._normalisers: dict[Split, Normaliser | None] = {}
        self._gains: tuple[Gain, ...] | None = None

    @property
    def objective(self) -> ObjectiveSpec:
        """The run's objective, as its config has it."""
        stored = facts.CONFIG.require(self.store)["objective"]
        return parse(ObjectiveSpec, {"kind": OLDEST, **stored}, f"{self.store.folder}: stored objective")

    @property
    def kept_share(self) -> float:
        """The least share of a specialist's gain that a task should keep; older runs have the default."""
        stored = facts.CONFIG.require(self.store).get("verdict", {})
        return parse(VerdictSpec, stored, f"{self.store.folder}: stored verdict").kept

    @property
    def named(self) -> list[Named]:
        """Base, parents, baselines and starts: all recipes that the optimizer did not propose."""
        return [*self.parents, *self.baselines, *self.starts]

    @property
    def shown_tasks(self) -> list[SuiteTask]:
        """The tasks of the table's columns: the skills with `test` items, as the suite lists them."""
        return [task for task in self.suite.tasks if task.role == "skill" and task.splits["test"] is not None]

    def normaliser(self, split: Split) -> Normaliser | None:
        """Return the scale of a split (0 = base, 1 = specialist), None until base and parents are scored."""
        if split not in self._normalisers:
            duds, scored = self.duds(), self._scored_parents(split)
            dropped = [companion.task for companion in self.companions() if companion.dropped]
            self._normalisers[split] = (
                None
                if scored is None
                else Normaliser(
                    self.suite,
                    base=without(scored[0], dropped),
                    parents=scored[1],
                    duds=[d.task for d in duds],
                    trust=trusts(self.gains(), self.weighting),
                    tokens_of=self.objective.tokens_of,
                )
            )
        return self._normalisers[split]

    def gains(self) -> tuple[Gain, ...]:
        """Return what specialists gain over the base on `search`; () until all are scored."""
        if self._gains is None:
            scored = self._scored_parents("search")
            if scored is None:
                return ()
            self._gains = find_gains(self.suite, base=scored[0], parents=scored[1])
        return self._gains

    def duds(self) -> tuple[Gain, ...]:
        """Return the specialists that were no better than the base on `search`, as the search found them."""
        return tuple(gain for gain in self.gains() if not gain.shown)

    @property
    def weighting(self) -> str | None:
        """The rule that weights tasks in the mean, None in runs begun before there was one."""
        return facts.WEIGHTING.get(self.store)

    def companions(self) -> list[Companion]:
        """Return how well the companions of generated answers rank the models scored before the search."""
        first = [self.scores(named.recipe.hash, "search") for named in (*self.parents, *self.baselines)]
        if not first or first[0] is None:
            return []
        return companions(self.suite, [scores for scores in first if scores is not None])

    def _scored_parents(self, split: Split) -> tuple[Scores, dict[str, Scores]] | None:
        """Return the scores of base and parents on a split, None until all are there."""
        scores = {parent.name: self.scores(parent.recipe.hash, split) for parent in self.parents}
        complete = {name: result for name, result in scores.items() if result is not None}
        names = (BASE, *facts.CONFIG.require(self.store)["models"]["sources"])
        if not complete.keys() >= set(names):  # a salvaged store may lack some of them altogether
            return None
        return complete[BASE], {name: result for name, result in complete.items() if name != BASE}

    def scores(self, recipe: str, split: Split) -> Scores | None:
        """Return the scores of a recipe (its hash) on all items of a split, None without them."""
        result = self.store.result(recipe, split)
        return result if isinstance(result, Scores) else None

    def mean(self, recipe: str, split: Split) -> float | None:
        """Return the mean normalised score of a recipe (its hash) on a split; 0 = base, 1 = specialists."""
        normaliser, scores = self.normaliser(split), self.scores(recipe, split)
        return None if normaliser is None or scores is None else normaliser.mean(scores)

    def rows(self) -> list[Row]:
        """Return the comparison table.

        Returns:
            One row per recipe that is scored on `test`: base, parents, baselines, starts, winner. Empty until
            base and parents are scored there.
        """
        normaliser = self.normaliser("test")
        if normaliser is None:
            return []
        roles = ["base"] + ["parent"] * (len(self.parents) - 1)
        roles += ["baseline"] * len(self.baselines) + ["start"] * len(self.starts)
        recipes = list(zip(roles, self.named, strict=True))
        recipes += [("winner", self.winner)] if self.winner else []
        return [
            self._row(role, named, scores, normaliser)
            for role, named in recipes
            if (scores := self.scores(named.recipe.hash, "test")) is not None
        ]

    def _row(self, role: str, named: Named, scores: Scores, normaliser: Normaliser) -> Row:
        normalised = normaliser.task(scores)
        return Row(
            role=role,
            name=named.name,
            recipe=named.recipe.hash,
            tasks={t.task: raw_interval(scores[t.task].metric) for t in self.shown_tasks},
            normalised={t.task: normalised[t.task] for t in self.shown_tasks if t.counted},
            mean=normaliser.interval(scores),
            retention=normaliser.retention(scores),
            tokens=normaliser.tokens(scores),
        )

    def best_baseline(self, rows: Iterable[Row]) -> Row | None:
        """Return the row to beat: the best mean on `test` among base, parents and baselines.

        Choosing it on `test` favours the baselines, because the winner was not chosen there.
        """
        rivals = [row for row in rows if row.role not in ("winner", "start")]
        return max(rivals, key=lambda row: row.mean.estimate) if rivals else None

    def weakest(self, rows: Iterable[Row]) -> str | None:
        """Return a sentence about the winner's worst task, which a mean hides; None without a winner."""
        winner = _by_role(rows, "winner")
        if winner is None:
            return None
        duds = {dud.task for dud in self.duds()}
        scaled = {task: score for task, score in winner.normalised.items() if task not in duds}
        if not scaled:
            return None
        task, score = min(scaled.items(), key=lambda pair: pair[1])
        return f"weakest task of the winner: {task}, {percent(score, 0)} points (0 = base, 100 = specialist)"

    def verdict(self, rows: Iterable[Row]) -> Verdict | None:
        """Test the winner against the best baseline, paired item by item: the mean, and task by task.

        Args:
            rows: the comparison table, from `rows()`.

        Returns:
            The test of the mean normalised score on `test`, and one per task; None until the winner is scored
            there.
        """
        rows = list(rows)
        rival = self.best_baseline(rows)
        if self.winner is None or rival is None:
            return None
        test = self._against_best(self.winner.recipe.hash, rows)
        normaliser = self.normaliser("test")
        scores, rival_scores = (self.scores(r, "test") for r in (self.winner.recipe.hash, rival.recipe))
        if test is None or scores is None or rival_scores is None or normaliser is None:
            return None
        return Verdict(
            rival=rival.name,
            test=test,
            items=sum(map(len, normaliser.items(scores))),
            tasks=tuple(self._task_results(scores, rival_scores, normaliser)),
            scaled=not set(normaliser.counted) & set(normaliser.duds),
            share=self.kept_share,
            constraints=self.objective.constraints,
            counted=normaliser.counted,
        )

    def _task_results(self, winner: Scores, rival: Scores, normaliser: Normaliser) -> list[TaskResult]:
        tasks, kept, held = self.shown_tasks, normaliser.task(winner), normaliser.task(rival)
        pairs = [(winner[t.task].metric, rival[t.task].metric) for t in tasks]
        tests = [statistics.paired_items(*pair, seed=SEED) for pair in pairs]
        adjusted = statistics.holm([test.p for test in tests])
        scaled = {t.task for t in tasks if t.task not in normaliser.duds}
        below = self._below_share(winner, normaliser)
        return [
            TaskResult(
                task=t.task,
                name=short_task(t.task, self.suite.name),
                winner=winner[t.task].mean,
                rival=rival[t.task].mean,
                test=test,
                adjusted=p,
                kept=kept[t.task] if t.task in scaled and t.counted else None,
                held=held[t.task] if t.task in scaled else None,
                p_kept=below.get(t.task),
                limited=t.task in scaled and t.splits["search"] is not None,
                counted=t.counted,
            )
            for t, test, p in zip(tasks, tests, adjusted, strict=True)
        ]

    def _below_share(self, winner: Scores, normaliser: Normaliser) -> dict[str, float]:
        """Return counted task -> p, after Holm's correction, that the winner keeps the demanded share."""
        base = self.scores(self.parents[0].recipe.hash, "test")
        assert base is not None, "a scale without the base's scores"
        chances = normaliser.p_kept(winner, base=base, share=self.kept_share)
        return dict(zip(chances, statistics.holm(list(chances.values())), strict=True))

    def _against_best(self, recipe: str, rows: Iterable[Row]) -> PairedTest | None:
        """Test a recipe against the best of the rivals, as `Normaliser.compare_with_best`."""
        normaliser, scores = self.normaliser("test"), self.scores(recipe, "test")
        rivals = {
            row.recipe: rival
            for row in rows
            if row.role not in ("winner", "start") and (rival := self.scores(row.recipe, "test")) is not None
        }
        if normaliser is None or scores is None or not rivals:
            return None
        searched = {name: mean for name in rivals if (mean := self.mean(name, "search")) is not None}
        fixed = max(searched, key=lambda name: searched[name], default=next(iter(rivals)))
        return normaliser.compare_with_best(scores, rivals, fixed=fixed, seed=SEED)[1]

    def _mean_difference(self, recipe: str, rival: str) -> PairedTest | None:
        """Test the difference of two recipes in the mean normalised score on `test`."""
        normaliser = self.normaliser("test")
        scores, rival_scores = self.scores(recipe, "test"), self.scores(rival, "test")
        if normaliser is None or scores is None or rival_scores is None:
            return None
        return normaliser.compare(scores, rival_scores, seed=SEED)

    def claims(self, rows: Iterable[Row]) -> list[Claim]:
        """Compare the winner with the best baseline and all parents, on the mean and task by task.

        Args:
            rows: the comparison table, from `rows()`.

        Returns:
            All comparisons; empty without a verdict. The first one is the verdict's: it was fixed before the
            run, so its interval and p stand by themselves. For all others read the adjusted p.
        """
        rows = list(rows)
        verdict, best, winner = self.verdict(rows), self.best_baseline(rows), _by_role(rows, "winner")
        if verdict is None or best is None or winner is None:
            return []
        tests: list[tuple[str | None, str, str, PairedTest]] = [
            (None, "best baseline", best.name, verdict.test)
        ]
        parents = [row for row in rows if row.role == "parent"]
        for parent in parents:
            test = self._mean_difference(winner.recipe, parent.recipe)
            if test is not None and parent is not best:
                tests.append((None, "parent", parent.name, test))
        scores = self.scores(winner.recipe, "test")
        for task in self.shown_tasks if scores is not None else ():
            specialist = self._specialist(task, parents)
            rivals = [("best baseline", best)]
            if specialist is not None and specialist is not best:
                rivals.append(("specialist", specialist))
            for role, rival in rivals:
                rival_scores = self.scores(rival.recipe, "test")
                if scores is not None and rival_scores is not None:
                    pair = scores[task.task].metric, rival_scores[task.task].metric
                    tests.append((task.task, role, rival.name, statistics.paired_items(*pair, seed=SEED)))
        adjusted = statistics.holm([test.p for *_, test in tests])
        return [
            Claim(task=task, role=role, rival=rival, test=test, adjusted=p)
            for (task, role, rival, test), p in zip(tests, adjusted, strict=True)
        ]

    def shares(self, rows: Iterable[Row]) -> list[KeptShare]:
        """Return which share of each specialist's raw score on `test` the winner and two baselines keep.

        Args:
            rows: the comparison table, from `rows()`.

        Returns:
            One entry per task with a specialist, in suite order; empty without a winner.
        """
        rows = list(rows)
        winner, best = _by_role(rows, "winner"), self.best_baseline(rows)
        uniform = next((row for row in rows if row.name == "uniform average"), None)
        parents = [row for row in rows if row.role == "parent"]
        shares = []
        for task in self.shown_tasks if winner is not None else ():
            specialist = self._specialist(task, parents)
            if specialist is None:
                continue
            score = specialist.tasks[task.task].estimate
            of_winner, of_best, of_uniform = (
                None if row is None or score <= 0 else row.tasks[task.task].estimate / score
                for row in (winner, best, uniform)
            )
            shares.append(
                KeptShare(
                    task=task.task,
                    specialist=specialist.name,
                    score=score,
                    winner=of_winner,
                    baseline=of_best,
                    uniform=of_uniform,
                )
            )
        return shares

    @staticmethod
    def _specialist(task: SuiteTask, parents: Iterable[Row]) -> Row | None:
        """Return the parent that the suite names for a task, else the best one on it."""
        parents = list(parents)
        named = [row for row in parents if row.name == task.specialist]
        return max(named or parents, key=lambda row: row.tasks[task.task].estimate, default=None)


def raw_interval(metric: np.ndarray[Any, np.dtype[Any]]) -> Interval:
    """Return the mean of a task's per-item metric (1-d) with its 95 % interval."""
    return statistics.interval([metric], [1.0])


def kept_sentence(shares: Iterable[KeptShare]) -> str | None:
    """Return one sentence with the mean share of the specialists' scores that is kept; None where unknown."""
    shares, means = list(shares), []
    for label, values in (
        ("winner", [share.winner for share in shares]),
        ("best baseline", [share.baseline for share in shares]),
        ("uniform average", [share.uniform for share in shares]),
    ):
        numbers = [value for value in values if value is not None]
        if numbers:
            means.append(f"{label} {percent(sum(numbers) / len(numbers), 0)} %")
    return f"share of the specialist's score kept (mean over tasks): {', '.join(means)}" if means else None


def _by_role(rows: Iterable[Row], role: str) -> Row | None:
    return next((row for row in rows if row.role == role), None)


def _points(test: PairedTest) -> dict[str, float]:
    return {"points": 100 * test.estimate, "low": 100 * test.low, "high": 100 * test.high, "p": test.p}
