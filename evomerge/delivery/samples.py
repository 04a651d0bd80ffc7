"""Questions and answers of a run's items, side by side (`evomerge samples`, `show --items`, the report page).

All of it is in the store: what an item asks is stored when a run first scores it, and what a model generates
is stored with its scores, cut to `stored_text` characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evomerge.delivery import export, style
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, nearest
from evomerge.evaluation.scores import SPLITS, Question, Scores, Split
from evomerge.running.store import ID
from evomerge.search.ports import Named
from evomerge.text import printable

RIGHT = 1.0
"""The metric of a right answer; below it `--wrong` counts an item as wrong."""
PROMPT, ANSWER = 600, 1200
"""How many characters of a prompt (its end) and of an answer (its start) the terminal shows."""
ON_PAGE = 3
"""Items per task and direction on the report's page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One model's result on one item: its scores, and what it generated (None where nothing is stored)."""

    model: str
    metric: float
    smooth: float | None
    margin: float | None
    tokens: float | None
    texts: Sequence[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One item with the answers of one or two models. question: None where the run did not store it."""

    block: int
    item: int
    question: Question | None
    answers: tuple[Answer, ...]

    @property
    def wrong(self) -> bool:
        """Whether the first model's answer is not right."""
        return self.answers[0].metric < RIGHT

    @property
    def lead(self) -> float:
        """The second model's metric minus the first's; 0 for one model."""
        return self.answers[-1].metric - self.answers[0].metric

    def as_data(self) -> dict[str, Any]:
        """Return the item as plain data."""
        asked = self.question
        return {
            "block": self.block,
            "item": self.item,
            "prompt": None if asked is None else asked.prompt,
            "choices": [] if asked is None else list(asked.choices),
            "right": [] if asked is None else list(asked.right),
            "answers": [
                {
                    "model": answer.model,
                    "metric": answer.metric,
                    "smooth": answer.smooth,
                    "margin": answer.margin,
                    "tokens": answer.tokens,
                    "texts": None if answer.texts is None else list(answer.texts),
                }
                for answer in self.answers
            ],
        }


def items(
    summary: Summary, models: Sequence[Named], task: str, split: Split | None
) -> tuple[Split, list[Sample]]:
    """Return the split and the items of a task that all of some models are scored on, in item order.

    Args:
        summary: of the run.
        models: one or two of its recipes.
        task: the name of a task of the suite.
        split: None takes the last split on which all of them are scored.

    Raises:
        ConfigError: there is no such task, or no such scores.
    """
    tasks = [entry.task for entry in summary.suite.tasks]
    if task not in tasks:
        raise ConfigError(f"no task {task!r} in this run", fix=nearest(task, tasks))
    blocks = {name: _common(summary, models, task, name) for name in ((split,) if split else SPLITS)}
    scored = [name for name, parts in blocks.items() if parts]
    chosen = split or (scored[-1] if scored else None)
    if chosen is None or chosen not in scored:
        who = " and ".join(named.recipe.hash[:ID] for named in models)
        raise ConfigError(
            f"{who}: no scores of {task} on {chosen or 'any split'}",
            expected=f"a split among {', '.join(scored)}" if scored else "a candidate that was scored",
        )
    return chosen, [
        Sample(
            block=block,
            item=item,
            question=questions[item] if item < len(questions) else None,
            answers=tuple(
                _answer(named.name, scores, task, item) for named, scores in zip(models, parts, strict=True)
            ),
        )
        for block, parts in blocks[chosen]
        for questions in (summary.store.questions(chosen, block).get(task, []),)
        for item in range(len(parts[0][task].metric))
    ]


def _common(
    summary: Summary, models: Sequence[Named], task: str, split: Split
) -> list[tuple[int, list[Scores]]]:
    """Return (block, each model's scores) of the blocks on which all models are scored."""
    blocks = []
    for block in range(summary.store.blocks(split)):
        results = [summary.store.result(named.recipe.hash, split, block) for named in models]
        parts = [result for result in results if isinstance(result, Scores)]
        if len(parts) == len(models) and any(scores.task == task for scores in parts[0]):
            blocks.append((block, parts))
    return blocks


def _answer(model: str, scores: Scores, task: str, item: int) -> Answer:
    row = scores[task]
    smooth, margin, tokens = (
        None if values is None else float(values[item]) for values in (row.smooth, row.margin, row.tokens)
    )
    return Answer(
        model=model,
        metric=float(row.metric[item]),
        smooth=smooth,
        margin=margin,
        tokens=tokens,
        texts=None if row.texts is None else row.texts[item],
    )


