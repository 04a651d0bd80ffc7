"""All candidates as a table: what is stored, by name; importances and genealogy where the answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest

from evomerge.delivery.candidates import CandidateRow, Candidates, GeneOfRun, candidates
from evomerge.delivery.course import Course
from evomerge.delivery.spending import spending
from evomerge.delivery.study import LEAST, as_study, importances
from evomerge.delivery.summary import Summary
from evomerge.running.store import RunStore, facts
from evomerge.stored import StoredRun


@pytest.fixture(scope="module")
def summary(finished_run: Path) -> Summary:
    return Summary(StoredRun(RunStore.read(finished_run)))


def rows(genomes: list[list[float]], means: list[float | None]) -> Candidates:
    return Candidates(
        genes=tuple(GeneOfRun(name=f"g{n}", facts={}) for n in range(len(genomes[0]))),
        rows=tuple(
            CandidateRow(
                recipe=f"{number:04x}",
                generation=number,
                position=0,
                names=(),
                genome=np.array(genome),
                losses=None,
                mean=mean,
                tasks={},
                blocks=1,
                failure="broken" if mean is None else None,
            )
            for number, (genome, mean) in enumerate(zip(genomes, means, strict=True))
        ),
        blocks=1,
    )


def test_every_recipe_that_was_asked_for_is_there_once(summary: Summary) -> None:
    table = candidates(summary, Course(summary))
    asked = [recipe for generation in summary.store.generations() for recipe in generation.recipes]
    assert [row.recipe for row in table.rows] == list(dict.fromkeys(asked))
    course = Course(summary)
    for row in table.rows:
        score = course.score(row.recipe)
        assert row.mean == (None if score is None else score.mean)
        assert set(row.tasks) >= {"demo_reverse", "demo_upper"}
    assert [gene.name for gene in table.genes] == ["weight upper", "weight reverse"]


def test_values_of_genes_are_those_of_the_recipe(summary: Summary) -> None:
    table = candidates(summary, Course(summary))
    row = table.rows[-1]
    recipe = summary.store.recipe(row.recipe)
    stored = recipe.groups[0].parameters["weight"]
    assert isinstance(stored, tuple)
    by_source = dict(zip(recipe.groups[0].sources, stored, strict=True))
    for gene, u in zip(table.genes, row.genome, strict=True):
        assert gene.value(float(u)) == by_source[gene.name.split()[-1]]


def test_runs_that_did_not_store_their_genes_have_numbers(
    summary: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "GENES", facts.Fact("no such", list, "prepare", "nothing"))
    table = candidates(summary, Course(summary))
    assert [gene.name for gene in table.genes] == ["gene 0", "gene 1"]
    assert table.genes[0].value(0.25) == 0.25


def test_the_gene_that_decides_is_the_most_important_one() -> None:
    rng = np.random.default_rng(1)
    genomes = rng.random((200, 6))
    means: list[float | None] = [-((u[4] - 0.7) ** 2) + 0.01 * float(rng.normal()) for u in genomes]
    found = importances(rows(genomes.tolist(), means))
    assert found[0][0] == 4
    assert found[0][1] > 0.5
    assert sum(share for _, share in found) == pytest.approx(1)


def test_few_candidates_have_no_importances() -> None:
    assert importances(rows([[0.1]] * (LEAST - 1), [0.0] * (LEAST - 1))) == []


def test_a_study_has_every_candidate_and_failures_as_failed_trials() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = as_study(rows([[0.1], [0.2], [0.3]], [0.5, None, 0.7]), optuna.create_study(direction="maximize"))
    assert [trial.value for trial in study.trials] == [0.5, None, 0.7]
    assert study.best_trial.user_attrs["recipe"] == "0002"
    assert study.trials[1].state is optuna.trial.TrialState.FAIL


def test_the_genealogy_goes_from_record_to_nearest_record() -> None:
    table = rows([[0.0], [1.0], [0.1], [0.9], [0.95]], [0.1, 0.2, 0.05, 0.3, 0.4])
    assert [row.recipe for row in table.genealogy("0004")] == ["0004", "0003", "0001", "0000"]
    assert table.genealogy("ffff") == []


def test_what_was_spent_adds_up(summary: Summary) -> None:
    spent = spending(summary)
    by_part = {part.part: part.items for part in spent.parts}
    store = summary.store
    total = 0
    for split in ("search", "select", "test"):
        for recipe, blocks in store.scored_blocks(split).items():  # type: ignore[arg-type]
            total += sum(store.result(recipe, split, block).items for block in blocks)  # type: ignore[union-attr, arg-type]
    assert sum(by_part.values()) == total + store.gradient_items()
    assert spent.cost is None
    assert spent.hours > 0
