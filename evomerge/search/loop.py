"""The run, from references to winner: one deterministic path from generation 0.

The loop does not know whether it is fresh or resumed. It always starts at the beginning; the scorer
answers from the store what is already scored there and executes only the rest, and the journal compares
each ask and tell with what is stored. So an interrupted run ends in the same bits as an unbroken one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np

from evomerge.errors import UserError
from evomerge.evaluation.gains import dud_sentences, find_gains, refuse_nothing, trusts
from evomerge.evaluation.normalise import Normaliser
from evomerge.evaluation.scores import Scores, Split
from evomerge.merging.recipe import Recipe
from evomerge.search import baselines, pareto
from evomerge.search.companions import companions, taught, without
from evomerge.search.descent import Descent, StepLosses, descend
from evomerge.search.generations import Generations
from evomerge.search.ledger import Ledger
from evomerge.search.objective import Objective, check_tokens
from evomerge.search.optimizers import Optimizer, create
from evomerge.search.plan import Outcome, ScoredRecipe, SearchPlan
from evomerge.search.ports import (
    CandidateScorer,
    GradientSource,
    Journal,
    Named,
    SearchBudget,
    SearchObserver,
)
from evomerge.search.racing import RacingSpec, Views, block_order, race
from evomerge.search.selection import Candidate
from evomerge.search.spaces.movement import stretched
from evomerge.search.spaces.space import Genome, continuous
from evomerge.search.stacks import Outlook, ScoredStacks, score_stacks
from evomerge.search.stream import Stream
from evomerge.search.surrogate.front_guide import FrontGuide, small
from evomerge.search.surrogate.guide import Guide, MeanLoss, generation_price
from evomerge.search.surrogate.improvement import FrontLoss
from evomerge.search.warm_start import GradientSpec, automatic, distinct
from evomerge.search.winner import GRADIENT_START, Selection

WORTHWHILE = 100
"""Evaluations of a budget below which a search does not look whether it could end early: there is too little
to save, and the looks cost it a generation."""
_OPTIMIZER, _GRADIENTS, _GUIDE = (0,), (7,), (11,)
"""Spawn keys of the run's seed, one per component."""


