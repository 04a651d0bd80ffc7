"""The summary of a run: tables and verdict, computed from the store alone.

Both reports (terminal and HTML), `status` and the model card show what stands here, so they can't
disagree. Points are hundredths of the distance from the base to a specialist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.evaluation import statistics
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Failure, Scores, Split, joined
from evomerge.evaluation.statistics import Interval, PairedTest
from evomerge.evaluation.suite import SuiteTask
from evomerge.running.store import facts
from evomerge.search.ports import Named
from evomerge.search.surrogate.prediction import shared_blocks
from evomerge.stored import StoredRun

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
class Claim:
    """One comparison of the winner with another row on `test`.

    task: None for the mean over the tasks, in normalised points; else of its raw scores. role: of the rival:
    "best baseline", "specialist" or "parent". adjusted: p after Holm, over all claims of the run together.
    """

    task: str | None
    role: str
    rival: str
    test: PairedTest
    adjusted: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What the winner and two others keep of a specialist's raw score on its task; None where that is 0."""

    task: str
    specialist: str
    score: float
    winner: float | None
    baseline: float | None
    uniform: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Luck:
    """How much of the winner's score on `search` was luck: expected beforehand, and seen afterwards.

    expected: by how much the best of the candidates looks better than it is, in mean normalised score.
    search, select, test: the winner's mean normalised score on each split. blocks: how many of the `of` item
    blocks of `search` it was scored on; the expectation is that of candidates on those items.
    """

    candidates: int
    expected: float
    search: float
    select: float | None
    test: float | None
    blocks: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a recipe scored on the item blocks of `search` it met.

    mean: normalised; from its difference to the base on those items, in the unit of all items. tasks: the
    same for every skill.
    """

    mean: float
    tasks: dict[str, float]
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Best and median mean normalised `search` score per generation, and where baselines stand there.

    A generation is measured on the item blocks its survivors were scored on; `blocks` says how many of `of`.
    best_so_far: of all candidates up to there on those same items, so it may fall where they change.
    baseline: on those items, of the baseline that is the best on all.
    """

    generations: tuple[int, ...]
    best: tuple[float, ...]
    best_so_far: tuple[float, ...]
    median: tuple[float, ...]
    blocks: tuple[int, ...]
    of: int
    baseline: tuple[float | None, ...]
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
    """A candidate that was scored again: its mean normalised score on `search` and on `select`.

    blocks: the number of item blocks of `search` it was scored on.
    """

    name: str
    recipe: str
    search: float | None
    select: float | None
    blocks: int


