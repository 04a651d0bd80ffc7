"""The guide: what the surrogate contributes to a search, and when it is ignored.

In every generation the guide proposes some genomes, the best ones in its trust region, and screens an
oversized population of the optimizer for the rest; the losses of both are passed to the optimizer. It also
sets the number of item blocks a generation is scored on: few at first, because a model that learns from
every item of many candidates needs few items of each; twice as many after the trust region has collapsed,
a sign that these items hold no further improvement. Where the guide proposes nothing (the model is not
trusted), several generations without a better candidate are that sign. So is a best genome that does worse on
items it was not chosen on: every few generations it is scored on one block more, and compared with what was
scored on all blocks before the search.

The loss of every candidate is predicted before it is scored. The guide is trusted while the rank correlation
of the last predictions with the measured losses is high enough; otherwise the surrogate is ignored and the
optimizer works alone. The guide's own proposals don't count in the correlation: the model is most likely to
be too optimistic there, which the trust region corrects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special
import scipy.stats
from pydantic import Field
from threadpoolctl import threadpool_limits

from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Array, Scores
from evomerge.schema import Strict
from evomerge.search.objective import FLOOR, SHORT, ObjectiveSpec, Standard
from evomerge.search.optimizers import Optimizer
from evomerge.search.ports import GuideState
from evomerge.search.spaces.space import Coordinate, Genome, continuous
from evomerge.search.surrogate.margins import Model, Surrogate
from evomerge.search.surrogate.observed import Observed
from evomerge.search.surrogate.trust_region import TrustRegion
from evomerge.search.utility import Utility

WINDOW = 32
"""Predictions that the rank correlation is taken over, the latest ones."""
TRUSTED = 0.1
"""Rank correlation below which the surrogate is ignored."""
FEW = 16
"""Number of predictions below which the surrogate is trusted without a correlation."""
SCATTERED = 12
"""The optimizer's own candidates the model needs before it predicts: baselines lie on a few lines through the
space and carry no information beside them."""
REFRESHED = 16
"""Candidates, the best, that are scored on further blocks when those are added."""
TUNED_EVERY = 3
"""Generations between choices of the kernel."""
CHECKED_EVERY = 4
"""Generations between looks at the best genome on a block that the search does not use yet."""
ADAPTED = 1.645
"""Standard errors by which the best genome must do worse there before blocks are added."""
ADDED = 0.002
"""Lead, in loss on all items, up to which a best genome is no better than the last."""
SETTLED = 2
"""Looks in a row at which the best genome is no better on all items."""
HOPELESS = 3
"""Generations in a row in which all items in use, all there are, hold no further improvement nearby."""
PATIENCE = 6
"""Generations in a row without proposals and without a better candidate, after which blocks are added."""


class SurrogateSpec(Strict):
    """The `surrogate` part of a run config; `surrogate: off` leaves everything to the optimizer."""

    share: float = Field(default=0.5, ge=0, le=1)
    """Share of every generation that the surrogate proposes."""
    oversample: int = Field(default=4, ge=1, le=100)
    """Candidates the optimizer draws for each one that is scored; the surrogate picks the most promising."""
    blocks: int = Field(default=2, ge=1, le=64)
    """Item blocks a generation is scored on at first."""
    front: bool = True
    """Whether it guides a search with several objectives, too, in place of the optimizer alone."""


def generation_price(
    coordinates: Sequence[Coordinate],
    population: int,
    blocks: int,
    surrogate: SurrogateSpec | None,
    *,
    dispensable: bool,
) -> float:
    """Return what the first generation costs at most, in full evaluations; 0 where it can't be left out.

    Gradients don't replace it where there are discrete coordinates, which they don't move.

    blocks: item blocks of `search`. surrogate: None without one. dispensable: whether the search could do
    without: one objective, generations, and a budget in evaluations or items, not in generations.
    """
    if not dispensable or not continuous(coordinates):
        return 0.0
    return population * (1.0 if surrogate is None else min(1.0, surrogate.blocks / blocks))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A generation to score: genomes (n, dimension), and which rows of the optimizer's ask they are."""

    genomes: Array
    chosen: tuple[int, ...] | None = None


