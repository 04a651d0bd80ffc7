"""The report as a page that needs no network, and its charts as files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.delivery import figures, objectives, samples, share_card
from evomerge.delivery.candidates import CandidateRow, Candidates, candidates, most_important
from evomerge.delivery.charts.chart import Chart, png
from evomerge.delivery.course import Convergence, Course
from evomerge.delivery.guidance import Guidance, guidance
from evomerge.delivery.notes import notes, stop_sentence
from evomerge.delivery.objectives import Front
from evomerge.delivery.page import Served, render
from evomerge.delivery.spending import Spending, spending
from evomerge.delivery.study import importances
from evomerge.delivery.style import short_task
from evomerge.delivery.summary import Claim, Row, Summary
from evomerge.files import drafted_file
from evomerge.running import forward
from evomerge.running.store import ID, facts

DETAILED, GENES = 2000, 12
"""Candidates a page has details of, and genes of each: more would make it heavy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """What page and files show of a run, computed once. found: importances of genes.

    detailed: the candidates with details on the page: all, or the best and the finalists of very many.
    """

    summary: Summary
    course: Course
    rows: list[Row]
    table: Candidates
    detailed: list[CandidateRow]
    convergence: Convergence
    spent: Spending
    found: list[tuple[int, float]]
    front: Front | None
    surrogate: Guidance | None

    @classmethod
    def of(cls, summary: Summary) -> _Contents:
        course = Course(summary)
        table = candidates(summary, course)
        return cls(
            summary=summary,
            course=course,
            rows=summary.rows(),
            table=table,
            detailed=_detailed(table),
            convergence=course.convergence(),
            spent=spending(summary),
            found=importances(table),
            front=objectives.front(summary),
            surrogate=guidance(summary.store),
        )

    @property
    def unasked_winner(self) -> tuple[str, float] | None:
        """Name and score on `search` of a winner that no generation asked for; None where one did."""
        winner = self.summary.winner
        if winner is None or self.table.find(winner.recipe.hash) is not None:
            return None
        score = self.course.score(winner.recipe.hash)
        return None if score is None else (winner.name, score.mean)

    @property
    def genealogy(self) -> list[CandidateRow]:
        """How the search got to the winner, or to the best finalist where nothing asked for the winner."""
        winner = self.summary.winner
        if winner is None:
            return []
        if self.table.find(winner.recipe.hash) is not None:
            return self.table.genealogy(winner.recipe.hash)
        asked = [f for f in self.course.finalists() if self.table.find(f.recipe) is not None]
        best = max(asked, key=lambda f: f.search or 0.0, default=None)
        return [] if best is None else self.table.genealogy(best.recipe)

    def charts(self) -> dict[str, Chart]:
        """Return all charts that the run has data for, by id."""
        summary, rows, convergence = self.summary, self.rows, self.convergence
        detailed = self.detailed
        shown = Candidates(genes=self.table.genes, rows=tuple(detailed), blocks=self.table.blocks)
        keys = {row.recipe: number for number, row in enumerate(detailed)}
        drawn: dict[str, Chart | None] = {
            "tasks": figures.tasks_figure(summary, rows),
            "outcomes": figures.outcomes_figure(summary, summary.best_baseline(rows)),
            "candidates": figures.candidates_figure(shown, keys, convergence, self.unasked_winner),
            "convergence": figures.convergence_figure(convergence),
            "task_curves": figures.task_curves_figure(self.table, summary),
            "importance": figures.importance_figure(self.table, self.found),
            "parallel": figures.parallel_figure(shown, self.found, keys),
            "genome": None if summary.winner is None else figures.genome_figure(summary.winner.recipe),
            "surrogate": None if self.surrogate is None else figures.surrogate_figure(self.surrogate),
            "hypervolume": None if self.front is None else figures.hypervolume_figure(self.front),
            "spending": figures.spending_figure(self.spent),
        }
        fronts = {} if self.front is None else figures.front_figures(self.front)
        return {name: chart for name, chart in drawn.items() if chart is not None} | fronts

    def details(self) -> dict[str, Any] | None:
        """Return the details of candidates that charts point to, as plain data for the page's script."""
        rows = self.detailed
        if not rows:
            return None
        genes = most_important(self.table, self.found, GENES)
        tasks = [task for task in self.summary.shown_tasks if task.task in rows[0].tasks]
        return {
            "run": shlex.quote(str(self.summary.store.folder)),
            "blocks": self.table.blocks,
            "genes": [self.table.genes[gene].name for gene in genes],
            "more": len(self.table.genes) - len(genes),
            "tasks": [short_task(task.task, self.summary.suite.name) for task in tasks],
            "rows": [
                [
                    row.recipe[:ID],
                    row.generation,
                    round(100 * (row.mean or 0.0), 1),
                    row.blocks,
                    list(row.names),
                    [round(100 * row.tasks[task.task], 1) for task in tasks],
                    [_short(self.table.genes[gene].value(float(row.genome[gene]))) for gene in genes],
                ]
                for row in rows
            ],
        }


