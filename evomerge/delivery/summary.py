"""The summary of a run: tables and verdict, computed from the store alone.

Both reports (terminal and HTML), `status` and the model card show what stands here, so they can't
disagree. Points are hundredths of the distance from the base to a specialist.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from evomerge.evaluation import statistics
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, Split
from evomerge.evaluation.statistics import Interval, PairedTest
from evomerge.evaluation.suite import Suite, SuiteTask
from evomerge.running.store import RunStore
from evomerge.search.baselines import Named

_SEED = 20240  # of the bootstrap: a report of the same run always shows the same digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the comparison table, on the `test` split.

    tasks: task -> raw metric with its 95 % interval, in suite order. normalised: task -> the same on
    the scale 0 = base, 1 = specialist, for the tasks that count. mean: over those. retention: ratio to
    the base, None without a retention task.
    """

    role: str
    name: str
    recipe: str
    tasks: dict[str, Interval]
    normalised: dict[str, float]
    mean: Interval
    retention: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The paired test of the winner against the best row that was not searched, on `test`."""

    rival: str
    test: PairedTest
    items: int

    @property
    def helped(self) -> bool:
        """Whether the whole 95 % interval of the difference lies above zero."""
        return self.test.low > 0

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        t = self.test
        head = "search helped" if self.helped else "search did not help"
        return (
            f"{head}: {100 * t.estimate:+.1f} points [{100 * t.low:.1f}, {100 * t.high:.1f}] "
            f"over the best baseline ({self.rival})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Best and median mean normalised `search` score per generation, and where baselines stand there."""

    generations: tuple[int, ...]
    best: tuple[float, ...]
    best_so_far: tuple[float, ...]
    median: tuple[float, ...]
    best_baseline: float | None
    best_baseline_name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Mean time of one candidate on `search`, in milliseconds, by where it went."""

    candidates: int
    forward: float
    merge: float
    scoring: float
    search: float

    @property
    def overhead(self) -> float:
        """The share of everything but the forward passes, in [0, 1]."""
        total = self.forward + self.merge + self.scoring + self.search
        return 1 - self.forward / total if total else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """A candidate that was scored again: its mean normalised score on `search` and on `select`."""

    name: str
    recipe: str
    search: float | None
    select: float | None


class Summary:
    """What a stored run says, finished or not."""

    def __init__(self, store: RunStore, suite: Suite) -> None:
        self._store = store
        self.suite = suite
        self.parents = store.entries("base") + store.entries("parent")
        self.baselines = store.entries("baseline")
        self.starts = store.entries("start")
        winners = store.entries("winner") if store.fact("stopped") else []
        self.winner: Named | None = winners[0] if winners else None
        self._normalisers: dict[Split, Normaliser | None] = {}

    @property
    def shown_tasks(self) -> list[SuiteTask]:
        """The tasks of the table's columns: skills first, as the suite lists them."""
        return [task for task in self.suite.tasks if task.role == "skill" and task.splits["test"] is not None]

    def normaliser(self, split: Split) -> Normaliser | None:
        """Return the references of a split, or None while base or parents are not scored on it."""
        if split not in self._normalisers:
            results = {p.name: self._store.result(p.recipe.hash, split) for p in self.parents}
            scores = {name: s for name, s in results.items() if isinstance(s, Scores)}
            complete = len(scores) == len(self.parents) > 0
            self._normalisers[split] = (
                Normaliser(
                    self.suite,
                    base=scores[self.parents[0].name],
                    parents={p.name: scores[p.name] for p in self.parents[1:]},
                )
                if complete
                else None
            )
        return self._normalisers[split]

    def rows(self) -> list[Row]:
        """Return the comparison table: base, parents, baselines, winner; only what is scored on `test`."""
        normaliser = self.normaliser("test")
        if normaliser is None:
            return []
        labelled = [("base", self.parents[0])] + [("parent", p) for p in self.parents[1:]]
        labelled += [("baseline", b) for b in self.baselines]
        labelled += [("start", s) for s in self.starts]
        labelled += [("winner", self.winner)] if self.winner else []
        rows = []
        for role, named in labelled:
            scores = self._store.result(named.recipe.hash, "test")
            if isinstance(scores, Scores):
                rows.append(self._row(role, named, scores, normaliser))
        return rows

    def _row(self, role: str, named: Named, scores: Scores, normaliser: Normaliser) -> Row:
        tasks, normalised = {}, normaliser.task(scores)
        for task in self.shown_tasks:
            metric = scores[task.task].metric
            binary = bool(np.isin(metric, (0.0, 1.0)).all())
            tasks[task.task] = (
                statistics.proportion_interval(int(metric.sum()), len(metric))
                if binary
                else statistics.interval([metric], [1.0], seed=_SEED)
            )
        return Row(
            role=role,
            name=named.name,
            recipe=named.recipe.hash,
            tasks=tasks,
            normalised={t.task: normalised[t.task] for t in self.shown_tasks if t.counted},
            mean=statistics.interval(normaliser.items(scores), normaliser.weights, seed=_SEED),
            retention=normaliser.retention(scores),
        )

    def best_unsearched(self, rows: Iterable[Row]) -> Row | None:
        """Return the row to beat: the best mean on `test` among all that were not searched.

        Choosing it on `test` favours the baselines: the winner was not chosen there.
        """
        rivals = [row for row in rows if row.role not in ("start", "winner")]
        return max(rivals, key=lambda row: row.mean.estimate) if rivals else None

    def weakest(self, rows: Iterable[Row]) -> str | None:
        """Say on which task the winner keeps least of what the specialist can: means hide that."""
        winner = next((row for row in rows if row.role == "winner"), None)
        if winner is None:
            return None
        task, value = min(winner.normalised.items(), key=lambda pair: pair[1])
        points = round(100 * value) + 0
        return f"weakest task of the winner: {task}, {points} of 100 points between base and specialist"

    def verdict(self, rows: Iterable[Row]) -> Verdict | None:
        """Return the paired test of the winner against the best row that was not searched."""
        rival, normaliser = self.best_unsearched(rows), self.normaliser("test")
        if self.winner is None or rival is None or normaliser is None:
            return None
        ours = self._store.result(self.winner.recipe.hash, "test")
        theirs = self._store.result(rival.recipe, "test")
        if not isinstance(ours, Scores) or not isinstance(theirs, Scores):
            return None
        test = statistics.paired_difference(
            normaliser.items(ours), normaliser.items(theirs), normaliser.weights, seed=_SEED
        )
        return Verdict(rival=rival.name, test=test, items=sum(map(len, normaliser.items(ours))))

    def progress(self) -> Progress:
        """Return the search's course on the `search` split."""
        normaliser = self.normaliser("search")
        numbers, best, median = [], [], []
        for generation in self._store.generations():
            means = [m for r in generation.recipes if (m := self._mean(r, "search")) is not None]
            if means:
                numbers.append(generation.number)
                best.append(max(means))
                median.append(float(np.median(means)))
        ranked = [
            (m, b.name) for b in self.baselines if (m := self._mean(b.recipe.hash, "search")) is not None
        ]
        top = max(ranked) if ranked and normaliser else (None, None)
        return Progress(
            generations=tuple(numbers),
            best=tuple(best),
            best_so_far=tuple(np.maximum.accumulate(best).tolist()) if best else (),
            median=tuple(median),
            best_baseline=top[0],
            best_baseline_name=top[1],
        )

    def finalists(self) -> list[Finalist]:
        """Return the finalists in the order of their search loss, the optimizer's favourite last."""
        return [
            Finalist(
                name=f.name,
                recipe=f.recipe.hash,
                search=self._mean(f.recipe.hash, "search"),
                select=self._mean(f.recipe.hash, "select"),
            )
            for f in self._store.entries("finalist")
        ]

    def notes(self) -> list[str]:
        """Return what a reader must know to read the table right, one sentence each."""
        found, normaliser = [], self.normaliser("test")
        for task in normaliser.floored if normaliser is not None else ():
            found.append(
                f"{task}: its specialist is hardly better than the base; its share of the mean is noise"
            )
        known = {named.recipe.hash for named in (*self.parents, *self.baselines, *self.starts)}
        tested = set(self._store.timings("test")) - known
        if len(tested) > 1:
            found.append(
                f"the test items have judged {len(tested)} winners of this run (its budget was raised); "
                "each look makes the verdict a little optimistic"
            )
        return found

    def _mean(self, recipe: str, split: Split) -> float | None:
        normaliser, scores = self.normaliser(split), self._store.result(recipe, split)
        if normaliser is None or scores is None or isinstance(scores, Failure):
            return None
        return normaliser.mean(scores)

    def cost(self) -> Cost:
        """Return where the time of the searched candidates went."""
        generations = [g for g in self._store.generations() if g.losses is not None]
        asked = sum(len(g.recipes) for g in generations)
        searched = {recipe for g in generations for recipe in g.recipes}
        timings = [t for r, t in self._store.timings("search").items() if r in searched]
        count = max(len(timings), 1)
        return Cost(
            candidates=len(timings),
            forward=1000 * sum(t.forward for t in timings) / count,
            merge=1000 * sum(t.merge for t in timings) / count,
            scoring=1000 * sum(t.total - t.merge - t.forward for t in timings) / count,
            search=1000 * sum(g.seconds for g in generations) / max(asked, 1),
        )
