"""Racing: candidates of a generation are scored block by block, and the clearly worse stop early.

The `search` items are cut into K blocks, the same for every candidate, each a random share of every task.
After each block all candidates still in the race are compared in pairs, on the items both were scored on. One
leaves the race when it is significantly worse than `keep` others: then it is not among the best `keep`,
unless one of those comparisons was wrong.

**Error rate.** With n candidates there are k (n - k) pairs of one that truly is among the best k (on all
items) and one that is not. A candidate of the first kind can only leave after some such pair was judged
the wrong way round. Each of the K - 1 looks (after the last block nothing is left to decide) spends an
equal part of `error`, and each pair an equal part of that (Bonferroni, twice), so in a generation the
probability that any of the best k stops early is at most `error`. Bonferroni holds whatever the
comparisons have to do with each other.

**The comparison.** d = what an item adds to the loss of one candidate, minus what it adds to the other's.
The blocks seen are a random sample without replacement of the items there are, so the mean of d within
task t has variance (1 - n_t / N_t) s_t^2 / n_t (Cochran, *Sampling Techniques*, 1977, ch. 2 and 5:
finite-population correction, stratified sampling). Tasks add up. The one-sided test refers the mean by
its standard error to Student's t. As few items of a task may all agree by chance, each s_t^2 is drawn
towards the mean over the tasks by the weight of PRIOR items.

**Estimates.** The optimizer needs a loss for those who left, too. It is their difference to the mean of
those who met all blocks, on the items that both met, added to that mean over all items: the luck of the
blocks met cancels.

A race decides from scores alone, so it repeats itself exactly when they come from the store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.stats
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from evomerge.evaluation.scores import Failure, Scores, joined
from evomerge.merging.recipe import Recipe
from evomerge.schema import Strict
from evomerge.search.objective import FAILURE_MARGIN, Objective
from evomerge.search.ports import CandidateScorer

PRIOR = 2.0
"""Weight, in items, of the mean over the tasks in each task's variance."""

MOST_BLOCKS = 8
"""Item blocks of `blocks: auto` where nothing asks for fewer."""
FULL = 16
"""Answers that are generated together in a batch that is large enough."""

_ROUNDING = 1e-9  # losses closer than this are equal


class RacingSpec(Strict):
    """The `racing` part of a run config; `racing: off` scores every candidate on all items at once."""

    blocks: int | Literal["auto"] = "auto"
    """Item blocks, 1 to 64, that the `search` items are cut into. `auto`: 8; fewer where a block would have
    less than 16 answers (or less than a batch) to generate, or a task has fewer items; at least
    `blocks_min`."""
    blocks_min: int = Field(default=1, ge=1, le=64)
    """Item blocks that are scored before the first comparison; at most `blocks`."""
    keep: float = Field(default=0.25, gt=0, le=1)
    """Share of a generation, the best, that must be scored in full."""
    error: float = Field(default=0.1, gt=0, lt=1)
    """Highest probability, per generation, that one of those best candidates stops early."""

    @field_validator("blocks", mode="before")
    @classmethod
    def _number(cls, blocks: object) -> object:
        whole = isinstance(blocks, int) and not isinstance(blocks, bool)
        if blocks != "auto" and not (whole and blocks in range(1, 65)):
            raise ValueError("expected auto, or a whole number from 1 to 64")
        return blocks

    @model_validator(mode="after")
    def _ordered(self) -> RacingSpec:
        most = MOST_BLOCKS if self.blocks == "auto" else self.blocks
        if self.blocks_min > most:
            raise ValueError(f"blocks_min must not exceed the {most} blocks")
        return self

    @property
    def count(self) -> int:
        """The number of item blocks, once it is decided."""
        assert isinstance(self.blocks, int), "the number of item blocks is not decided yet"
        return self.blocks

    def decided(self, blocks: int) -> RacingSpec:
        """Return the spec with this number of blocks in place of `auto`, but not below `blocks_min`."""
        return self.model_copy(update={"blocks": max(blocks, self.blocks_min)})


NO_RACING = RacingSpec(blocks=1)