def _detailed(table: Candidates) -> list[CandidateRow]:
    rows = table.scored
    if len(rows) <= DETAILED:
        return rows
    best = sorted(rows, key=lambda row: (bool(row.names), row.mean or 0.0))[-DETAILED:]
    kept = {row.recipe for row in best}
    return [row for row in rows if row.recipe in kept]


def write_html(summary: Summary, out: Path) -> Path:
    """Write the report as one HTML file with everything inside, charts included.

    Args:
        summary: of a finished or unfinished run.
        out: the file to write; an existing one is replaced.

    Returns:
        `out`.

    Raises:
        DiskError: the disk can't take it.
    """
    return _write(out, page(summary).encode())


def page(summary: Summary, live: Served | None = None) -> str:
    """Return the report of a finished or unfinished run as one HTML page; live: what a served one needs."""
    contents = _Contents.of(summary)
    store, course, rows = summary.store, contents.course, contents.rows
    best = summary.best_baseline(rows)
    winner = summary.winner
    details = contents.details()
    if details is not None and live is not None:
        details["page"] = f"{live.run}/candidate"
    return render(
        "report.html.jinja",
        figures=contents.charts(),
        details=details,
        live=live,
        running=store.held() and not facts.STOPPED.get(store),
        summary=summary,
        rows=_ordered(rows, best),
        best=best,
        verdict=summary.verdict(rows),
        weakest=summary.weakest(rows),
        claims=_claims_by_task(summary, summary.claims(rows)),
        shares=summary.shares(rows),
        samples=samples.on_page(summary, best.name if best else None),
        optimism=course.optimism(),
        notes=notes(summary),
        cost=course.cost(),
        spending=contents.spent,
        finalists=course.finalists(),
        genealogy=contents.genealogy,
        asked=contents.unasked_winner is None,
        candidates=len(contents.table),
        detailed=len(contents.detailed),
        convergence=contents.convergence,
        evaluations=course.evaluations(),
        surrogate=contents.surrogate,
        front=contents.front,
        lengths=objectives.lengths(summary),
        failures=store.failures(),
        tasks=[(task.task, short_task(task.task, summary.suite.name)) for task in summary.shown_tasks],
        config=json.dumps(facts.CONFIG.require(store), indent=2),
        versions=store.versions(),
        passes=forward.stored(store),
        stopped=stop_sentence(store),
        folder=store.folder,
        command=shlex.quote(str(store.folder)),
        winner_yaml=winner.recipe.to_yaml() if winner else None,
    )


def write_figures(summary: Summary, folder: Path) -> list[Path]:
    """Write every chart of the report as SVG, PNG and CSV, and a card of 1200 x 630 pixels to share.

    Args:
        summary: of a finished or unfinished run.
        folder: where the files go; it is made where it is missing, and files of the same names are replaced.

    Returns:
        The files.

    Raises:
        DiskError: the disk can't take them.
    """
    written = []
    for name, chart in _Contents.of(summary).charts().items():
        svg = chart.file()
        forms: Mapping[str, bytes] = {
            "svg": svg.encode(),
            "png": png(svg),
            "csv": chart.csv().encode(),
        }
        written += [_write(folder / f"{name}.{suffix}", content) for suffix, content in forms.items()]
    if (card := share_card.svg(summary)) is not None:
        written.append(_write(folder / "card.svg", card.encode()))
        written.append(_write(folder / "card.png", png(card, scale=1)))
    return written


def _write(path: Path, content: bytes) -> Path:
    with drafted_file(path) as draft:
        draft.write_bytes(content)
    return path


def _ordered(rows: Sequence[Row], best: Row | None) -> list[Row]:
    """Return the rows as the page lists them: the winner and the best baseline first."""
    return sorted(rows, key=lambda row: 0 if row.role == "winner" else 1 if row is best else 2)


def _short(value: float | int | bool | str) -> float | int | bool | str:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _claims_by_task(summary: Summary, claims: Sequence[Claim]) -> list[tuple[str, list[Claim]]]:
    """Group claims by what they compare: the mean first, then task by task."""
    groups: dict[str | None, list[Claim]] = {}
    for claim in claims:
        groups.setdefault(claim.task, []).append(claim)
    return [
        ("mean" if task is None else short_task(task, summary.suite.name), group)
        for task, group in groups.items()
    ]