class Search:
    """One run: references, baselines, warm starts, generations, selection, test.

    slopes: needed only for a plan with gradients. ahead: receives the recipes that will certainly be scored
    later, so that idle workers can begin; the search reads their scores only when it is due. guard: called
    before a winner is declared, and again when it is scored; raises where the run's inputs changed. workers:
    how many score at a time.
    """

    def __init__(
        self,
        plan: SearchPlan,
        *,
        scorer: CandidateScorer,
        journal: Journal,
        budget: SearchBudget,
        observer: SearchObserver,
        slopes: GradientSource | None = None,
        ahead: Callable[[Sequence[Recipe], Split], None] = lambda recipes, split: None,
        guard: Callable[[], None] = lambda: None,
        workers: int = 1,
    ) -> None:
        self._plan, self._scorer, self._journal, self._budget = plan, scorer, journal, budget
        self._observer = observer
        self._slopes = slopes
        self._ahead, self._guard_inputs, self._workers = ahead, guard, workers
        self._parents = baselines.parents(plan.template, plan.space.sources)
        self._duds: tuple[str, ...] = ()
        self._trust: dict[str, float] | None = None
        self._dropped: tuple[str, ...] = ()  # tasks whose companion is not used
        self._counted_tasks: tuple[str, ...] = ()
        self._standard: Named | None = None  # the merge that sets the floors
        self._unlimited: Named | None = None  # the best by the mean alone
        self._descended = False  # whether the search begins where gradients led
        self._sated = False  # whether gradients got a budget whose rest pays for no generation
        self._stacks = ScoredStacks(best=None)

    def run(self) -> Outcome:
        """Search, pick the winner on `select`, and score it with all references on `test`."""
        for position, parent in enumerate(self._parents):
            self._journal.record_entry("parent" if position else "base", max(position - 1, 0), parent)
        references = self._first_references()
        self._foresee(self._parents, "select", "test")
        objective = self._objective(references)
        parents = self._known(objective, self._parents, "base and parents")
        hand_made = self._score_baselines(objective, parents)
        if self._drop_companions([*parents, *hand_made]):
            references = self._references("search")
            objective = self._objective(references)
            parents, hand_made = (self._again(objective, known) for known in (parents, hand_made))
        tested = self._tested(hand_made)
        objective = self._floored(objective, hand_made)
        parents, hand_made = (self._again(objective, known) for known in (parents, hand_made))
        self._foresee([k.named for k in tested], "test")
        if objective.count > 1:
            self._foresee([k.named for k in hand_made], "select")
        self._measure()
        starts, spent = self._score_starts(objective, [*hand_made, *parents[1:]])
        self._foresee([k.named for k in starts], "test")
        winner, stopped = self._searched(objective, parents, hand_made, starts, spent)
        self._guard_inputs()
        self._journal.record_entry("winner", 0, winner)
        if self._unlimited is not None:
            self._journal.record_entry("unlimited", 0, self._unlimited)
        self._journal.trim_entries("unlimited", int(self._unlimited is not None))
        self._scorer.require([*self._parents, winner], "test", "test")
        compared = [k.named for k in (*starts, *tested)]
        compared += [self._unlimited] if self._unlimited is not None else []
        self._scorer.score([named.recipe for named in compared], "test", "test of the baselines")
        self._guard_inputs()
        return Outcome(winner=winner, stopped=stopped)

    def _searched(
        self,
        objective: Objective,
        parents: Sequence[ScoredRecipe],
        hand_made: Sequence[ScoredRecipe],
        starts: Sequence[ScoredRecipe],
        spent: int,
    ) -> tuple[Named, str]:
        """Run the generations; return the winner, and why there was no further generation.

        spent: what the starts have cost, in items.
        """
        views, order, ledger = self._blocks(objective, [*parents, *hand_made], starts)
        ledger.spend(spent)
        known = [*starts, *hand_made]
        archive = self._archive(objective, [*parents, *known]) if objective.count > 1 else None
        is_async = self._plan.optimizer.async_
        by_gradients = self._descended and not is_async
        guide = self._either_guide(views, order, [*parents, *known], archive, descended=by_gradients)
        evolution = (partial(Stream, workers=self._workers) if is_async else Generations)(
            space=self._plan.space,
            optimizer=self._optimizer(guide, objective, [*known, *parents[1:]]),
            scorer=self._scorer,
            journal=self._journal,
            budget=self._budget,
            observer=self._observer,
            views=views,
            ledger=ledger,
            order=order,
            racing=self._racing,
            guide=guide,
            archive=archive,
            counted=self._counted,
            descended=self._descended,
            sated=self._sated,
        )
        searched = evolution.run()
        selection = Selection(
            space=self._plan.space,
            scorer=self._scorer,
            journal=self._journal,
            finalists=self._plan.finalists,
            counted=self._counted,
            on_select=self._objective_on_select,
            ahead=self._ahead,
        )
        if archive is None:
            begun = [self._start(k, views(searched.blocks)) for k in starts]
            winner, self._unlimited = selection.best(begun, searched, views)
        else:
            winner = selection.on_front(
                archive,
                searched.blocks,
                views(searched.blocks),
                parents=[k.named.recipe for k in parents],
                hand_made=[k.named.recipe for k in hand_made],
            )
        return winner, searched.stopped

    def _optimizer(
        self, guide: Guide | FrontGuide | None, objective: Objective, known: Sequence[ScoredRecipe]
    ) -> Optimizer:
        return create(
            small(self._plan.optimizer) if isinstance(guide, FrontGuide) else self._plan.optimizer,
            coordinates=self._plan.space.coordinates,
            objectives=objective.count,
            starts=self._starts(known),
            seed=self._seed(_OPTIMIZER),
        )

    @property
    def _continuous(self) -> bool:
        """Whether gradients can move all coordinates of the space."""
        return continuous(self._plan.space.coordinates)

    @property
    def _racing(self) -> RacingSpec:
        """The plan's racing; no candidate leaves early where the objective is not a mean over items."""
        if self._plan.objective.items_decide:
            return self._plan.racing
        return self._plan.racing.model_copy(update={"keep": 1.0})

    def _foresee(self, named: Sequence[Named], *splits: Split) -> None:
        for split in splits:
            self._ahead([entry.recipe for entry in named], split)

    # -- before the first generation ----------------------------------------------------------------

    def _seed(self, stream: tuple[int, ...]) -> np.random.SeedSequence:
        return np.random.SeedSequence(self._plan.seed, spawn_key=stream)

    def _scored_parents(self, split: Split) -> tuple[Scores, dict[str, Scores]]:
        scores = self._scorer.require(self._parents, split, "base and parents")
        base, *others = (without(one, self._dropped) for one in scores)
        return base, {p.name: s for p, s in zip(self._parents[1:], others, strict=True)}

    def _first_references(self) -> Normaliser:
        """Return the scale of `search`; announce specialists that are no better than the base."""
        base, parents = self._scored_parents("search")
        gains = find_gains(self._plan.suite, base=base, parents=parents)
        if not self._plan.weak:
            refuse_nothing(gains)
        for sentence in dud_sentences(gains):
            self._observer.noted(f"note: {sentence}")
        self._duds = tuple(gain.task for gain in gains if not gain.shown)
        self._trust = trusts(gains, self._plan.weighting)
        references = self._references("search")
        check_tokens(self._plan.objective, generates=references.tokens(base) is not None)
        self._counted_tasks = references.counted
        return references

    def _references(self, split: Split) -> Normaliser:
        """Score base and parents, the references of the normalisation."""
        base, parents = self._scored_parents(split)
        return Normaliser(
            self._plan.suite,
            base=base,
            parents=parents,
            duds=self._duds,
            trust=self._trust,
            tokens_of=self._plan.objective.tokens_of,
        )

    def _objective(self, references: Normaliser) -> Objective:
        return Objective(self._plan.objective, references, layers=self._plan.layers)

    def _known(self, objective: Objective, named: Sequence[Named], phase: str) -> list[ScoredRecipe]:
        """Score recipes on all `search` items; leave out failures."""
        if not named:
            return []
        recipes = [entry.recipe for entry in named]
        results = self._scorer.score(recipes, "search", phase)
        losses = objective.scalar_losses(results, recipes)
        return [
            ScoredRecipe(named=entry, scores=result, loss=float(loss), genome=self._expressed(entry))
            for entry, result, loss in zip(named, results, losses, strict=True)
            if isinstance(result, Scores)
        ]

    def _drop_companions(self, known: Sequence[ScoredRecipe]) -> bool:
        """Announce how well companions rank the first models; drop those that don't, and say whether any."""
        found = companions(self._plan.suite, [k.scores for k in known])
        for companion in found:
            self._observer.noted(f"note: {companion.sentence}")
        self._dropped = tuple(companion.task for companion in found if companion.dropped)
        return bool(self._dropped)

    def _floored(self, objective: Objective, hand_made: Sequence[ScoredRecipe]) -> Objective:
        """Return the objective with the floors that the best hand-made merge sets."""
        if not hand_made:
            return objective
        best = min(hand_made, key=lambda k: k.loss)
        floored = objective.above(best.named.name, best.scores)
        if floored.standard is not None:
            self._standard = best.named
            self._journal.record_entry("standard", 0, best.named)
        return floored

    def _again(self, objective: Objective, known: Sequence[ScoredRecipe]) -> list[ScoredRecipe]:
        """Return scored recipes with their losses by another objective."""
        losses = objective.scalar_losses([k.scores for k in known], [k.named.recipe for k in known])
        return [replace(k, loss=float(loss)) for k, loss in zip(known, losses, strict=True)]

    def _expressed(self, named: Named) -> Genome | None:
        """Return the genome of a recipe, or of one with the same weights; None where the space has none."""
        space, template = self._plan.space, self._plan.template
        genome = space.encode(named.recipe)
        if genome is None and named in self._parents:
            same = baselines.as_task_vectors(template, space.sources, named.name)
            genome = space.encode(same)
        return genome

    def _score_baselines(self, objective: Objective, parents: Sequence[ScoredRecipe]) -> list[ScoredRecipe]:
        """Score the hand-made merges on `search`."""
        plan = self._plan
        rows = baselines.hand_made(plan.template, plan.space.sources, plan.norms)
        rows = [row for row in rows if row.name in plan.baselines]
        scored = self._known(objective, self._raced(objective, rows), "baselines")

        def loss_of(recipe: Recipe) -> float:
            results = self._scorer.score([recipe], "search", "greedy soup")
            return float(objective.scalar_losses(results, [recipe])[0])

        if baselines.SOUP not in plan.baselines:
            for position, row in enumerate(rows):
                self._journal.record_entry("baseline", position, row)
            return scored
        soup = baselines.greedy_soup(
            plan.template, plan.space.sources, {k.named.name: k.loss for k in parents[1:]}, loss_of
        )
        for position, row in enumerate([*rows, soup]):
            self._journal.record_entry("baseline", position, row)
        return [*scored, *self._known(objective, [soup], "greedy soup")]

    def _raced(self, objective: Objective, rows: Sequence[Named]) -> Sequence[Named]:
        """Return the baselines that do not leave a race early; all of them where they are not raced."""
        spec = self._racing
        if not self._plan.baselines.short or spec.count == 1 or objective.count > 1 or not rows:
            return rows
        result = race(
            [row.recipe for row in rows],
            scorer=self._scorer,
            views=self._views(objective),
            spec=spec,
            order=range(spec.count),
            phase="baselines",
        )
        return [row for row, complete in zip(rows, result.complete, strict=True) if complete]

    def _views(self, objective: Objective) -> Views:
        """Return the objective on any item blocks."""
        base, blocks = [self._parents[0].recipe], range(self._plan.racing.count)
        parts = [self._scorer.score(base, "search", "baselines", [block])[0] for block in blocks]
        bases = [without(cast(Scores, part), self._dropped) for part in parts]
        return Views(objective, bases, self._standard_scores(blocks))

    def _tested(self, hand_made: Sequence[ScoredRecipe]) -> list[ScoredRecipe]:
        """Return the baselines that are scored on `test`."""
        if not self._plan.baselines.short:
            return list(hand_made)
        return sorted(hand_made, key=lambda known: known.loss)[: baselines.TESTED]

    def _score_starts(
        self, objective: Objective, known: Sequence[ScoredRecipe]
    ) -> tuple[list[ScoredRecipe], int]:
        """Score warm starts, stacks and the ends of gradients; leave out failures. Also return the items."""
        warm = self._plan.warm
        starts, spent = self._known(objective, list(warm.recipes), "warm start"), 0
        if (spec := self._gradient_spec()) is not None:
            descent = self._descend(objective, [*known, *starts], spec)
            ends = [descent.last, descent.mean]
            reached = [Named(name=GRADIENT_START, recipe=self._plan.space.decode(u)) for u in ends]
            for position, end in enumerate(distinct(reached)):
                self._journal.record_entry("descent", position, end)
            self._journal.trim_entries("descent", len(distinct(reached)))
            scored = self._known(objective, distinct(reached), GRADIENT_START)
            starts += sorted(scored, key=lambda k: k.loss)[:1]
            spent = descent.items + sum(k.scores.items for k in scored)
            self._descended = spent > 0
            self._sated &= descent.failure is None and len(descent.losses) == spec.steps and bool(scored)
        if self._plan.stacks:
            found = self._score_stacks(objective, [*known, *starts])
            spent += self._stacks.items + sum(k.scores.items for k in found)
            starts = [*starts, *found]
        for position, start in enumerate(starts):
            self._journal.record_entry("start", position, start.named)
        return starts, spent

    def _score_stacks(self, objective: Objective, known: Sequence[ScoredRecipe]) -> list[ScoredRecipe]:
        """Score hand-made stacks; return the best. With stacks the search may be given up early."""
        ranked = [k.named.name for k in sorted(known, key=lambda k: k.loss) if k.named in self._parents]
        views, (space, cost) = self._views(objective), (self._plan.space, self._plan.stacks)
        self._stacks = score_stacks(space, ranked, scorer=self._scorer, views=views, cost=cost)
        if (best := self._stacks.best) is None:
            return []
        found = self._known(objective, [best], "stacks")
        means = {k.named.name: objective.mean(k.scores) for k in (*known, *found)}
        sizes = {"full": sum(views.sizes), "population": self._plan.population}
        outlook = Outlook(self._budget, self._observer, means=means, stack=best.name, **sizes)
        self._observer = self._budget = outlook
        return found

    def _measure(self) -> None:
        """Score base and parents on the other splits before the search, where the clock ends it.

        Their time tells the budget how much to keep for selection and test. No decision reads these scores.
        """
        if self._budget.timed:
            for split in ("select", "test"):
                self._scorer.require(self._parents, split, "base and parents")

    def _gradient_spec(self) -> GradientSpec | None:
        """Return how to follow gradients, with the number of steps; None where none are followed."""
        warm, spec = self._plan.warm, self._plan.warm.gradients
        if spec is None or not warm.automatic:
            return spec
        base, _ = self._scored_parents("search")
        if all(base[task].margin is None for task in self._counted_tasks) and not taught(
            self._plan.suite, base, self._counted_tasks
        ):
            return None
        allowed = self._budget.evaluations(base.items, self._plan.population)
        smallest = min(len(base[task].metric) for task in self._counted_tasks)
        plan = self._plan
        paid = self._budget.evaluations(base.items, sys.maxsize)  # by all limits but that in generations
        price = generation_price(
            plan.space.coordinates,
            plan.population,
            plan.racing.count,
            plan.surrogate,
            dispensable=paid == allowed and not plan.objective.several and not plan.optimizer.async_,
        )
        decided = automatic(spec, allowed, smallest, price) or spec.model_copy(update={"steps": 0})
        steps, share = self._journal.record_descent(decided.steps, decided.share)
        if not steps:
            return None
        spec = spec.model_copy(update={"steps": steps, "share": share})
        self._sated = not spec.leaves(price, allowed)
        return spec

    def _descend(self, objective: Objective, known: Sequence[ScoredRecipe], spec: GradientSpec) -> Descent:
        """Follow the gradient of the objective from the best scored point."""
        assert self._slopes is not None
        # What an earlier session had no time for stays undone once the search has begun.
        self._slopes.not_after = 0.0 if self._journal.has_ask(0) else self._budget.deadline()
        base, _ = self._scored_parents("search")
        followed = taught(self._plan.suite, base, self._counted_tasks)
        if all(base[task].margin is None for task in objective.normaliser.counted) and not followed:
            raise UserError(
                "warm_start.gradients: no task on `search` has answers with a likelihood",
                expected="at least one loglikelihood or multiple_choice task: others have no gradient",
                fix="set warm_start.gradients: off",
            )
        expressed = [k for k in known if k.genome is not None]
        best = min(expressed, key=lambda k: k.loss, default=None)
        losses = StepLosses(
            objective,
            base=base,
            start=base if best is None else best.scores,
            spec=spec,
            price=self._plan.objective.retention,
            least=self._plan.objective.constraints.retention,
            seeds=self._seed(_GRADIENTS).spawn(spec.steps),
            taught=followed,
        )
        start = self._starts(known)[0]
        return descend(self._plan.space, start, spec, losses, self._slopes, losses.learn)

    def _starts(self, known: Sequence[ScoredRecipe]) -> list[Genome]:
        """Return the genomes of recipes scored before the search, best first.

        The middle of the space where it can express none of them.
        """
        ranked = sorted(known, key=lambda k: k.loss)
        genomes = {k.genome.tobytes(): k.genome for k in ranked if k.genome is not None}
        return list(genomes.values()) or [np.full(self._plan.space.dimension, 0.5)]

    def _blocks(
        self, objective: Objective, unsearched: Sequence[ScoredRecipe], starts: Sequence[ScoredRecipe]
    ) -> tuple[Views, tuple[int, ...], Ledger]:
        """Return the objective on each item block, the order to score them in, and the ledger of the search.

        Recipes scored before the first generation are read from the store and cost nothing.
        """
        blocks = range(self._plan.racing.count)
        recipes = [k.named.recipe for k in unsearched]
        parts = [self._scorer.score(recipes, "search", "baselines", [block]) for block in blocks]
        views = self._views(objective)
        ledger = Ledger(views.sizes)
        for entry in (*unsearched, *starts):
            ledger.give(entry.named.recipe.hash, blocks)
        if objective.count > 1:
            return views, tuple(blocks), ledger
        return (
            views,
            block_order(views, cast(list[tuple[Scores, ...]], list(zip(*parts, strict=True)))),
            ledger,
        )

    def _standard_scores(self, blocks: Sequence[int]) -> list[Scores]:
        """Return what the merge that sets the floors scores on each block; nothing without floors."""
        if self._standard is None:
            return []
        recipes = [self._standard.recipe]
        parts = [self._scorer.score(recipes, "search", "baselines", [block])[0] for block in blocks]
        return cast(list[Scores], parts)

    def _guide(self, views: Views, order: Sequence[int], known: Sequence[ScoredRecipe]) -> Guide | None:
        """Return the guide, fitted to all recipes scored before the search; None without a surrogate."""
        plan = self._plan
        if plan.surrogate is None or not plan.objective.items_decide:
            return None
        whole = views(views.blocks)

        def loss_on(blocks: Sequence[int]) -> MeanLoss:
            return MeanLoss(views(blocks).normaliser, plan.objective, whole.utility)

        guide = Guide(
            plan.surrogate,
            coordinates=stretched(plan.space.coordinates, plan.movements),
            base=views.base,
            order=order,
            loss_on=loss_on,
            seed=self._seed(_GUIDE),
            standard=whole.standard,
        )
        for entry in known:
            if entry.genome is not None:
                guide.learn(entry.genome, entry.scores)
        guide.begin()
        for genome, scores in self._stacks.examples:
            guide.learn(genome, without(scores, self._dropped))
        return guide

    def _either_guide(
        self,
        views: Views,
        order: Sequence[int],
        known: Sequence[ScoredRecipe],
        archive: pareto.Archive | None,
        *,
        descended: bool,
    ) -> Guide | FrontGuide | None:
        """Return the guide for one objective, or that for several, if there is any."""
        if archive is None:
            single = self._guide(views, order, known)
            if single is not None and descended and self._continuous:
                # Generations of so many candidates: a limit in generations alone never counts as small.
                allowed = self._budget.evaluations(sum(views.sizes), WORTHWHILE)
                single.frugal = self._journal.record_frugal(allowed is None or allowed >= WORTHWHILE)
            return single
        plan = self._plan
        if plan.surrogate is None or not plan.surrogate.front or not plan.objective.items_decide_front:
            return None
        whole = views(views.blocks)
        guide = FrontGuide(
            plan.surrogate,
            coordinates=stretched(plan.space.coordinates, plan.movements),
            base=views.base,
            order=order,
            loss_on=lambda blocks: FrontLoss(views(blocks).normaliser, plan.objective),
            reference=archive.reference,
            seed=self._seed(_GUIDE),
            depth_of=lambda genome: whole.depth(plan.space.decode(genome)),
        )
        for entry in known:
            if entry.genome is not None:
                guide.learn(entry.genome, entry.scores)
        return guide

    # -- after the last generation -------------------------------------------------------------------

    def _start(self, known: ScoredRecipe, objective: Objective) -> Candidate:
        """Return a warm start as a candidate for the winner selection."""
        blocks = objective.normaliser.blocks
        (result,) = self._scorer.score([known.named.recipe], "search", "warm start", blocks)
        assert isinstance(result, Scores)
        return Candidate(
            name=known.named.name,
            recipe=known.named.recipe,
            loss=float(objective.losses([result], [known.named.recipe])[0, 0]),
            genome=known.genome,
            generation=-1,
            items=self._counted(result),
        )

    def _counted(self, scores: Scores) -> int:
        """Return how many items the mean is computed from."""
        return sum(len(task.metric) for task in scores if task.task in self._counted_tasks)

    def _objective_on_select(self) -> Objective:
        """Return the objective on `select`, with the floors of the same merge as on `search`."""
        objective = self._objective(self._references("select"))
        if self._standard is None:
            return objective
        (standard,) = self._scorer.score([self._standard.recipe], "select", "selection")
        return objective.above(self._standard.name, standard) if isinstance(standard, Scores) else objective

    def _archive(self, objective: Objective, unsearched: Sequence[ScoredRecipe]) -> pareto.Archive:
        """Return an empty front whose reference point comes from the unsearched recipes."""
        recipes = [k.named.recipe for k in unsearched]
        return pareto.Archive(objective.reference_point([k.scores for k in unsearched], recipes))