def full_blocks(answers: int, batch_size: int) -> int:
    """Return how many blocks can have enough answers to generate for a full batch each; at least 1.

    >>> full_blocks(100, batch_size=64), full_blocks(12, batch_size=64), full_blocks(12, batch_size=4)
    (6, 1, 3)
    """
    return max(1, answers // min(batch_size, FULL))


def automatic_blocks(*, answers: int, items: int, batch_size: int) -> int:
    """Return the number of item blocks of `blocks: auto`.

    answers: how many a model writes on all `search` items. items: of the smallest task.

    >>> automatic_blocks(answers=0, items=200, batch_size=64)
    8
    >>> automatic_blocks(answers=40, items=20, batch_size=64)
    2
    >>> automatic_blocks(answers=0, items=5, batch_size=64)
    5
    """
    most = min(MOST_BLOCKS, items)
    return min(most, full_blocks(answers, batch_size)) if answers else most


class Views:
    """An objective on any set of item blocks.

    objective: on all of them. base: the base's scores on each block. standard: those of the merge that sets
    the floors, if any.
    """

    def __init__(self, objective: Objective, base: Sequence[Scores], standard: Sequence[Scores] = ()) -> None:
        self.blocks = tuple(range(len(base)))
        self.base, self._standard = tuple(base), tuple(standard)
        self._views = {self.blocks: objective}

    @property
    def sizes(self) -> list[int]:
        """Number of items of each block."""
        return [part.items for part in self.base]

    def counts(self, blocks: Sequence[int]) -> list[int]:
        """Return the number of items of each counted task on `blocks`."""
        base = joined([self.base[block] for block in blocks])
        return [len(values) for values in self(blocks).contributions(base)]

    def __call__(self, blocks: Sequence[int]) -> Objective:
        """Return the objective for scores on `blocks`."""
        key = tuple(sorted(blocks))
        if key not in self._views:
            whole = self._views[self.blocks]
            standard = joined([self._standard[block] for block in key]) if self._standard else None
            self._views[key] = whole.on(joined([self.base[block] for block in key]), standard)
        return self._views[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceResult:
    """How a race ended, per candidate in ask order.

    results: the scores on the blocks used, or why there are none. losses: (n, objectives), all finite; of
    those that left early an estimate. blocks: those they were scored on. complete: whether on all.
    """

    results: tuple[Scores | Failure, ...]
    losses: NDArray[np.float64]
    blocks: tuple[tuple[int, ...], ...]
    complete: tuple[bool, ...]


def race(
    recipes: Sequence[Recipe],
    *,
    scorer: CandidateScorer,
    views: Views,
    spec: RacingSpec,
    order: Sequence[int],
    phase: str,
) -> RaceResult:
    """Score a generation block by block and let the clearly worse leave early.

    Args:
        recipes: The candidates, at least one.
        scorer: Scores recipes on item blocks of `search`.
        views: The single objective, on any set of blocks.
        spec: When candidates may leave: after how many blocks, down to which share, at which error rate.
        order: The blocks to score, in this order. Losses refer to these blocks only.
        phase: Shown in progress displays.

    Returns:
        Results, finite losses of shape (n, objectives) and the blocks used, per candidate.
    """
    parts: list[list[Scores]] = [[] for _ in recipes]
    failed: dict[int, Failure] = {}
    met = [0] * len(recipes)
    alive = list(range(len(recipes)))
    keep = math.ceil(spec.keep * len(recipes))
    looks = range(spec.blocks_min, len(order)) if keep < len(recipes) else range(0)
    totals = views.counts(order)
    start = 0
    while alive and start < len(order):
        stop = next((look for look in looks if look > start and len(alive) > keep), len(order))
        scored_now = _scored(scorer, [recipes[i] for i in alive], phase, order[start:stop])
        for i, result in zip(alive, scored_now, strict=True):
            met[i] = stop
            if isinstance(result, Failure):
                failed[i] = result
            else:
                parts[i] += result
        alive = [i for i in alive if i not in failed]
        if stop < len(order) and len(alive) > keep:
            objective = views(order[:stop])
            worse = clearly_worse(
                [objective.contributions(joined(parts[i])) for i in alive],
                totals=totals,
                keep=keep,
                level=spec.error / (len(looks) * keep * (len(recipes) - keep)),
            )
            alive = [i for i, stopped in zip(alive, worse, strict=True) if not stopped]
        start = stop
    return RaceResult(
        results=tuple(failed[i] if i in failed else joined(parts[i]) for i in range(len(recipes))),
        losses=_losses(views, order, recipes, parts, alive, failed),
        blocks=tuple(tuple(sorted(order[:count])) for count in met),
        complete=tuple(i in alive for i in range(len(recipes))),
    )


def _scored(
    scorer: CandidateScorer, recipes: Sequence[Recipe], phase: str, blocks: Sequence[int]
) -> list[list[Scores] | Failure]:
    """Return one result per recipe: its scores on each of the blocks, or its failure on one."""
    results = scorer.score(recipes, "search", phase, blocks)
    if len(blocks) == 1:
        return [result if isinstance(result, Failure) else [result] for result in results]
    fine = [recipe for recipe, result in zip(recipes, results, strict=True) if isinstance(result, Scores)]
    # Known by now, so that nothing is executed.
    each = zip(*(scorer.score(fine, "search", phase, [block]) for block in blocks), strict=True)
    return [
        result if isinstance(result, Failure) else [part for part in next(each) if isinstance(part, Scores)]
        for result in results
    ]


def clearly_worse(
    contributions: Sequence[Sequence[NDArray[np.float64]]],
    *,
    totals: Sequence[int] | None,
    keep: int,
    level: float,
) -> list[bool]:
    """Say of each candidate whether it is significantly worse than `keep` others.

    contributions: per candidate and task (items,) what each scored item adds to the loss, in one order of
    items. totals: number of items of each task, scored or not; None if they stand for all
    there could be. level: of each one-sided comparison.

    >>> rng = np.random.default_rng(0)
    >>> losses = [[rng.normal(mean, 1, 50)] for mean in (0, 0, 2)]
    >>> clearly_worse(losses, totals=[400], keep=1, level=0.01)
    [False, False, True]
    """
    tasks = [np.stack(rows) for rows in zip(*contributions, strict=True)]  # (candidates, items) each
    counts = np.array([task.shape[1] for task in tasks])
    degrees = counts - 1
    freedom = int(degrees.sum())
    if freedom < 1:
        return [False] * len(contributions)
    left = (1 - (0 if totals is None else counts / np.asarray(totals))) / counts
    critical = float(scipy.stats.t.isf(level, freedom))
    found = []
    for own in range(len(contributions)):
        differences = [task[own] - task for task in tasks]
        mean = sum(d.mean(axis=1) for d in differences)
        squares = np.stack([((d - d.mean(axis=1, keepdims=True)) ** 2).sum(axis=1) for d in differences])
        pooled = squares.sum(axis=0) / freedom
        variances = (squares + PRIOR * pooled) / (degrees + PRIOR)[:, None]
        error = np.sqrt((variances * left[:, None]).sum(axis=0))
        found.append(int((mean > critical * error + _ROUNDING).sum()) >= keep)
    return found


def _losses(
    views: Views,
    order: Sequence[int],
    recipes: Sequence[Recipe],
    parts: Sequence[Sequence[Scores]],
    complete: Sequence[int],
    failed: Mapping[int, Failure],
) -> NDArray[np.float64]:
    """Return the losses to tell: of the complete, of those that left early, and of failures."""
    whole = views(order)
    if len(complete) + len(failed) == len(parts):
        results = [failed[i] if i in failed else joined(p) for i, p in enumerate(parts)]
        return whole.losses(results, recipes)
    losses = np.full(len(parts), np.nan)
    if complete:
        losses[list(complete)] = whole.losses(
            [joined(parts[i]) for i in complete], [recipes[i] for i in complete]
        )[:, 0]
    for i, own in enumerate(parts):
        if i in failed or i in complete:
            continue
        scores = joined(own)
        objective = views(scores.blocks)
        losses[i] = objective.loss(scores, recipes[i])
        if complete:
            same = [[part for part in parts[j] if set(part.blocks) <= set(scores.blocks)] for j in complete]
            there = np.mean(
                [objective.loss(joined(one), recipes[j]) for j, one in zip(complete, same, strict=True)]
            )
            losses[i] += float(losses[list(complete)].mean() - there)
    finite = np.isfinite(losses)
    worst = max(0.0, float(losses[finite].max())) if finite.any() else 0.0
    losses[~finite] = worst + FAILURE_MARGIN
    return losses[:, None]


def block_order(views: Views, parts: Sequence[Sequence[Scores]]) -> tuple[int, ...]:
    """Return the order in which blocks tell candidates apart best, judged by models scored on all of them.

    parts: of each such model the scores on every block, in order; the baselines, say.

    Greedily, the next block is the one with which the ranking on the blocks so far agrees best with the
    ranking on all: most pairs in the same order, less those in the other (Kendall); ties by number. A
    block that agrees by having typical items for these models has typical items for their mixtures.
    """
    full = np.array([views(views.blocks).loss(joined(own)) for own in parts])
    order: list[int] = []
    while len(order) < len(views.blocks):
        left = [block for block in views.blocks if block not in order]
        agreements = []
        for block in left:
            chosen = [*order, block]
            losses = [views(chosen).loss(joined([own[b] for b in chosen])) for own in parts]
            agreements.append(_agreement(np.array(losses), full))
        order.append(left[int(np.argmax(agreements))])
    return tuple(order)


def _agreement(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float((np.sign(a[:, None] - a) * np.sign(b[:, None] - b)).sum())
