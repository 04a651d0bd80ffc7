"""Stored runs: what is in them, and exports from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from evomerge.api.gates import Gate
from evomerge.api.view import View
from evomerge.delivery import (
    candidate,
    candidates,
    objectives,
    report,
    report_page,
    rescore,
    samples,
    status,
)
from evomerge.delivery import compare as compare_delivery
from evomerge.delivery import export as export_delivery
from evomerge.delivery import gate as gates
from evomerge.delivery import predict as predict_delivery
from evomerge.delivery.course import Course
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, nearest
from evomerge.evaluation.permissions import NOTHING, Permissions
from evomerge.evaluation.scores import SPLITS, Scores, named_split
from evomerge.merging.export.adapter import AdapterReport
from evomerge.merging.recipe import Recipe
from evomerge.prepare import prepare
from evomerge.running.store import ID, facts
from evomerge.stored import StoredRun

if TYPE_CHECKING:
    from pandas import DataFrame

AnyPath = str | PathLike[str]
LOSS = 0.02
"""Raw score that an adapter may lose on a task without a warning."""
FORMS = ("model", "adapter", "recipe", "mergekit")
"""What `Run.export` writes."""


def load(folder: AnyPath) -> Run:
    """Open a run folder for reading, also while a process works on it.

    Raises:
        UserError: there is no run, or its store is damaged.
    """
    run = Run(folder)
    with run.opened():
        return run


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner:
    """The winner of a run.

    id: start of its recipe's hash. mean, low, high: normalised score on `test` with its 95 % interval,
    0 = base, 1 = specialists. tasks: raw score per task there.
    """

    name: str
    id: str
    recipe: Recipe
    mean: float
    low: float
    high: float
    tasks: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What an export wrote.

    equal: whether the weights are those that were scored on `test`, bit for bit; None where they were not
    compared. scores: of an adapter, per task those of merge and adapter on `test`. notes: what the user
    should know.
    """

    place: Path
    name: str
    recipe: str
    equal: bool | None = None
    scores: tuple[tuple[str, float, float], ...] = ()
    adapter: AdapterReport | None = None
    comparison: Table | None = None
    no_mergekit: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def loss(self) -> str | None:
        """What an adapter lost of the merge, as a sentence; None where no task lost LOSS or more."""
        lost = [(task, merge, adapter) for task, merge, adapter in self.scores if merge - adapter >= LOSS]
        if not lost:
            return None
        tasks = ", ".join(f"{task} {100 * a:.0f} instead of {100 * m:.0f}" for task, m, a in lost)
        fix = "a larger --rank keeps more; --as model keeps all"
        return f"the adapter is worse than the merge on `test`: {tasks} ({fix})"


class Report(View):
    """The report of a run. Besides the text it has a page, and charts as files."""

    def __init__(self, data: Any, draw: Callable[[int], Any], folder: Path) -> None:
        super().__init__(data, draw)
        self._folder = folder

    def page(self) -> str:
        """Return the page as HTML that needs no network."""
        with StoredRun.read(self._folder) as stored:
            return report_page.page(Summary(stored))

    def save(self, path: AnyPath | None = None) -> Path:
        """Write the page and return its path; None is RUN/report.html."""
        out = self._folder / "report.html" if path is None else Path(path)
        with StoredRun.read(self._folder) as stored:
            return report_page.write_html(Summary(stored), out)

    def figures(self, folder: AnyPath) -> list[Path]:
        """Write every chart as SVG, PNG and CSV, and a card to share; return the files."""
        with StoredRun.read(self._folder) as stored:
            return report_page.write_figures(Summary(stored), Path(folder))