class MeanLoss:
    """The loss of predicted means: (tasks,) in, loss and slope (tasks,) out.

    The tasks are the counted skills, then those of retention and of coherence. normaliser: of the blocks
    predicted. spec: prices and limits. utility: what the skills' normalised scores are worth.
    """

    def __init__(self, normaliser: Normaliser, spec: ObjectiveSpec, utility: Utility) -> None:
        skills, kept, coherent = normaliser.skills, normaliser.retained, normaliser.coherent
        self.tasks = tuple(s.task for s in (*skills, *kept, *coherent))
        self._skills = len(skills)
        self._zero = np.array([s.zero for s in skills])
        self._headroom = np.array([s.headroom for s in skills])
        self._kept_shares = np.array([k.share for k in kept])
        self._kept_base = np.array([k.zero for k in kept])
        self._coherence = np.array([c.share / c.zero for c in coherent])
        self._coherent_shares = np.array([c.share for c in coherent])
        self._spec = spec
        self._utility = utility

    def above(self, values: Array, slack: Array) -> MeanLoss:
        """Return this loss with floors: the skills' values of a merge, (tasks,), less a slack, (skills,).

        The slack is in normalised scores.
        """
        floored = copy.copy(self)
        floored._utility = self._utility.above(self._scores(values) - slack, FLOOR)
        return floored

    def __call__(self, values: Array) -> tuple[float, Array]:
        """Return the loss and its slope."""
        count = self._skills
        worth, by_score = self._utility(self._scores(values))
        loss = -float(worth.sum())
        slope = np.zeros(len(values))
        slope[:count] = -by_score / self._headroom
        stop = count + len(self._kept_shares)
        if stop > count:
            gained = values[count:stop] - self._kept_base
            ratios = self._kept_shares * np.exp(np.minimum(gained, 0.0))
            cost, change = self._cost(
                float(ratios.sum()), self._spec.retention, self._spec.constraints.retention
            )
            loss += cost
            slope[count:stop] = change * np.where(gained < 0.0, ratios, 0.0)
        if len(values) > stop:
            parts = np.minimum(values[stop:] * self._coherence, self._coherent_shares)
            cost, change = self._cost(
                float(parts.sum()), self._spec.coherence, self._spec.constraints.coherence
            )
            loss += cost
            slope[stop:] = change * np.where(parts < self._coherent_shares, self._coherence, 0.0)
        return loss, slope

    def _scores(self, values: Array) -> Array:
        scores: Array = (values[: self._skills] - self._zero) / self._headroom
        return scores

    def _cost(self, kept: float, price: float, least: float | None) -> tuple[float, float]:
        """Return the price of keeping a share of the base's ability, and its derivative."""
        cost, change = (price * (1.0 - kept), -price) if kept < 1.0 else (0.0, 0.0)
        if least is not None and kept < least:
            cost, change = cost + SHORT * (least - kept), change - SHORT
        return cost, change