def as_data(
    summary: Summary,
    pick: str,
    task: str,
    *,
    against: str | None = None,
    split: Split | None = None,
    wrong: bool = False,
    limit: int = 0,
) -> dict[str, Any]:
    """Return the items of a task with one or two candidates' answers, as plain data (`samples --json`).

    Args:
        summary: of the run.
        pick: the start of a candidate's recipe hash, or a row of the report.
        task: the task whose items are listed.
        against: a second candidate; the items on which it is better than the first come first.
        split: of the items; None takes the last one that all are scored on.
        wrong: list only items that the first candidate answers wrong.
        limit: the largest number of items; 0 lists all.

    Raises:
        ConfigError: there is no such candidate, task or score, or the task has no right answers.
    """
    models = [export.find(summary, name) for name in (pick, against) if name is not None]
    where, found = items(summary, models, task, split)
    role = summary.suite[task].role
    if wrong and role != "skill":
        raise ConfigError(f"--wrong: {task} has no wrong answers, because it measures {role}")
    listed = [sample for sample in found if sample.wrong] if wrong else found
    if against is not None:
        listed = sorted(listed, key=lambda sample: -sample.lead)
    return {
        "task": task,
        "split": where,
        "models": [{"name": named.name, "id": named.recipe.hash[:ID]} for named in models],
        "items": len(found),
        "listed": len(listed),
        "samples": [sample.as_data() for sample in (listed[:limit] if limit else listed)],
    }


def text(data: dict[str, Any]) -> RenderableType:
    """Return the data of `as_data` for a rich console: one block of lines per item."""
    names = " against ".join(f"{model['name']} ({model['id']})" for model in data["models"])
    shown, listed, total = len(data["samples"]), data["listed"], data["items"]
    counts = f"{shown} of {listed} items" if listed == total else f"{shown} of {listed} items, of {total}"
    parts: list[RenderableType] = [
        Text(f"{data['task']} on {data['split']}: {names}, {counts}", style="bold")
    ]
    for sample in data["samples"]:
        parts += [Text(f"\nblock {sample['block']}, item {sample['item']}", style="bold"), _block(sample)]
    if any(sample["prompt"] is None for sample in data["samples"]):
        parts.append(Text("prompts are not stored in this run (stored_text, or an older version)"))
    return Group(*parts)


def _block(sample: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2), expand=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    if sample["prompt"] is not None:
        table.add_row("prompt", _tail(sample["prompt"], PROMPT))
        if sample["choices"]:
            table.add_row("choices", _head(" / ".join(map(str.strip, sample["choices"])), ANSWER))
        if sample["right"]:
            table.add_row("right", _head(" / ".join(map(str.strip, sample["right"])), ANSWER))
    for answer in sample["answers"]:
        numbers = f"metric {style.decimal(answer['metric'])}"
        if answer["margin"] is not None:
            numbers += f", margin {style.decimal(answer['margin'], 2)} nats"
        if answer["tokens"] is not None:
            numbers += f", {answer['tokens']:g} tokens"
        good = answer["metric"] >= RIGHT
        table.add_row(answer["model"], Text(numbers, style="green" if good else "yellow"))
        for answered in answer["texts"] or ():
            table.add_row("", _head(answered, ANSWER) if answered.strip() else Text("(empty)", style="dim"))
    return table


def _head(text: str, characters: int) -> Text:
    shown = printable(text)
    return Text(shown if len(shown) <= characters else f"{shown[:characters]} ...")


def _tail(text: str, characters: int) -> Text:
    shown = printable(text)
    return Text(shown if len(shown) <= characters else f"... {shown[-characters:]}")


def on_page(summary: Summary, rival: str | None) -> list[tuple[str, list[Sample]]]:
    """Return items of the tasks that generate, for the report: those on which winner and rival differ.

    Args:
        summary: of the run.
        rival: name of the row that the winner is compared with, None without any.

    Returns:
        Task -> its samples: first those that only the rival answers right, then those that only the winner
        does; where none differ, the first wrong ones. Empty without a winner.
    """
    if summary.winner is None or rival is None:
        return []
    models = [Named(name="winner", recipe=summary.winner.recipe), export.find(summary, rival)]
    sections = []
    for entry in summary.suite.of("test"):
        if not _common(summary, models, entry.task, "test"):
            continue
        _, found = items(summary, models, entry.task, "test")
        if entry.role != "skill" or found[0].answers[0].texts is None:
            continue
        lost = [sample for sample in found if sample.lead > 0][:ON_PAGE]
        won = [sample for sample in found if sample.lead < 0][:ON_PAGE]
        chosen = lost + won or [sample for sample in found if sample.wrong][:ON_PAGE]
        if chosen:
            sections.append((style.short_task(entry.task, summary.suite.name), chosen))
    return sections
