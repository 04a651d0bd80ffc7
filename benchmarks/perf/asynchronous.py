"""What a search without generations finds, per evaluation, beside one with generations.

    python benchmarks/perf/asynchronous.py --evaluations 35,60,150 --workers 1,4,16,64 --seeds 8

On the landscape of the tests (tests/search/test_guided_loop.py): two tasks of 60 items whose margins depend
on the genome, item by item. Printed is how far right answers are ahead at the winner; 2.5 is the best there
is. Of as many candidates as there are workers, whichever is drawn is done next. With generations there is no
difference between numbers of workers. `--plain` is without the surrogate.
Not covered: models; see `ours-async` in search.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from evomerge.search.loop import Search
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.plan import SearchPlan
from evomerge.search.racing import RacingSpec
from evomerge.search.surrogate.guide import SurrogateSpec
from tests.search.fakes import SUITE, Quiet
from tests.search.test_guided_loop import BLOCKS, FULL, SPACE, Items, level
from tests.search.test_stream import Crew


def found(workers: int | None, evaluations: int, seed: int, *, plain: bool) -> float:
    """Return the level of the winner of a search; workers: None for one with generations."""
    crew = Crew(workers or 1, seed=seed)
    outcome = Search(
        SearchPlan(
            suite=SUITE,
            space=SPACE,
            template=SPACE.decode(np.full(SPACE.dimension, 0.5)),
            norms={"a": 1.0, "b": 1.0},
            optimizer=OptimizerSpec.model_validate({"async": workers is not None}),
            objective=ObjectiveSpec(),
            racing=RacingSpec(blocks=BLOCKS),
            surrogate=None if plain else SurrogateSpec(),
            finalists=3,
            seed=seed,
        ),
        scorer=crew,
        journal=crew.journal,
        budget=Items(evaluations * FULL),
        observer=Quiet(),
        workers=crew.workers,
    ).run()
    genome = SPACE.encode(outcome.winner.recipe)
    assert genome is not None
    return level(genome)


def main() -> None:
    """Print medians over seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--evaluations", default="35,60,150")
    parser.add_argument("--workers", default="1,4,16,64")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    budgets = [int(number) for number in given.evaluations.split(",")]
    print("| search | " + " | ".join(f"{budget} evaluations" for budget in budgets) + " |")
    print("|---|" + "---|" * len(budgets))
    for workers in (None, *map(int, given.workers.split(","))):
        medians = [
            np.median([found(workers, budget, seed, plain=given.plain) for seed in range(given.seeds)])
            for budget in budgets
        ]
        name = "generations" if workers is None else f"async, {workers} worker{'s' * (workers > 1)}"
        print(f"| {name} | " + " | ".join(f"{median:.3f}" for median in medians) + " |", flush=True)


if __name__ == "__main__":
    main()