@dataclass(frozen=True, slots=True, kw_only=True)
class _Promise:
    """The guide's own proposals: their predicted losses, and the radii of the boxes they come from."""

    losses: tuple[float, ...]
    radii: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the guide expected of a candidate of an asynchronous search.

    loss: None where there was no model. promised, radius: of its own proposals, as in `_Promise`. box: how
    often the box had changed by then.
    """

    loss: float | None = None
    promised: float | None = None
    radius: float = 0.0
    box: int = 0


class Learner:
    """What guides have in common: the genomes known, the model that learns from them, and trust in it."""

    _observed: Observed
    _surrogate: Surrogate
    _known: dict[bytes, tuple[Genome, dict[int, Array]]]

    @property
    def correlation(self) -> float | None:
        """Rank correlation of predictions with what was measured; None while there are too few."""
        raise NotImplementedError

    @property
    def trusted(self) -> bool:
        """Whether the surrogate is used."""
        correlation = self.correlation
        return correlation is None or correlation >= TRUSTED

    def learn(self, genome: Genome, scores: Scores) -> None:
        """Add the scores of a genome, on any blocks, to the data."""
        genome = np.array(genome, dtype=np.float64)
        _, known = self._known.setdefault(genome.tobytes(), (genome, {}))
        for block, columns in self._observed.columns(scores).items():
            known[block] = columns
            self._surrogate.learn(genome, block, columns)


class Guide(Learner):
    """The surrogate in a search with one objective.

    order: item blocks, the most informative first. loss_on: returns the loss of means on some blocks.
    standard: the merge that sets the floors, on all blocks; None without floors. Attribute frugal: whether
    the best genome is looked at on all items, also before blocks are added.
    """

    def __init__(
        self,
        spec: SurrogateSpec,
        *,
        coordinates: Sequence[Coordinate],
        base: Sequence[Scores],
        order: Sequence[int],
        loss_on: Callable[[Sequence[int]], MeanLoss],
        seed: np.random.SeedSequence,
        standard: Standard | None = None,
    ) -> None:
        self.frugal = False
        self._spec, self._order, self._without_floors = spec, tuple(order), loss_on
        tasks = loss_on(order).tasks
        self._observed = Observed(tasks, base)
        self._floors: tuple[dict[int, Array], Array] | None = None
        if standard is not None:
            slack = np.array([standard.slack[task] for task in tasks if task in standard.slack])
            self._floors = self._observed.columns(standard.scores), slack
        self._loss_by_blocks: dict[tuple[int, ...], MeanLoss] = {}
        self._surrogate = Surrogate(coordinates, self._observed.outputs, tasks=len(tasks))
        self._region = TrustRegion(coordinates, seed=seed)
        self._active = min(spec.blocks, len(order))
        self._known: dict[bytes, tuple[Genome, dict[int, Array]]] = {}
        self._pairs: list[tuple[float, float]] = []
        self._predicted: Sequence[float | None] | None = None
        self._proposed = 0
        self._promise: _Promise | None = None
        self._generation = 0
        self._told = 0
        self._stalled = self._spent = 0
        self._losses: dict[tuple[bytes, int], float] = {}
        self._drawn = self._batch = self._boxes = self._missed = self._enough = 0
        self._tuned = False
        self._before: float | None = None
        self._references: tuple[bytes, ...] = ()
        self._held: bytes | None = None
        self._failed = 0
        self._collapsed = False

    def begin(self) -> None:
        """Take what is known now, on all blocks, for what the best genome is compared with from now on."""
        whole = [k for k, (_, known) in self._known.items() if len(known) == len(self._order)]
        self._references = tuple(whole)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The item blocks that the next generation is scored on, in order."""
        return self._order[: self._active]

    @property
    def correlation(self) -> float | None:
        """Spearman's rank correlation of predictions with what was measured, the optimizer's own candidates.

        Of all candidates where the optimizer has none of its own.
        """
        if len(self._pairs) < FEW:
            return None
        predicted, measured = np.array(self._pairs[-WINDOW:]).T
        if np.ptp(predicted) == 0 or np.ptp(measured) == 0:
            return 0.0
        return float(scipy.stats.spearmanr(predicted, measured).statistic)

    def ask(self, optimizer: Optimizer) -> Asked:
        """Return the next generation: proposals first, then the optimizer's own, screened."""
        self._predicted, self._proposed, self._promise = None, 0, None
        size = optimizer.population
        best = self._best(self.blocks)
        tune = self._generation % TUNED_EVERY == 1
        ready = best is not None and self._told >= SCATTERED
        model = self._surrogate.fit(best[0], self.blocks, tune=tune) if ready and best else None
        self._generation += 1
        if model is None or best is None:
            return Asked(genomes=optimizer.ask())
        loss = self._loss_on(self.blocks)
        if not self.trusted:
            genomes = optimizer.ask()
            self._predicted = self._predict(model, loss, genomes)
            return Asked(genomes=genomes)
        count = round(self._spec.share * size)
        if count:
            blocks = self.blocks
            known = {key for key, (genome, _) in self._known.items() if self._loss(genome, blocks) < np.inf}
            proposals = self._region.propose(model, loss, best[0], count, known=known)
            count = len(proposals.genomes)
        if count:
            here, *there = self._predict(model, loss, [best[0], *proposals.genomes])
            promised = tuple(best[1] + min(0.0, value - here) for value in there)
            self._promise = _Promise(losses=promised, radii=proposals.radii)
            optimizer.inject(proposals.genomes)
        pool = optimizer.ask(self._spec.oversample * size)
        assert not optimizer.required, "an optimizer of several objectives"
        predicted = np.array(self._predict(model, loss, pool))
        rest = np.argsort(predicted[count:], kind="stable")[: size - count] + count
        chosen = (*range(count), *(int(i) for i in rest))
        self._predicted, self._proposed = predicted[list(chosen)].tolist(), count
        return Asked(genomes=pool[list(chosen)], chosen=chosen)

    def tell(self, genomes: Array, results: Sequence[Scores | None], losses: Array) -> list[Genome]:
        """Learn from a scored generation; return genomes that should be scored on `blocks` now, if any.

        results: None where a candidate failed. losses: (n,) as passed to the optimizer.
        """
        before = self._best(self.blocks)
        self._told += len(genomes)
        for genome, scores in zip(genomes, results, strict=True):
            if scores is not None:
                self.learn(genome, scores)
        return self._judge(None if before is None else before[1], genomes, results, losses)

    def _judge(
        self, before: float | None, genomes: Array, results: Sequence[Scores | None], losses: Array
    ) -> list[Genome]:
        """Compare what was learned with what was expected; before: the best loss until then."""
        if self._predicted is not None:
            own = self._proposed if self._proposed < len(genomes) else 0
            self._pairs += [
                (p, float(m))
                for p, m, scores in zip(self._predicted[own:], losses[own:], results[own:], strict=True)
                if scores is not None and p is not None
            ]
        exhausted = before is not None and self._exhausted(genomes, before)
        if self._active == len(self._order):
            self._spent = self._spent + 1 if exhausted else 0
            return []
        self._collapsed = exhausted
        return self._widened() if exhausted and not self.frugal else []

    # -- an asynchronous search ----------------------------------------------------------------------

    def ask_more(
        self, optimizer: Optimizer, count: int, pending: Sequence[Genome]
    ) -> tuple[Array, list[Expected]]:
        """Return some candidates for a search without generations, and what is expected of them.

        pending: all candidates whose scores are still to come. The model knows that they will be known.
        """
        best = self._best(self.blocks)
        tune = self._generation % TUNED_EVERY == 1 and not self._tuned
        ready = best is not None and self._told >= SCATTERED
        model = self._surrogate.fit(best[0], self.blocks, tune=tune) if ready and best else None
        if model is None or best is None:
            return optimizer.draw(count), [Expected()] * count
        self._tuned |= tune
        loss = self._loss_on(self.blocks)
        if not self.trusted:
            genomes = optimizer.draw(count)
            return genomes, [Expected(loss=each) for each in self._predict(model, loss, genomes)]
        share, before = self._spec.share, self._drawn
        self._drawn += count
        own = round(share * self._drawn) - round(share * before)
        expected: list[Expected] = []
        if own:
            proposals = self._region.propose(
                model,
                loss,
                best[0],
                own,
                known={
                    key
                    for key, (genome, _) in self._known.items()
                    if self._loss(genome, self.blocks) < np.inf
                },
                pending=pending,
                first=self._batch,
            )
            self._batch = (self._batch + own) % max(round(share * optimizer.population), 1)
            here, *there = self._predict(model, loss, [best[0], *proposals.genomes])
            for value, radius in zip(there, proposals.radii, strict=True):
                promised = best[1] + min(0.0, value - here)
                expected.append(Expected(loss=value, promised=promised, radius=radius, box=self._boxes))
            optimizer.inject(proposals.genomes)
        own = len(expected)
        pool = optimizer.draw(own + self._spec.oversample * (count - own))
        predicted = np.array(self._predict(model, loss, pool[own:])) if count > own else np.empty(0)
        rest = np.argsort(predicted, kind="stable")[: count - own]
        chosen = [*range(own), *(own + int(i) for i in rest)]
        return pool[chosen], expected + [Expected(loss=float(predicted[i])) for i in rest]

    def learn_arrival(self, genome: Genome, scores: Scores | None) -> None:
        """Learn from a candidate of an asynchronous search at once; None where it failed."""
        if self._before is None and (best := self._best(self.blocks)) is not None:
            self._before = best[1]
        self._told += 1
        if scores is not None:
            self.learn(genome, scores)

    def tell_arrived(
        self, genomes: Array, results: Sequence[Scores | None], losses: Array, expected: Sequence[Expected]
    ) -> list[Genome]:
        """Judge as many arrivals as a generation has; as `tell`, which also learns from them.

        The box shrinks after as many proposals from it as a generation has, and follows a better one at once.
        """
        rows = sorted(range(len(expected)), key=lambda row: expected[row].promised is None)
        own = [(each.promised, each.radius) for each in expected if each.promised is not None]
        self._proposed, self._promise = len(own), None
        self._predicted = [expected[row].loss for row in rows]
        if own:
            promised, radii = zip(*own, strict=True)
            self._promise = _Promise(losses=promised, radii=radii)
        self._missed += sum(e.promised is not None and e.box == self._boxes for e in expected)
        self._enough = max(round(self._spec.share * len(rows)), 1)
        before, self._before = self._before, None
        self._generation += 1
        self._tuned = False
        return self._judge(before, genomes[rows], [results[row] for row in rows], losses[rows])

    @property
    def hopeless(self) -> bool:
        """Whether nothing better is expected near the best genome, on all items there are."""
        return self._spent >= HOPELESS

    @property
    def checking(self) -> bool:
        """Whether it is time to look at the best genome on items that the search does not use."""
        due = self._generation % CHECKED_EVERY == 0 or (self.frugal and self._collapsed)
        return due and bool(self._references)

    def unseen(self) -> tuple[Genome, tuple[int, ...]] | None:
        """Return the best genome and the next block to score it on, which the search does not use yet.

        All such blocks if it is frugal. None where it is not the time, or no such block is left.
        """
        best, left = self._best(self.blocks), self._order[self._active :]
        if not self.checking or best is None:
            return None
        known = self._known[best[0].tobytes()][1]
        blocks = tuple(block for block in left if block not in known)
        return (best[0], blocks if self.frugal else blocks[:1]) if blocks else None

    def check(self) -> bool:
        """Compare the best genome, once scored on all items, with the last one that was better there.

        At first that is the best one known before the search. Returns whether the search has settled: twice
        in a row there was none that is better.
        """
        if self._held is None:
            self._held = min(self._references, key=lambda key: self._loss(self._known[key][0], self._order))
        best = self._best(self.blocks)
        key = self._held if best is None else best[0].tobytes()
        before, now = (self._loss(self._known[each][0], self._order) for each in (self._held, key))
        if before - now > ADDED:  # it is not where it could not be scored on all items
            self._held, self._failed = key, 0
        else:
            self._failed += 1
        return self._failed >= SETTLED

    def doubted(self, genome: Genome | None) -> list[Genome]:
        """Compare a genome's lead on blocks that the search uses with that on others, once scored there.

        The lead is over what was scored on all blocks before the search. Where it is smaller by more than
        sampling error on the other blocks, the search has adapted to its items: blocks are added. Returns the
        genomes that should be scored on them now. genome: None where none was scored on others.
        """
        if self._collapsed and self.frugal:
            self._collapsed = False
            return self._widened()
        if genome is None:
            return []
        known = self._known[genome.tobytes()][1]
        others = tuple(block for block in self._order[self._active :] if block in known)
        if not others or self._active == len(self._order):
            return []
        (here, error_here), (there, error_there) = (
            self._lead(known, blocks) for blocks in (self.blocks, others)
        )
        return self._widened() if there - here > ADAPTED * float(np.hypot(error_here, error_there)) else []

    def _lead(self, columns: dict[int, Array], blocks: Sequence[int]) -> tuple[float, float]:
        """Return how far below the references' a genome's loss is on blocks, negative, and its error."""
        loss = self._loss_on(blocks)
        means = self._observed.means(columns, blocks)
        value, slopes = loss(means)
        references = [self._known[key][1] for key in self._references]
        value -= float(np.mean([loss(self._observed.means(each, blocks))[0] for each in references]))
        spread = self._observed.errors(columns, references, blocks)
        return value, float(np.sqrt(((slopes * spread) ** 2).sum()))

    def _widened(self) -> list[Genome]:
        """Use twice as many blocks; return the best genomes, which should be scored on them."""
        best = sorted(
            (g for g, known in self._known.values() if all(b in known for b in self.blocks)),
            key=lambda g: self._loss(g, self.blocks),
        )
        self._active = min(2 * self._active, len(self._order))
        self._region.reset()
        self._stalled = 0
        self._pairs.clear()
        return best[:REFRESHED]

    def _exhausted(self, genomes: Array, before: float) -> bool:
        """Record a generation's improvement; return whether these items hold no further one."""
        mine = genomes if self._promise is None else genomes[: self._proposed]
        reached = [self._loss(genome, self.blocks) for genome in mine]
        if self._promise is None:
            self._stalled = 0 if min(reached) < before else self._stalled + 1
            return self._stalled >= PATIENCE
        if min(reached) >= before and self._missed < self._enough:
            return False
        self._boxes, self._missed = self._boxes + 1, 0
        self._region.learn(
            before=before, promised=self._promise.losses, reached=reached, radii=self._promise.radii
        )
        return self._region.collapsed

    def state(self) -> GuideState:
        """Return the state after the last generation, for the store and the report."""
        return GuideState(
            correlation=self.correlation,
            proposed=self._proposed,
            blocks=self._active,
            radius=self._region.radius,
        )

    def estimates(self, genomes: Sequence[Genome]) -> Array | None:
        """Return the predicted losses of genomes, (n,), or None without a model."""
        best = self._best(self.blocks)
        model = None if best is None else self._surrogate.fit(best[0], self.blocks)
        return None if model is None else np.array(self._predict(model, self._loss_on(self.blocks), genomes))

    def _loss_on(self, blocks: Sequence[int]) -> MeanLoss:
        """Return the loss of means on some blocks, with floors."""
        key = tuple(blocks)
        if key not in self._loss_by_blocks:
            loss = self._without_floors(key)
            if self._floors is not None:
                columns, slack = self._floors
                loss = loss.above(self._observed.means(columns, key), slack)
            self._loss_by_blocks[key] = loss
        return self._loss_by_blocks[key]

    def _predict(self, model: Model, loss: MeanLoss, genomes: Sequence[Genome] | Array) -> list[float]:
        with threadpool_limits(1):
            return [loss(values)[0] for values in model.values(genomes)]

    def _loss(self, genome: Genome, blocks: Sequence[int]) -> float:
        """The measured loss of a genome on blocks, inf where it was not scored on all of them."""
        key = np.asarray(genome, dtype=np.float64).tobytes()
        loss = self._losses.get((key, len(blocks)))  # blocks are always the first of `order`
        if loss is not None:
            return loss
        entry = self._known.get(key)
        if entry is None or any(block not in entry[1] for block in blocks):
            return float("inf")
        loss = self._loss_on(blocks)(self._observed.means(entry[1], blocks))[0]
        self._losses[key, len(blocks)] = loss
        return loss

    def _best(self, blocks: Sequence[int]) -> tuple[Genome, float] | None:
        """The best genome known on all of the blocks, with its loss."""
        losses = [(self._loss(genome, blocks), key) for key, (genome, _) in self._known.items()]
        loss, key = min(losses, default=(np.inf, b""), key=lambda pair: pair[0])
        return None if not np.isfinite(loss) else (self._known[key][0], loss)
