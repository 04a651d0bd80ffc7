"""The course of a search on `search`: scores by generation, optimism, finalists, cost.

Candidates may be scored on a subset of the item blocks. Two candidates are compared on blocks that both were
scored on, and a score on some blocks is normalised by the base's score on those blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evomerge.delivery.style import of_blocks, percent
from evomerge.delivery.summary import Summary
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Scores, joined
from evomerge.evaluation.statistics import Interval
from evomerge.running.store import facts
from evomerge.search.ports import Named
from evomerge.search.surrogate.prediction import shared_blocks

Blocks = tuple[int, ...]
"""Numbers of item blocks of `search`, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchScore:
    """The score of a recipe on the item blocks of `search` that it was scored on.

    mean: normalised, 0 = base on the same items, 1 = specialists. tasks: the same for every skill. blocks:
    number of these blocks.
    """

    mean: float
    tasks: dict[str, float]
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Convergence:
    """Best and median mean normalised `search` score per generation, and the best baseline's.

    A generation is measured on the item blocks its survivors were scored on; `blocks` has their number, of
    `of`. best_so_far: the best of all generations up to this one on the same items, so it may fall where the
    items change. baseline: the score on the same items of the baseline that is best on all items.
    best_interval: of the last best_so_far. baseline_interval: of the best baseline on all items.
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
    best_interval: Interval | None
    baseline_interval: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimism:
    """How far the winner falls from the items it was chosen on to others: its mean normalised scores.

    Items differ in how hard they are, so its lead over a baseline on the same items says more.

    chosen: on the item blocks of `search` that finalists were chosen on, `blocks` of `of`. unused: on the
    other blocks, None where there are none. baseline: the merge that leads are over. leads: part -> lead, of
    the parts on which both were scored.
    """

    chosen: float
    unused: float | None
    select: float | None
    test: float | None
    blocks: int
    of: int
    baseline: str | None
    leads: dict[str, float]

    @property
    def sentence(self) -> str:
        """The scores in one line."""
        chosen = f"the search items it was chosen on{of_blocks(self.blocks, self.of)}"
        places = {"chosen": chosen, "unused": "the other search items", "select": "select", "test": "test"}
        scores = {part: getattr(self, part) for part in places}
        found = [f"{percent(value)} on {places[part]}" for part, value in scores.items() if value is not None]
        text = f"optimism: the winner has {', '.join(found)}"
        if self.baseline is None or not self.leads:
            return text
        leads = ", ".join(f"{100 * self.leads[part]:+.1f}" for part in places if part in self.leads)
        return f"{text}; its lead over {self.baseline} there: {leads}"

    def as_data(self) -> dict[str, Any]:
        """Return the scores as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Mean time of one candidate on `search` by part, in milliseconds."""

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

    @property
    def sentence(self) -> str:
        """The times in one line."""
        return (
            f"per candidate: {self.forward:.0f} ms forward passes, {self.merge:.1f} ms merging, "
            f"{self.scoring:.1f} ms scoring, {self.search:.1f} ms search and store; "
            f"overhead (all but forward passes) {percent(self.overhead, 0)} %, "
            f"mean of {self.candidates} candidates"
        )

    def as_data(self) -> dict[str, float]:
        """Return the times as plain data, in milliseconds, and the overhead's share."""
        return {
            "forward": self.forward,
            "merge": self.merge,
            "scoring": self.scoring,
            "search": self.search,
            "overhead": self.overhead,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """A candidate that was re-scored on `select`: its mean normalised scores.

    blocks: the number of item blocks of `search` it was scored on.
    """

    name: str
    recipe: str
    search: float | None
    select: float | None
    blocks: int


class Course:
    """What a stored run scored on `search`, generation by generation.

    Scores are read from the store once and kept; one object serves one report.

    Args:
        summary: the run's summary, which names its base, parents and baselines.
    """

    def __init__(self, summary: Summary) -> None:
        self._summary, self._store = summary, summary.store
        self.blocks = self._store.blocks("search")
        self._parts: dict[str, list[Scores]] = {}
        self._scales: dict[Blocks, Normaliser] = {}

    def parts(self, recipe: str) -> list[Scores]:
        """Return the scores of a recipe (its hash) on `search`, one element per scored item block."""
        if recipe not in self._parts:
            results = [self._store.result(recipe, "search", block) for block in range(self.blocks)]
            self._parts[recipe] = [result for result in results if isinstance(result, Scores)]
        return self._parts[recipe]

    def score(self, recipe: str) -> SearchScore | None:
        """Return the score of a recipe (its hash) on all item blocks it was scored on; None without any."""
        parts = self.parts(recipe)
        if self._summary.normaliser("search") is None or not parts:
            return None
        scale, scores = self._scale(tuple(part.blocks[0] for part in parts)), joined(parts)
        return SearchScore(mean=scale.mean(scores), tasks=scale.task(scores), blocks=len(parts))

    def convergence(self) -> Convergence:
        """Return best and median score of each generation; empty until base and parents are scored."""
        scored = self._summary.normaliser("search") is not None
        ranked = [
            (mean, baseline.name, baseline.recipe.hash)
            for baseline in self._summary.baselines
            if (mean := self._summary.mean(baseline.recipe.hash, "search")) is not None
        ]
        baseline_mean, baseline_name, baseline = max(ranked) if ranked else (None, None, None)
        numbers, best, so_far, median, counts, beside = [], [], [], [], [], []
        asked: dict[str, None] = {}
        means_by_blocks: dict[Blocks, dict[str, float]] = {}
        means: dict[str, float] = {}
        last: Blocks = ()
        for generation in self._store.generations() if scored else ():
            asked |= dict.fromkeys(generation.recipes)
            blocks = self._common_blocks(generation.recipes)
            if not blocks:
                continue
            last = blocks
            means = means_by_blocks.setdefault(blocks, {})
            for recipe in (*asked, *([baseline] if baseline else ())):
                if recipe not in means and (scores := self._joined(recipe, blocks)) is not None:
                    means[recipe] = self._scale(blocks).mean(scores)
            numbers.append(generation.number)
            best.append(max(means[recipe] for recipe in generation.recipes if recipe in means))
            so_far.append(max(means[recipe] for recipe in asked if recipe in means))
            median.append(float(np.median(self._means(generation.recipes, blocks, means))))
            counts.append(len(blocks))
            beside.append(means.get(baseline) if baseline else None)
        return Convergence(
            generations=tuple(numbers),
            best=tuple(best),
            best_so_far=tuple(so_far),
            median=tuple(median),
            blocks=tuple(counts),
            of=self.blocks,
            baseline=tuple(beside),
            best_baseline=baseline_mean,
            best_baseline_name=baseline_name,
            best_interval=self._best_interval(means, last) if numbers else None,
            baseline_interval=self._interval(baseline, tuple(range(self.blocks))) if baseline else None,
        )

    def _best_interval(self, means: Mapping[str, float], blocks: Blocks) -> Interval | None:
        searched = {recipe for generation in self._store.generations() for recipe in generation.recipes}
        best = max((recipe for recipe in means if recipe in searched), key=lambda recipe: means[recipe])
        return self._interval(best, blocks)

    def _interval(self, recipe: str, blocks: Blocks) -> Interval | None:
        scores = self._joined(recipe, blocks)
        return None if scores is None else self._scale(blocks).interval(scores)

    def optimism(self) -> Optimism | None:
        """Return how far the winner falls from the items it was chosen on; None without a winner."""
        winner = None if self._summary.winner is None else self._summary.winner.recipe.hash
        if winner is None or self.score(winner) is None:
            return None
        scored = tuple(part.blocks[0] for part in self.parts(winner))
        used = tuple(b for b in facts.CHOSEN_ON.get(self._store) or scored if b in scored) or scored
        unused = tuple(block for block in scored if block not in used)
        scores = self._by_part(winner, used, unused)
        chosen, rival = scores["chosen"], self._summary.standard or self._best_baseline()
        assert chosen is not None
        others = self._by_part(rival.recipe.hash, used, unused) if rival is not None else {}
        return Optimism(
            chosen=chosen,
            unused=scores["unused"],
            select=scores["select"],
            test=scores["test"],
            blocks=len(used),
            of=self.blocks,
            baseline=None if rival is None else rival.name,
            leads={
                part: mean - other
                for part, mean in scores.items()
                if mean is not None and (other := others.get(part)) is not None
            },
        )

    def _by_part(self, recipe: str, used: Blocks, unused: Blocks) -> dict[str, float | None]:
        """Return a recipe's means on the blocks used, on the others, on `select` and on `test`."""
        return {
            "chosen": self._mean(recipe, used),
            "unused": self._mean(recipe, unused) if unused else None,
            "select": self._summary.mean(recipe, "select"),
            "test": self._summary.mean(recipe, "test"),
        }

    def _best_baseline(self) -> Named | None:
        """Return the baseline with the best mean on `search`."""
        ranked = [
            (mean, index)
            for index, named in enumerate(self._summary.baselines)
            if (mean := self._summary.mean(named.recipe.hash, "search")) is not None
        ]
        return self._summary.baselines[max(ranked)[1]] if ranked else None

    def _mean(self, recipe: str, blocks: Blocks) -> float | None:
        scores = self._joined(recipe, blocks)
        return None if scores is None else self._scale(blocks).mean(scores)

    def evaluations(self) -> float:
        """Return what the search has scored so far, in full evaluations (all items of `search` once).

        Counted as the search's ledger counts: gradients and the points they led to, failures as far as they
        got; not baselines, given recipes and repeats. Before the first finished generation there is no
        ledger; then scored items are counted.
        """
        base = self.parts(self._summary.parents[0].recipe.hash) if self._summary.parents else []
        if len(base) < self.blocks:
            return 0.0
        items = [part.items for part in base]
        if (spent := facts.SPENT.get(self._store)) is not None:
            return float(spent[1]) / sum(items)
        asked = {recipe for generation in self._store.generations() for recipe in generation.recipes}
        asked -= {named.recipe.hash for named in self._summary.named}
        asked |= {named.recipe.hash for named in self._store.entries("descent")}
        scored = self._store.scored_blocks("search")
        searched = sum(items[block] for recipe in asked for block in scored.get(recipe, ()))
        return (searched + self._store.gradient_items()) / sum(items)

    def finalists(self) -> list[Finalist]:
        """Return the finalists in the order of their estimate, then their soup and the optimizer's mean."""
        finalists = []
        for named in self._store.entries("finalist"):
            score = self.score(named.recipe.hash)
            finalists.append(
                Finalist(
                    name=named.name,
                    recipe=named.recipe.hash,
                    search=score.mean if score else None,
                    select=self._summary.mean(named.recipe.hash, "select"),
                    blocks=score.blocks if score else 0,
                )
            )
        return finalists

    def cost(self) -> Cost:
        """Return the mean time of a searched candidate, in milliseconds by part."""
        generations = [g for g in self._store.generations() if g.losses is not None]
        asked = sum(len(g.recipes) for g in generations)
        searched = {recipe for g in generations for recipe in g.recipes}
        if not generations:  # gradients took the whole budget
            searched = {named.recipe.hash for named in self._store.entries("descent")}
        timings = [t for recipe, t in self._store.timings("search").items() if recipe in searched]
        count = max(len(timings), 1)
        return Cost(
            candidates=len(timings),
            forward=1000 * sum(t.forward for t in timings) / count,
            merge=1000 * sum(t.merge for t in timings) / count,
            scoring=1000 * sum(t.total - t.merge - t.forward for t in timings) / count,
            search=1000 * sum(g.seconds for g in generations) / max(asked, 1),
        )

    def _scale(self, blocks: Blocks) -> Normaliser:
        """Return the scale of `search` on some of its blocks."""
        if blocks not in self._scales:
            normaliser = self._summary.normaliser("search")
            base = self._joined(self._summary.parents[0].recipe.hash, blocks)
            assert normaliser is not None
            assert base is not None
            self._scales[blocks] = normaliser.on(base)
        return self._scales[blocks]

    def _joined(self, recipe: str, blocks: Blocks) -> Scores | None:
        """Return a recipe's scores on exactly these blocks, None where it misses one of them."""
        parts = [part for part in self.parts(recipe) if part.blocks[0] in blocks]
        return joined(parts) if len(parts) == len(blocks) > 0 else None

    def _common_blocks(self, recipes: Sequence[str]) -> Blocks:
        """Return the largest set of item blocks that a quarter of a generation was scored on.

        Not simply the most blocks of any: repeated baselines, and candidates that a later generation scored
        further, have more than their generation.
        """
        named = {entry.recipe.hash for entry in self._summary.named}
        new = [recipe for recipe in recipes if recipe not in named] or recipes
        block_sets = [{part.blocks[0] for part in parts} for r in new if (parts := self.parts(r))]
        return shared_blocks(block_sets, 0.25)

    def _means(self, recipes: Iterable[str], blocks: Blocks, complete: Mapping[str, float]) -> list[float]:
        """Return the means of a generation on some blocks; `complete` has those scored on all of them.

        A candidate that a race stopped early gets the estimate that the optimizer got: its difference to the
        mean of the complete ones on the blocks it was scored on, added to their mean on all blocks.
        """
        survivors = [recipe for recipe in recipes if recipe in complete]
        means = [complete[recipe] for recipe in survivors]
        average = float(np.mean(means))
        for recipe in recipes:
            scored = tuple(part.blocks[0] for part in self.parts(recipe) if part.blocks[0] in blocks)
            scores = self._joined(recipe, scored)
            if recipe not in complete and scores is not None:
                scale = self._scale(scored)
                rivals = [s for r in survivors if (s := self._joined(r, scored)) is not None]
                rival_mean = float(np.mean([scale.mean(s) for s in rivals]))
                means.append(scale.mean(scores) + average - rival_mean)
        return means