class Summary:
    """Tables, verdict and course of a stored run, finished or not; each computed when it is asked for."""

    def __init__(self, run: StoredRun) -> None:
        self.run, self.store, self.suite = run, run.store, run.suite
        store = run.store
        self.parents = store.entries("base") + store.entries("parent")
        self.baselines = store.entries("baseline")
        self.starts = store.entries("start")
        winners = store.entries("winner") if facts.STOPPED.get(store) else []
        self.winner: Named | None = winners[0] if winners else None
        self._normalisers: dict[Split, Normaliser | None] = {}
        self._scales: dict[tuple[int, ...], Normaliser] = {}
        self._read: dict[str, list[Scores]] = {}

    @property
    def shown_tasks(self) -> list[SuiteTask]:
        """The tasks of the table's columns: skills first, as the suite lists them."""
        return [task for task in self.suite.tasks if task.role == "skill" and task.splits["test"] is not None]

    def normaliser(self, split: Split) -> Normaliser | None:
        """Return the references of a split, or None while base or parents are not scored on it."""
        if split not in self._normalisers:
            results = {p.name: self.store.result(p.recipe.hash, split) for p in self.parents}
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
        """Return the comparison table, from base to winner; only what is scored on `test`."""
        normaliser = self.normaliser("test")
        if normaliser is None:
            return []
        labelled = [("base", self.parents[0])] + [("parent", p) for p in self.parents[1:]]
        labelled += [("baseline", b) for b in self.baselines]
        labelled += [("start", start) for start in self.starts]
        labelled += [("winner", self.winner)] if self.winner else []
        rows = []
        for role, named in labelled:
            scores = self.store.result(named.recipe.hash, "test")
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
        rivals = [row for row in rows if row.role not in ("winner", "start")]
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
        ours = self.store.result(self.winner.recipe.hash, "test")
        theirs = self.store.result(rival.recipe, "test")
        if not isinstance(ours, Scores) or not isinstance(theirs, Scores):
            return None
        test = statistics.paired_difference(
            normaliser.items(ours), normaliser.items(theirs), normaliser.weights, seed=_SEED
        )
        return Verdict(rival=rival.name, test=test, items=sum(map(len, normaliser.items(ours))))

    def claims(self, rows: Iterable[Row]) -> list[Claim]:
        """Return all comparisons of the winner: with best baseline and parents, on the mean and task by task.

        The first one is the verdict's. It was fixed before the run and its interval stands by itself; read
        together with the others, the adjusted p counts.
        """
        rows = list(rows)
        verdict, normaliser = self.verdict(rows), self.normaliser("test")
        best, ours = self.best_unsearched(rows), self._tested(self._row_of(rows, "winner"))
        if verdict is None or normaliser is None or best is None or ours is None:
            return []
        found: list[tuple[str | None, str, str, PairedTest]] = [
            (None, "best baseline", best.name, verdict.test)
        ]
        parents = {row.name: row for row in rows if row.role == "parent"}
        for parent in parents.values():
            theirs = self._tested(parent)
            if theirs is not None and parent is not best:
                test = statistics.paired_difference(
                    normaliser.items(ours), normaliser.items(theirs), normaliser.weights, seed=_SEED
                )
                found.append((None, "parent", parent.name, test))
        for task in self.shown_tasks:
            specialist = self._specialist(task, parents.values())
            for role, rival in (("best baseline", best), ("specialist", specialist)):
                theirs = self._tested(rival)
                if rival is None or theirs is None or (role == "specialist" and rival is best):
                    continue
                pair = ours[task.task].metric, theirs[task.task].metric
                found.append((task.task, role, rival.name, statistics.paired_items(*pair, seed=_SEED)))
        adjusted = statistics.holm([test.p for *_, test in found])
        return [
            Claim(task=task, role=role, rival=rival, test=test, adjusted=p)
            for (task, role, rival, test), p in zip(found, adjusted, strict=True)
        ]

    def shares(self, rows: Iterable[Row]) -> list[Share]:
        """Return how much of every specialist's raw score the winner keeps, and what costs nothing keeps."""
        rows = list(rows)
        winner, best = self._row_of(rows, "winner"), self.best_unsearched(rows)
        uniform = next((row for row in rows if row.name == "uniform average"), None)
        parents = [row for row in rows if row.role == "parent"]
        found = []
        for task in self.shown_tasks if winner is not None else ():
            specialist = self._specialist(task, parents)
            if specialist is None:
                continue
            score = specialist.tasks[task.task].estimate
            kept = [
                None if row is None or score <= 0 else row.tasks[task.task].estimate / score
                for row in (winner, best, uniform)
            ]
            found.append(
                Share(
                    task=task.task,
                    specialist=specialist.name,
                    score=score,
                    winner=kept[0],
                    baseline=kept[1],
                    uniform=kept[2],
                )
            )
        return found

    def luck(self) -> Luck | None:
        """Return how much of the winner's search score was to be expected from luck, and how much it lost.

        Candidates that were scored on fewer items than the winner were far behind: they would win no draw.
        """
        mine = None if self.winner is None else self.winner.recipe.hash
        search = None if mine is None else self.on_search(mine)
        if mine is None or search is None:
            return None
        blocks = tuple(part.blocks[0] for part in self.parts(mine))
        normaliser = self._on(blocks)
        first: dict[str, int] = {}
        asked = 0
        for generation in self.store.generations():
            asked += len(generation.recipes)
            for recipe in generation.recipes:
                first.setdefault(recipe, generation.number)
        scored = [(number, self._joined(recipe, blocks)) for recipe, number in first.items()]
        whole = [(number, normaliser.items(s)) for number, s in scored if s is not None]
        if not whole:
            return None
        expected = statistics.expected_luck(
            [np.stack(task) for task in zip(*(items for _, items in whole), strict=True)],
            normaliser.weights,
            np.array([number for number, _ in whole]),
            seed=_SEED,
        )
        return Luck(
            candidates=asked,
            expected=max(0.0, expected),  # where the winner is far ahead, the resampling's own noise is left
            search=search.mean,
            select=self._mean(mine, "select"),
            test=self._mean(mine, "test"),
            blocks=len(blocks),
            of=self.store.blocks("search"),
        )

    def _specialist(self, task: SuiteTask, parents: Iterable[Row]) -> Row | None:
        """Return the parent the suite names for a task, else the best one on it."""
        parents = list(parents)
        named = [row for row in parents if row.name == task.specialist]
        return max(named or parents, key=lambda row: row.tasks[task.task].estimate, default=None)

    def _tested(self, row: Row | None) -> Scores | None:
        scores = None if row is None else self.store.result(row.recipe, "test")
        return scores if isinstance(scores, Scores) else None

    @staticmethod
    def _row_of(rows: Iterable[Row], role: str) -> Row | None:
        return next((row for row in rows if row.role == role), None)

    def progress(self) -> Progress:
        """Return the search's course on the `search` split."""
        ranked = [
            (m, b.name, b.recipe.hash)
            for b in self.baselines
            if (m := self._mean(b.recipe.hash, "search")) is not None
        ]
        top = max(ranked) if ranked and self.normaliser("search") else (None, None, None)
        numbers, best, so_far, median, counts, beside = [], [], [], [], [], []
        asked: dict[str, None] = {}
        means: dict[tuple[int, ...], dict[str, float]] = {}
        for generation in self.store.generations() if self.normaliser("search") else ():
            asked |= dict.fromkeys(generation.recipes)
            blocks = self._blocks_of(generation.recipes)
            if not blocks:
                continue
            found = means.setdefault(blocks, {})
            for recipe in (*asked, *([top[2]] if top[2] else ())):
                if recipe not in found and (scores := self._joined(recipe, blocks)) is not None:
                    found[recipe] = self._on(blocks).mean(scores)
            numbers.append(generation.number)
            best.append(max(found[recipe] for recipe in generation.recipes if recipe in found))
            so_far.append(max(found[recipe] for recipe in asked if recipe in found))
            median.append(float(np.median(self._means(generation.recipes, blocks, found))))
            counts.append(len(blocks))
            beside.append(found.get(top[2]) if top[2] else None)
        return Progress(
            generations=tuple(numbers),
            best=tuple(best),
            best_so_far=tuple(so_far),
            median=tuple(median),
            blocks=tuple(counts),
            of=self.store.blocks("search"),
            baseline=tuple(beside),
            best_baseline=top[0],
            best_baseline_name=top[1],
        )

    def evaluations(self) -> float:
        """Return what the search has had scored, in full evaluations, as its ledger counts.

        Gradients count, with the points they led to, and so do failures, as far as they got; baselines, given
        recipes and repeats don't. Until a generation is told, there is no ledger to ask: then it is what is
        scored.
        """
        base = self.parts(self.parents[0].recipe.hash) if self.parents else []
        if len(base) < self.store.blocks("search"):
            return 0.0
        if (spent := facts.SPENT.get(self.store)) is not None:
            return float(spent[1]) / sum(part.items for part in base)
        given = (*self.parents, *self.baselines, *self.starts)
        asked = {r for generation in self.store.generations() for r in generation.recipes}
        asked -= {named.recipe.hash for named in given}
        asked |= {named.recipe.hash for named in self.store.entries("descent")}
        scored = self.store.scored_blocks("search")
        items = [part.items for part in base]
        searched = sum(items[block] for recipe in asked for block in scored.get(recipe, ()))
        return (searched + self.store.gradient_items()) / sum(items)

    def parts(self, recipe: str) -> list[Scores]:
        """Return what there is of a recipe's scores on the blocks of `search`."""
        if recipe not in self._read:
            blocks = range(self.store.blocks("search"))
            found = [self.store.result(recipe, "search", block) for block in blocks]
            self._read[recipe] = [part for part in found if isinstance(part, Scores)]
        return self._read[recipe]

    def on_search(self, recipe: str) -> Measured | None:
        """Return what a recipe scored on whatever item blocks of `search` it met."""
        own = self.parts(recipe)
        if self.normaliser("search") is None or not own:
            return None
        scale, scores = self._on(tuple(part.blocks[0] for part in own)), joined(own)
        return Measured(mean=scale.mean(scores), tasks=scale.task(scores), blocks=len(own))

    def _on(self, blocks: tuple[int, ...]) -> Normaliser:
        """The scale of `search` on some of its blocks."""
        if blocks not in self._scales:
            normaliser = self.normaliser("search")
            base = self._joined(self.parents[0].recipe.hash, blocks)
            assert normaliser is not None
            assert base is not None
            self._scales[blocks] = normaliser.on(base)
        return self._scales[blocks]

    def _joined(self, recipe: str, blocks: tuple[int, ...]) -> Scores | None:
        """A recipe's scores on exactly these blocks, None where it did not meet all of them."""
        own = [part for part in self.parts(recipe) if part.blocks[0] in blocks]
        return joined(own) if len(own) == len(blocks) > 0 else None

    def _blocks_of(self, recipes: Sequence[str]) -> tuple[int, ...]:
        """The most item blocks that a quarter of a generation was scored on.

        One or two may have met more: repeats of a baseline, and those a later generation took up again.
        """
        known = {named.recipe.hash for named in (*self.parents, *self.baselines, *self.starts)}
        new = [recipe for recipe in recipes if recipe not in known] or recipes
        met = [{part.blocks[0] for part in found} for r in new if (found := self.parts(r))]
        return shared_blocks(met, 0.25)

    def _means(
        self, recipes: Iterable[str], blocks: tuple[int, ...], complete: Mapping[str, float]
    ) -> list[float]:
        """Return the means of a generation on some blocks, `complete` being those scored on all of them.

        One that left a race early has, as what the optimizer was told, an estimate: its difference to the
        mean of the complete ones on the blocks it met, added to their mean on all.
        """
        whole = [recipe for recipe in recipes if recipe in complete]
        found = [complete[recipe] for recipe in whole]
        average = float(np.mean(found))
        for recipe in recipes:
            met = tuple(part.blocks[0] for part in self.parts(recipe) if part.blocks[0] in blocks)
            own = self._joined(recipe, met)
            if recipe not in complete and own is not None:
                there = self._on(met)
                rivals = [s for r in whole if (s := self._joined(r, met)) is not None]
                found.append(there.mean(own) + average - float(np.mean([there.mean(s) for s in rivals])))
        return found

    def finalists(self) -> list[Finalist]:
        """Return the finalists by their estimate, then their soup and the optimizer's favourite."""
        found = [(f, self.on_search(f.recipe.hash)) for f in self.store.entries("finalist")]
        return [
            Finalist(
                name=f.name,
                recipe=f.recipe.hash,
                search=seen.mean if seen else None,
                select=self._mean(f.recipe.hash, "select"),
                blocks=seen.blocks if seen else 0,
            )
            for f, seen in found
        ]

    def _mean(self, recipe: str, split: Split) -> float | None:
        normaliser, scores = self.normaliser(split), self.store.result(recipe, split)
        if normaliser is None or scores is None or isinstance(scores, Failure):
            return None
        return normaliser.mean(scores)

    def cost(self) -> Cost:
        """Return where the time of the searched candidates went."""
        generations = [g for g in self.store.generations() if g.losses is not None]
        asked = sum(len(g.recipes) for g in generations)
        searched = {recipe for g in generations for recipe in g.recipes}
        timings = [t for r, t in self.store.timings("search").items() if r in searched]
        count = max(len(timings), 1)
        return Cost(
            candidates=len(timings),
            forward=1000 * sum(t.forward for t in timings) / count,
            merge=1000 * sum(t.merge for t in timings) / count,
            scoring=1000 * sum(t.total - t.merge - t.forward for t in timings) / count,
            search=1000 * sum(g.seconds for g in generations) / max(asked, 1),
        )
