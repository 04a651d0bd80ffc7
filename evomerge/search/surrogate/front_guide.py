"""The guide of a search with several objectives: it proposes what the front is expected to gain most from.

In every generation genomes come from two places: descents on the surrogate, each with other weights between
the objectives and from the member of the front that is best by them, and an oversized population of the
optimizer. Of all of them those are scored that together are expected to add most hypervolume to the front
(`improvement.py`), in joint draws from the surrogate.

As with one objective, generations are scored on few item blocks at first and on twice as many once the
trust region has collapsed, and the surrogate is ignored while its predictions do not rank candidates as they
turn out. At the end `survivors` names the genomes that the front is made of, to be scored on all items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats
from threadpoolctl import threadpool_limits

from evomerge.evaluation.scores import Array, Scores
from evomerge.search.optimizers import Optimizer, OptimizerSpec
from evomerge.search.ports import GuideState
from evomerge.search.spaces.space import Coordinate, Genome
from evomerge.search.surrogate.guide import SCATTERED, TUNED_EVERY, WINDOW, Asked, Learner
from evomerge.search.surrogate.guide import SurrogateSpec as Spec
from evomerge.search.surrogate.improvement import (
    FrontLoss,
    most_improving,
    spread_out,
    undominated,
    volume,
)
from evomerge.search.surrogate.margins import Model, Surrogate
from evomerge.search.surrogate.observed import Observed
from evomerge.search.surrogate.trust_region import LADDER, TrustRegion

DRAWS = 64
"""Joint draws from the surrogate, from which improvements are expected."""
POPULATION = 8
"""Candidates per generation, by default: few, so that the surrogate soon learns from them."""
SURVIVORS = 16
"""Genomes, at most, that are scored on all items at the end."""


def small(spec: OptimizerSpec) -> OptimizerSpec:
    """Return the optimizer with the small population that suits a guide, unless the spec names one."""
    return spec if spec.population is not None else spec.model_copy(update={"population": POPULATION})


class FrontGuide(Learner):
    """The surrogate in a search with several objectives.

    order: item blocks, in the order in which they are used. loss_on: returns the losses of means on some
    blocks. reference: (objectives,) the corner up to which volume counts. depth_of: the depth of a genome's
    recipe.
    """

    hopeless = False

    def __init__(
        self,
        spec: Spec,
        *,
        coordinates: Sequence[Coordinate],
        base: Sequence[Scores],
        order: Sequence[int],
        loss_on: Callable[[Sequence[int]], FrontLoss],
        reference: Array,
        seed: np.random.SeedSequence,
        depth_of: Callable[[Genome], float] = lambda genome: 0.0,
    ) -> None:
        self._spec, self._order, self._loss_on, self._reference = spec, tuple(order), loss_on, reference
        tasks = loss_on(order).tasks
        self._depth_of = depth_of
        self._observed = Observed(tasks, base)
        self._surrogate = Surrogate(coordinates, self._observed.outputs, tasks=len(tasks))
        own, region = seed.spawn(2)
        self._generator = np.random.default_rng(own)
        self._region = TrustRegion(coordinates, seed=region)
        self._active = min(spec.blocks, len(order))
        self._known: dict[bytes, tuple[Genome, dict[int, Array]]] = {}
        self._losses: dict[tuple[bytes, int], Array] = {}
        self._predicted: Array | None = None
        self._pairs: list[tuple[Array, Array]] = []
        self._promised, self._proposed = 0.0, 0
        self._generation = self._told = 0

    @property
    def blocks(self) -> tuple[int, ...]:
        """The item blocks that the next generation is scored on, in order."""
        return self._order[: self._active]

    @property
    def correlation(self) -> float | None:
        """Spearman's rank correlation of predictions with what was measured, the mean of the objectives'."""
        if len(self._pairs) < WINDOW:
            return None
        predicted, measured = (np.array(part) for part in zip(*self._pairs[-WINDOW:], strict=True))
        found = [
            float(scipy.stats.spearmanr(p, m).statistic)
            for p, m in zip(predicted.T, measured.T, strict=True)
            if np.ptp(p) > 0 and np.ptp(m) > 0
        ]
        return float(np.mean(found)) if found else 0.0

    def ask(self, optimizer: Optimizer) -> Asked:
        """Return the next generation: of proposals and the optimizer's own those that promise most."""
        self._predicted, self._promised, self._proposed = None, 0.0, 0
        front, losses = self._front()
        tune = self._generation % TUNED_EVERY == 1
        self._generation += 1
        ready = len(front) > 0 and self._told >= SCATTERED
        model = self._surrogate.fit(front[0], self.blocks, tune=tune) if ready else None
        if model is None or not self.trusted:
            genomes = optimizer.ask()
            if model is not None:
                self._predicted = self._draws(model, genomes).mean(axis=0)
            return Asked(genomes=genomes)
        size = optimizer.population
        proposals = self._proposals(model, front, losses, round(self._spec.share * size))
        if len(proposals):
            optimizer.inject(proposals)
        pool = optimizer.ask(self._spec.oversample * size)
        draws = self._draws(model, pool)
        fresh = [i for i, genome in enumerate(pool) if genome.tobytes() not in self._known]
        required = list(optimizer.required)
        rows = [i for i in fresh if i not in required]
        wanted = size - len(required)
        rows += [i for i in range(len(pool)) if i not in rows and i not in required][: wanted - len(rows)]
        picked, self._promised = most_improving(draws[:, rows], losses, self._reference, wanted)
        chosen = (*required, *(rows[i] for i in picked))
        self._predicted = draws.mean(axis=0)[list(chosen)]
        self._proposed = sum(i < len(proposals) for i in chosen)
        return Asked(genomes=pool[list(chosen)], chosen=chosen)

    def tell(self, genomes: Array, results: Sequence[Scores | None], losses: Array) -> list[Genome]:
        """Learn from a scored generation; return genomes that should be scored on `blocks` now, if any.

        results: None where a candidate failed. losses: not used.
        """
        before = volume(self._front()[1], self._reference)
        self._told += len(genomes)
        for genome, scores in zip(genomes, results, strict=True):
            if scores is not None:
                self.learn(genome, scores)
        if self._predicted is not None:
            for genome, predicted in zip(genomes, self._predicted, strict=True):
                measured = self._loss(genome, self.blocks)
                if measured is not None:
                    self._pairs.append((predicted, measured))
        if not self._promised:
            return []
        after = volume(self._front()[1], self._reference)
        self._region.learn(
            before=-before,
            promised=[-before - self._promised],
            reached=[-after],
            radii=[self._region.radius],
        )
        if not self._region.collapsed or self._active == len(self._order):
            return []
        again = self.survivors()
        self._active = min(2 * self._active, len(self._order))
        self._region.reset()
        self._pairs.clear()
        return again

    def unseen(self) -> None:
        """Return None: the front is scored on further items only when blocks are added, and at the end."""

    def doubted(self, genome: Genome) -> list[Genome]:
        """Return no genomes, as `unseen` names none."""
        return []

    def survivors(self) -> list[Genome]:
        """Return the genomes that the front is made of, by what the surrogate makes of their scores.

        On few items a front is made of lucky candidates, too; their neighbours tell.
        """
        blocks = self.blocks
        known = [g for g, _ in self._known.values() if self._loss(g, blocks) is not None]
        if not known:
            return []
        model = self._surrogate.fit(self._front()[0][0], blocks, tune=False)
        losses = np.array([self._loss(g, blocks) for g in known])
        if model is not None:
            with threadpool_limits(1):
                losses = (losses + self._expected(model, known)) / 2
        return [known[i] for i in spread_out(losses, self._reference, SURVIVORS)]

    def state(self) -> GuideState:
        """Return the state after the last generation, for the store and the report."""
        return GuideState(
            correlation=self.correlation,
            proposed=self._proposed,
            blocks=self._active,
            radius=self._region.radius,
        )

    def estimates(self, genomes: Sequence[Genome]) -> None:
        """Return None: there is no one loss to estimate."""

    def _proposals(self, model: Model, front: list[Genome], losses: Array, count: int) -> Array:
        """Return up to `count` genomes where descents ended, each with other weights of the objectives."""
        found: list[Genome] = []
        taken = set(self._known)
        loss = self._loss_on(self.blocks)
        ideal = np.minimum(losses.min(axis=0), self._reference - 1e-9)
        for start in range(0, count, len(LADDER)):
            weights = self._generator.dirichlet(np.ones(len(self._reference)))
            scalar = loss.scalar(weights, ideal, self._reference)
            centre = front[int(np.argmin(scalar.of_losses(losses)))]
            wanted = min(len(LADDER), count - start)
            for genome in self._region.propose(model, scalar, centre, wanted, known=taken).genomes:
                found.append(genome)
                taken.add(genome.tobytes())
        return np.array(found).reshape(-1, len(front[0]))

    def _draws(self, model: Model, genomes: Sequence[Genome] | Array) -> Array:
        """Return (draws, n, objectives) losses of genomes, from the same normal numbers every time."""
        loss = self._loss_on(self.blocks)
        normals = np.random.default_rng(0).standard_normal((DRAWS, len(genomes), len(loss.tasks)))
        with threadpool_limits(1):
            return loss(model.draws(genomes, normals), self._depths(genomes))

    def _expected(self, model: Model, genomes: Sequence[Genome]) -> Array:
        return self._loss_on(self.blocks)(model.values(genomes), self._depths(genomes))

    def _depths(self, genomes: Sequence[Genome] | Array) -> Array:
        return np.array([self._depth_of(genome) for genome in genomes])

    def _front(self) -> tuple[list[Genome], Array]:
        """Return the genomes that nothing known on the blocks in use dominates, and their losses."""
        pairs = [
            (g, loss) for g, _ in self._known.values() if (loss := self._loss(g, self.blocks)) is not None
        ]
        losses = np.array([loss for _, loss in pairs]).reshape(-1, len(self._reference))
        rows = np.flatnonzero(undominated(losses))
        return [pairs[i][0] for i in rows], losses[rows]

    def _loss(self, genome: Genome, blocks: Sequence[int]) -> Array | None:
        """The measured losses of a genome on blocks, None where it was not scored on all of them."""
        key = np.asarray(genome, dtype=np.float64).tobytes()
        if (key, len(blocks)) not in self._losses:  # blocks are always the first of `order`
            entry = self._known.get(key)
            if entry is None or any(block not in entry[1] for block in blocks):
                return None
            means = self._observed.means(entry[1], blocks)
            self._losses[key, len(blocks)] = self._loss_on(blocks)(means, self._depth_of(entry[0]))
        return self._losses[key, len(blocks)]