class Run:
    """A stored run. Every method reads the store anew, so a run that goes on can be watched.

    Attributes:
        folder: the run folder.

    Example:
        >>> def look(folder: str) -> None:
        ...     run = load(folder)
        ...     print(run.winner)
        ...     frame = run.candidates()
        ...     print(run.scores("winner"))
    """

    def __init__(self, folder: AnyPath) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @contextmanager
    def opened(self) -> Iterator[Summary]:
        """Yield the summary of the run with its store open."""
        with StoredRun.read(self.folder) as stored:
            yield Summary(stored)

    @property
    def config(self) -> dict[str, Any]:
        """The config that the run was begun with, as plain data."""
        with self.opened() as summary:
            return facts.CONFIG.require(summary.store)

    @property
    def stopped(self) -> str | None:
        """Why the search ended; None while it goes on."""
        with self.opened() as summary:
            return facts.STOPPED.get(summary.store)

    @property
    def winner(self) -> Winner | None:
        """The winner; None before the run has ended."""
        with self.opened() as summary:
            row = next((row for row in summary.rows() if row.role == "winner"), None)
            if row is None or summary.winner is None:
                return None
            return Winner(
                name=row.name,
                id=row.recipe[:ID],
                recipe=summary.winner.recipe,
                mean=row.mean.estimate,
                low=row.mean.low,
                high=row.mean.high,
                tasks={task: interval.estimate for task, interval in row.tasks.items()},
            )

    def candidates(self) -> DataFrame | list[dict[str, Any]]:
        """Return all candidates in the order they were asked for.

        Returns:
            A pandas DataFrame where pandas is installed, else a list of dicts. Columns: `id`, `recipe`
            (hash), `generation`, `names`, `mean` (normalised, on the item blocks it was scored on),
            `blocks` (their
            number), `losses`, `failure`, `task NAME` for each skill, and one per gene.
        """
        with self.opened() as summary:
            table = candidates.candidates(summary, Course(summary))
        rows = [
            {
                "id": row.recipe[:ID],
                "recipe": row.recipe,
                "generation": row.generation,
                "names": list(row.names),
                "mean": row.mean,
                "blocks": row.blocks,
                "losses": None if row.losses is None else list(row.losses),
                "failure": row.failure,
                **{f"task {task}": value for task, value in row.tasks.items()},
                **{gene.name: gene.value(float(u)) for gene, u in zip(table.genes, row.genome, strict=True)},
            }
            for row in table.rows
        ]
        return _frame(rows)

    def front(self) -> DataFrame | list[dict[str, Any]]:
        """Return the Pareto front of a run with several objectives, on `select`.

        Returns:
            One row per recipe scored there: `name`, `role`, `recipe`, `on_front`, and the value of each
            objective, higher is better; a DataFrame where pandas is installed.

        Raises:
            ConfigError: the run has one objective.
        """
        with self.opened() as summary:
            found = objectives.front(summary)
        if found is None:
            raise ConfigError(
                f"{self.folder}: has one objective, so there is no front",
                fix="a run with objective: {several: [...]} has one",
            )
        return _frame(
            [
                {
                    "name": point.name,
                    "role": point.role,
                    "recipe": point.recipe,
                    "on_front": point.on_front,
                    **dict(zip(found.objectives, point.values, strict=True)),
                }
                for point in found.points
            ]
        )

    def scores(self, pick: str = "winner", split: str | None = None) -> dict[str, NDArray[np.float64]]:
        """Return the scores of a candidate, item by item.

        Args:
            pick: "winner", "best-baseline", a row of the report, or the start of a recipe hash.
            split: "search", "select" or "test"; None takes the last one on which all items are scored.

        Returns:
            Task -> the metric of each item, shape (items,), in the same order for all candidates.

        Raises:
            ConfigError: there is no such candidate, or it is not scored there.
        """
        with self.opened() as summary:
            named = export_delivery.find(summary, pick)
            chosen = SPLITS[::-1] if split is None else (named_split(split),)
            for name in chosen:
                found = summary.store.result(named.recipe.hash, name)
                if isinstance(found, Scores):
                    return {scores.task: scores.metric.copy() for scores in found}
        raise ConfigError(f"{pick}: not scored on all items of {split or 'any split'}")

    def status(self) -> View:
        """Return the progress of the run."""
        with self.opened() as summary:
            data = status.as_data(summary)
        return View(data, lambda width: status.text(data))

    def show(self, pick: str, *, items: str | None = None, split: str | None = None) -> View:
        """Return one candidate: recipe, scores, times and failures; items: a task shown item by item."""
        chosen = None if split is None else named_split(split)
        with self.opened() as summary:
            data = candidate.as_data(summary, pick, items=items, split=chosen)
        return View(data, lambda width: candidate.text(data))

    def samples(
        self,
        pick: str,
        task: str,
        *,
        against: str | None = None,
        split: str | None = None,
        wrong: bool = False,
        limit: int = 10,
    ) -> View:
        """Return prompts, right answers and what candidates answered.

        Args:
            pick, against: candidates, as in `scores`; items on which `against` is better come first.
            task: whose items are shown.
            split: None takes the last one that all are scored on.
            wrong: only items that `pick` answers wrong.
            limit: the largest number of items; 0 lists all.
        """
        chosen = None if split is None else named_split(split)
        with self.opened() as summary:
            data = samples.as_data(
                summary, pick, task, against=against, split=chosen, wrong=wrong, limit=limit
            )
        return View(data, lambda width: samples.text(data))

    def report(self) -> Report:
        """Return the report: tables, verdict, page and charts."""
        with self.opened() as summary:
            data = report.as_data(summary)

        def draw(width: int) -> Any:
            with self.opened() as summary:
                return report.terminal(summary, width=width)

        return Report(data, draw, self.folder)

    def gate(self, rules: AnyPath) -> Gate:
        """Check the winner against the rules of a gate file."""
        loaded = gates.GateRules.load(Path(rules))
        with self.opened() as summary:
            return Gate(gates.check(loaded, summary), summary.suite.name)

    def check_export(self) -> Path:
        """Export the winner into the run folder, load it back with transformers, and compare its scores.

        Returns:
            The model's folder.

        Raises:
            UserError: its scores on `test` are not those that were stored, in every item.
        """
        with self.opened() as summary:
            return export_delivery.check_winner(summary)

    def predict(self, recipe: AnyPath) -> View:
        """Predict the score of a merge from the run's scores; nothing is merged.

        Args:
            recipe: a recipe.yaml, a mergekit YAML, or the start of a recipe hash of the run.
        """
        with StoredRun.read(self.folder) as stored:
            prepared = prepare(stored.config())
            found = predict_delivery.predict(Summary(stored), prepared, str(recipe))
        return View(predict_delivery.as_data(found), lambda width: predict_delivery.text(found))

    def export(
        self,
        out: AnyPath,
        *,
        pick: str = "winner",
        form: str = "model",
        rank: int | None = None,
        keep_rest: bool = False,
        max_shard_bytes: int | None = None,
        accept_difference: bool = False,
        permissions: Permissions = NOTHING,
    ) -> Written:
        """Write a recipe of the run: as a model, a LoRA adapter, or a YAML file.

        Args:
            out: the folder to write, which must be new or empty; the file, for YAML.
            pick: "winner", "best-baseline", "knee", "best:TASK", "weights:TASK=0.7,OTHER=0.3", a row of the
                report, or the start of a recipe hash.
            form: "model", "adapter", "recipe" or "mergekit".
            rank, keep_rest: of an adapter: its largest rank per layer, and whether tensors that a LoRA can't
                express are stored as a whole.
            max_shard_bytes: of the files of a model.
            accept_difference: write weights that differ from those that were scored.
            permissions: which code of the tasks may run; an adapter is scored.

        Raises:
            UserError: it can't be written, or models changed since the run.
        """
        if form not in FORMS:
            raise ConfigError(f"form {form!r}: no such form", fix=nearest(form, FORMS))
        place = Path(out)
        with self.opened() as summary:
            if form == "adapter":
                return _adapter(summary, place, pick, rank, keep_rest, permissions)
            if form != "model":
                text = export_delivery.export_text(summary, place, pick=pick, form=form)
                return Written(place=place, name=text.name, recipe=text.recipe.hash)
            done = export_delivery.export(
                summary,
                place,
                pick=pick,
                accept_difference=accept_difference,
                max_shard_bytes=max_shard_bytes,
            )
        return Written(
            place=done.folder,
            name=done.pick.name,
            recipe=done.pick.recipe.hash,
            equal=done.equal,
            no_mergekit=done.no_mergekit,
            notes=done.notes,
        )


