"""The plan of a search, and what it gives: plain records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evomerge.evaluation.scores import Scores
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe
from evomerge.search import baselines
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.ports import Named
from evomerge.search.racing import NO_RACING, RacingSpec
from evomerge.search.spaces.space import Genome, Space
from evomerge.search.surrogate.guide import SurrogateSpec
from evomerge.search.warm_start import WarmStart


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """Everything that determines the search: the same plan and seed end in the same winner.

    template: models, base, dtype, tokenizer and seed of every recipe. norms: task-vector norm per source.
    finalists: how many of the best candidates are scored again on `select`, beside their soup and the
        optimizer's favourite. layers: number of the base model's layers, the unit of the depth objective.
    surrogate: None where the optimizer works alone. population: candidates per generation. baselines: the
        hand-made merges that are scored. weighting: the rule that weights tasks in the mean, see
        `gains.trusts`. weak: whether to go on where hardly any specialist is better than the base.
    movements: what distances between genomes count each coordinate by; None where all count alike.
    stacks: evaluations that hand-made stacks may cost before a search of layer paths.
    """

    suite: Suite
    space: Space
    template: Recipe
    norms: Mapping[str, float]
    optimizer: OptimizerSpec
    objective: ObjectiveSpec
    finalists: int
    seed: int
    racing: RacingSpec = NO_RACING
    surrogate: SurrogateSpec | None = None
    warm: WarmStart = field(default_factory=WarmStart)
    layers: int | None = None
    population: int = 16
    baselines: baselines.Choice = field(default_factory=baselines.Choice)
    weighting: str | None = None
    weak: bool = True
    movements: Sequence[float] | None = None
    stacks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a search ended: the winner, and why there was no further generation."""

    winner: Named
    stopped: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRecipe:
    """A recipe scored on all `search` items before the first generation.

    genome: None where the space can't express it.
    """

    named: Named
    scores: Scores
    loss: float
    genome: Genome | None
