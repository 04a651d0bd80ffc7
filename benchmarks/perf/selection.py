"""Which rule finds the winner that holds up: searches whose truth is known, one after the other.

A model answers an item where a margin is above 0. The margin falls with the squared distance of the genome
from the best one, has the item's own difficulty, and leans its own way: what is good for an item is not good
for all. CMA-ES searches on few items, each rule picks a winner, and many fresh items say what it is worth.

    python benchmarks/perf/selection.py [SEARCHES]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.evaluation.scores import Scores, TaskScores
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.search import selection
from evomerge.search.optimizers.cma_es import CmaEs
from evomerge.search.selection import Candidate
from evomerge.search.spaces.space import Coordinate, Genome

DIMENSION, GENERATIONS, COUNT, FRESH = 12, 30, 8, 20_000


@dataclass(frozen=True)
class Items:
    """Items of one split: their difficulty (n,) and the way each leans (n, dimension)."""

    ease: Any
    lean: Any

    @classmethod
    def draw(cls, rng: np.random.Generator, n: int) -> Items:
        return cls(rng.normal(0.8, 1.0, n), rng.normal(0.0, 1.2, (n, DIMENSION)))

    def scores(self, genome: Genome) -> Scores:
        away = genome - 0.6
        margin = self.ease + self.lean @ away - 6.0 * (away**2).sum()
        task = TaskScores(task="t", metric=margin > 0, smooth=1 / (1 + np.exp(-2 * margin)))
        return Scores(split="search", tasks=(task,))


def loss(scores: Scores) -> float:
    task = scores.tasks[0]
    assert task.smooth is not None
    return -0.7 * task.mean - 0.3 * float(task.smooth.mean())


def recipe(genome: Genome) -> Recipe:
    group = TensorGroup(method="linear", sources=("a",), parameters={"weight": float(f"{genome.sum():.12g}")})
    return Recipe(models={"base": "base", "a": "a"}, base="base", groups=(group,))


def one_search(seed: int, n_search: int, n_select: int) -> dict[str, float]:
    """Run one search; return the worth of every rule's winner on fresh items."""
    rng = np.random.default_rng(seed)
    search, select = Items.draw(rng, n_search), Items.draw(rng, n_select)
    fresh = Items.draw(rng, FRESH)
    optimizer = CmaEs(rng.uniform(0.35, 0.85, DIMENSION), seed=np.random.SeedSequence(seed))

    def candidate(genome: Genome, generation: int) -> Candidate:
        scored = search.scores(genome)
        return Candidate(
            name="", recipe=recipe(genome), loss=loss(scored), genome=genome, generation=generation,
            items=n_search,
        )  # fmt: skip

    found: list[Candidate] = []
    for generation in range(GENERATIONS):
        made = [candidate(u, generation) for u in optimizer.ask()]
        optimizer.tell(np.array([[c.loss] for c in made]))
        found += made
    favourite = candidate(np.array(optimizer.favourite()), GENERATIONS - 1)

    def worth(chosen: Candidate) -> float:
        assert chosen.genome is not None
        return 100 * fresh.scores(chosen.genome).tasks[0].mean

    def on_select(chosen: list[Candidate]) -> Any:
        return np.array([loss(select.scores(c.genome)) for c in chosen if c.genome is not None])

    lucky = selection.finalists(found, COUNT)
    by_loss = sorted(found, key=lambda c: c.loss)[:COUNT]
    believed = selection.finalists(found, COUNT, selection.estimates(found))
    coordinates = [Coordinate()] * DIMENSION
    soup = selection.greedy_soup(believed, coordinates, lambda u: candidate(u, believed[0].generation))
    extra = [c for c in (soup, favourite) if c is not None]
    everyone = believed + extra
    shrunk = selection.estimates([*found, *extra])
    final = np.array([shrunk[found.index(c)] for c in believed] + shrunk[len(found) :].tolist())
    items = (n_search, n_select)
    losses = lambda chosen: np.array([c.loss for c in chosen])  # noqa: E731
    return {
        "lowest search loss": worth(by_loss[0]),
        "lowest estimate": worth(believed[0]),
        "favourite": worth(favourite),
        "soup, else lowest estimate": worth(soup or believed[0]),
        "top k by loss; select": worth(by_loss[int(on_select(by_loss).argmin())]),
        "top k by loss, favourite; select": worth(
            [*by_loss, favourite][int(on_select([*by_loss, favourite]).argmin())]
        ),
        "k by loss, spread, favourite; select": worth(
            [*lucky, favourite][int(on_select([*lucky, favourite]).argmin())]
        ),
        "k by estimate, favourite; select": worth(
            [*believed, favourite][int(on_select([*believed, favourite]).argmin())]
        ),
        "all; select": worth(everyone[int(on_select(everyone).argmin())]),
        "all; both, losses as measured": worth(
            everyone[selection.winner(losses(everyone), on_select(everyone), items=items)]
        ),
        "all; both, search shrunk (ours)": worth(
            everyone[selection.winner(final, on_select(everyone), items=items)]
        ),
        "best of all finalists (unknowable)": max(map(worth, everyone)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("searches", type=int, nargs="?", default=100, help="number of simulated searches")
    searches = parser.parse_args().searches
    for sizes in ((60, 60), (150, 100), (150, 300), (500, 300)):
        rows = [one_search(seed, *sizes) for seed in range(searches)]
        print(
            f"{sizes[0]} search and {sizes[1]} select items, {searches} searches: worth in %, standard error"
        )
        ours = np.array([row["all; both, search shrunk (ours)"] for row in rows])
        for rule in rows[0]:
            values = np.array([row[rule] for row in rows])
            behind = values - ours
            error = behind.std() / np.sqrt(searches)
            print(f"  {rule:40} {values.mean():6.2f}   against ours {behind.mean():+.2f} +-{error:.2f}")


if __name__ == "__main__":
    main()