def _adapter(
    summary: Summary,
    place: Path,
    pick: str,
    rank: int | None,
    keep_rest: bool,
    permissions: Permissions,
) -> Written:
    made = export_delivery.export_adapter(
        summary, place, pick=pick, rank=rank, keep_rest=keep_rest, permissions=permissions
    )
    return Written(
        place=place,
        name=made.pick.name,
        recipe=made.pick.recipe.hash,
        scores=tuple(made.rows()),
        adapter=made.report,
        comparison=rescore.comparison(made),
        notes=tuple(made.notes),
    )


class Compared(View):
    """Runs compared with each other. gate: the results of a gate's rules, None where none was asked for."""

    def __init__(self, found: compare_delivery.Comparison, results: list[gates.RuleResult] | None) -> None:
        super().__init__(found.as_data(), lambda width: compare_delivery.terminal(found))
        self.gate = None if results is None else Gate(results, found.suite)


def compare(folders: Sequence[AnyPath], *, gate: AnyPath | None = None) -> Compared:
    """Compare finished runs on shared `test` items: seeds of one config, or configs with the first one.

    Args:
        folders: run folders.
        gate: a file of rules, by which the last run's winner is checked against the first one's.

    Raises:
        UserError: a run is not finished, or their items differ.
    """
    rules = None if gate is None else gates.GateRules.load(Path(gate))
    with compare_delivery.opened([Path(folder) for folder in folders]) as summaries:
        found = compare_delivery.compare(summaries)
        results = None if rules is None else gates.check(rules, summaries[-1], reference=summaries[0])
    return Compared(found, results)


def _frame(rows: list[dict[str, Any]]) -> DataFrame | list[dict[str, Any]]:
    """Return rows as a DataFrame where pandas is installed."""
    try:
        import pandas
    except ImportError:
        return rows
    return pandas.DataFrame(rows)
