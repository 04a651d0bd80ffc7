"""Batch sizes in force: the number of requests per forward pass, for each item block of a run.

The last bits of scores depend on the requests that share a forward pass, so the batch size belongs to a run.
It starts as `executor.batch_size` everywhere. Where a candidate runs out of memory on a block, the size for
that block is halved, once and for the rest of the run. The decision is stored in the transaction that drops
the outdated scores. The search then starts again: it reads all other scores from the store and scores the
dropped ones again. So candidates that are compared were scored with equal batch sizes:

- on `select` and `test`: the scores of all recipes on the split are dropped;
- on `search` before the first generation: those of base, parents, baselines and warm starts;
- on `search` later: those of the current generation. Earlier generations keep their scores, because later
  genomes depend on them; they differ in the last bits only.

A second time out of memory, or one at batch size 1, is that candidate's failure. A resumed run takes the
sizes from the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from evomerge.evaluation.scores import Failure, Split
from evomerge.running.store import RunStore, StoreReader, facts
from evomerge.running.worker import Result, WorkerSpec

T = TypeVar("T")
GRADIENTS = "gradients"
"""Stands in place of a split for the passes of a gradient start, which have a batch size of their own."""


class Halved(Exception):  # noqa: N818  # no error: the search goes on from the store
    """A batch size was halved and scores were dropped: the search must start again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One halving: from a phase of the run on, a block of a split is scored in batches of `size`.

    everybody: whether all scores on the block were made again.
    """

    split: str
    block: int
    size: int
    before: int
    phase: str
    everybody: bool

    @property
    def sentence(self) -> str:
        """The decision in one line, for readers of the scores."""
        where = "gradients" if self.split == GRADIENTS else f"`{self.split}`"
        if self.split == "search":
            where += f", item block {self.block},"
        alike = f"from {self.phase} on; scores from before differ in their last digits"
        if self.split == GRADIENTS:
            alike = "from then on"
        elif self.everybody:
            alike = "for all alike"
        return f"out of memory: {where} in batches of {self.size} instead of {self.before}, {alike}"


def begun_again(store: RunStore, size: int, search: Callable[[Batches], T]) -> T:
    """Run a search to its end; start it again whenever a batch size was halved.

    size: the batch size the run was started with.
    """
    while True:
        with contextlib.suppress(Halved):
            return search(Batches(store, size))


def decisions(store: StoreReader) -> list[Decision]:
    """Return the halvings of a run by split and block, because their order in time depends on the workers."""
    return [Decision(**row) for row in facts.BATCH_SIZES.get(store) or []]


def sizes_in_force(store: StoreReader, size: int, split: Split, blocks: Iterable[int]) -> dict[int, int]:
    """Return the batch size of each block of a split in a stored run; size: the one it began with."""
    made = decisions(store)
    return {block: _in_force(made, size, split, block) for block in blocks}


class Batches:
    """The batch sizes of a run. size: the one it began with."""

    def __init__(self, store: RunStore, size: int) -> None:
        self._store, self.size = store, size
        self._made = decisions(store)

    def of(self, split: str, block: int = 0) -> int:
        """Return the size in force on a block of a split."""
        return _in_force(self._made, self.size, split, block)

    def sizes(self, split: Split, blocks: Iterable[int]) -> dict[int, int]:
        """Return the sizes in force on some blocks."""
        return {block: self.of(split, block) for block in blocks}

    def may_halve(self, split: str, block: int = 0) -> bool:
        """Say whether the size on a block of a split was not halved yet, and can be."""
        return self.of(split, block) == self.size > 1

    def calls_for_halving(self, result: Result) -> bool:
        """Say whether a result means that a block must be scored in smaller batches."""
        outcome = result.outcome
        if not isinstance(outcome, Failure) or outcome.kind != "out_of_memory" or result.block is None:
            return False
        return self.may_halve(result.job.split, result.block)

    def halve(self, split: Split, new: Mapping[int, Sequence[str]], phase: str) -> None:
        """Halve the size on some blocks and drop the scores that must be made again with it.

        new: block -> recipes (hashes) first scored there in this phase. phase: of the run, as shown.
        """
        everybody = split != "search" or not self._store.has_ask(0)
        self._made += [self._decision(split, block, phase, everybody) for block in new]
        self._store.drop_scores(
            split,
            {block: None if everybody else recipes for block, recipes in new.items()},
            because={facts.BATCH_SIZES: _as_data(self._made)},
        )

    def halve_gradients(self, phase: str) -> None:
        """Halve the size of the gradients still to come."""
        self._made.append(self._decision(GRADIENTS, 0, phase, False))
        facts.BATCH_SIZES.set(self._store, _as_data(self._made))

    def _decision(self, split: str, block: int, phase: str, everybody: bool) -> Decision:
        return Decision(
            split=split,
            block=block,
            size=self.size // 2,
            before=self.size,
            phase=phase,
            everybody=everybody,
        )


def scoring_alike(worker: WorkerSpec, store: StoreReader, split: Literal["select", "test"]) -> WorkerSpec:
    """Return a run's worker with the batch size in force on a split of one block."""
    size = _in_force(decisions(store), worker.batch_size, split, 0)
    return dataclasses.replace(worker, batch_size=size)


def _in_force(made: Sequence[Decision], size: int, split: str, block: int) -> int:
    halved = [decision.size for decision in made if (decision.split, decision.block) == (split, block)]
    return halved[-1] if halved else size


def _as_data(made: Sequence[Decision]) -> list[dict[str, Any]]:
    ordered = sorted(made, key=lambda decision: (decision.split, decision.block))
    return [dataclasses.asdict(decision) for decision in ordered]
