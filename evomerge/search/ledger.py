"""The ledger of a search: what it has had scored so far, in items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Ledger:
    """Counts the `search` items scored for a search; an item block of a recipe is paid for once.

    sizes: number of items of each block, all tasks together.

    >>> ledger = Ledger([10, 11])
    >>> ledger.give("a", (0, 1))  # a baseline
    >>> ledger.charge([("a", (0, 1)), ("b", (0,)), ("b", (0,)), ("c", (0, 1))])
    31
    >>> ledger.items, round(ledger.evaluations, 2)
    (31, 1.48)
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.items = 0
        """Items charged so far."""
        self._paid: set[tuple[str, int]] = set()

    @property
    def full(self) -> int:
        """The items of one full evaluation: all blocks."""
        return sum(self.sizes)

    @property
    def evaluations(self) -> float:
        """What was charged so far, in full evaluations."""
        return self.items / self.full

    def spend(self, items: int) -> None:
        """Charge items that no candidate was scored on: those of gradients."""
        self.items += items

    def give(self, recipe: str, blocks: Iterable[int]) -> None:
        """Note blocks of a recipe (by hash) that the search need not pay for."""
        self._paid.update((recipe, block) for block in blocks)

    def charge(self, scored: Iterable[tuple[str, Iterable[int]]]) -> int:
        """Charge a generation's recipes (by hash) with the blocks they were scored on; return its items.

        A generation costs at least a block, so that a search that only repeats itself ends, too.
        """
        new = self._new(scored)
        self._paid |= new
        cost = max(sum(self.sizes[block] for _, block in new), *self.sizes)
        self.items += cost
        return cost

    def price(self, scored: Iterable[tuple[str, Iterable[int]]]) -> int:
        """Return the items that are not paid for yet, of recipes (by hash) on blocks."""
        return sum(self.sizes[block] for _, block in self._new(scored))

    def _new(self, scored: Iterable[tuple[str, Iterable[int]]]) -> set[tuple[str, int]]:
        return {(recipe, block) for recipe, blocks in scored for block in blocks} - self._paid
