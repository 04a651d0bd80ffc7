"""A new run config (`evomerge init`): models checked, space, suite and budget chosen, and what chose them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge import trial
from evomerge.config import RunConfig
from evomerge.delivery.config_file import annotated, placed
from evomerge.errors import ConfigError, DiskError, UserError
from evomerge.evaluation import own_data
from evomerge.files import drafted_file
from evomerge.merging.analysis.advice import Advised, advise
from evomerge.merging.analysis.interference import measure
from evomerge.prepare import Prepared, prepare
from evomerge.running.clock import shown, span
from evomerge.running.store import BASE

SAMPLE = 20_000_000
"""Elements of each model that are read to choose the search space."""
EVALUATIONS, FEWEST, HOURS = 120, 30, 10.0
"""Full evaluations of a run, the fewest that are worth one, and the hours it should end in."""
PROMPTS = ("prompt", "question", "instruction", "input", "query", "text")
ANSWERS = ("answer", "response", "output", "completion", "target", "reply", "label")
CHOICES = ("choices", "options")
"""Names of columns that are taken for prompts, answers and choices, the first one that a file has."""
ROOM, DEFAULT = 8, 256
"""Tokens that an answer may be longer than the longest right one; and those of a task without a limit."""
FALLBACK = "global_weights"
"""The search space where the advised one does not fit the models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnTask:
    """A data file that becomes a task; None is guessed from the file.

    name: of the task; where a source has it, that source is the task's specialist.
    """

    name: str
    file: Path
    prompt: str | None = None
    answer: str | None = None
    choices: str | None = None
    metric: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A config that was written.

    lines: what was found and chosen. estimate: of the run in seconds, None without a trial. ends: in epoch
    seconds, if it started now.
    """

    path: Path
    lines: tuple[str, ...]
    space: str
    evaluations: int
    estimate: float | None
    ends: float | None

    @property
    def text(self) -> str:
        """What was chosen, and the next command."""
        place = shlex.quote(str(self.path))
        return "\n".join([*self.lines, f"wrote:  {self.path}", f"next:   evomerge run {place}"])

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "config": str(self.path),
            "space": self.space,
            "evaluations": self.evaluations,
            "seconds": self.estimate,
            "ends": self.ends,
            "notes": list(self.lines),
        }


def write(
    base: str,
    sources: Mapping[str, str],
    *,
    suite: str | None = None,
    data: Sequence[OwnTask] = (),
    out: Path,
    run_folder: str | None = None,
    evaluations: int | None = None,
    hours: float | None = None,
    try_out: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> NewRun:
    """Write a run config for some models and a suite, or data of your own.

    Args:
        base, sources: locations of the models; local ones relative to the working directory.
        suite: a preset's name or a file. data: files that become a suite in the config.
        out: the YAML to write, which must not exist.
        run_folder: of the run; None takes `runs/` and the name of `out`.
        evaluations, hours: of the budget; None chooses them by a trial.
        try_out: whether to score two candidates, which tells how long the run takes.
        progress: gets what is being done.

    Raises:
        UserError: models, suite or data have a mistake; nothing is written. Where the run would measure
            hardly anything, the config is written and can be mended.
    """
    _refuse(out, suite, data)
    document = _document(
        {BASE: base, **sources},
        suite if suite is not None else [entry(task, sources, out) for task in data],
        out,
        run_folder,
        {"evaluations": evaluations or EVALUATIONS} | ({} if hours is None else {"hours": hours}),
    )
    progress("reading the models")
    config = _config(document, out)
    prepared = prepare(config)  # refuses what can't work before weights are read
    advised = _advice(config)
    document["space"], prepared = _space(document, out, advised, prepared)
    probe = None
    if try_out:
        progress("scoring base, sources and two candidates")
        probe = trial.probe(prepared)
        if evaluations is None and hours is None:
            prepared, probe = _fitted(document, out, prepared, probe)
    lines = [*_lines(prepared, advised, document, data), _budget(document, probe)]
    with drafted_file(out) as draft:
        text = annotated(document, _comments(lines), "A run config by `evomerge init`.")
        draft.write_text(text, encoding="utf-8")
    _refuse_nothing(prepared, probe, out)
    return NewRun(
        path=out,
        lines=tuple(lines),
        space=document["space"],
        evaluations=document["budget"]["evaluations"],
        estimate=None if probe is None else probe.estimate,
        ends=None if probe is None else probe.ends,
    )


def _refuse_nothing(prepared: Prepared, probe: trial.Probe | None, out: Path) -> None:
    try:
        if probe is not None:
            trial.refuse_nothing(prepared, probe)
    except ConfigError as error:  # what is written can be mended
        raise error.with_more(f"the config to mend is written: {out}") from None


def _refuse(out: Path, suite: str | None, data: Sequence[OwnTask]) -> None:
    if out.exists():
        raise DiskError(f"{out}: exists already", fix="give another file: --out YAML")
    if (suite is None) == (not data):
        raise ConfigError(
            "a run needs something to score on",
            expected="a suite or data of your own, not both",
            fix="give --suite NAME, or --data FILE",
        )


def _document(
    models: Mapping[str, str],
    suite: str | list[dict[str, Any]],
    out: Path,
    run_folder: str | None,
    budget: dict[str, Any],
) -> dict[str, Any]:
    """Return the config as plain data, with the simplest search space. suite: its name, or own tasks."""
    places = {name: placed(location, out) for name, location in models.items()}
    return {
        "models": {"base": places.pop(BASE), "sources": places},
        "space": FALLBACK,
        "suite": suite if isinstance(suite, str) else {"name": out.stem, "tasks": suite},
        "budget": budget,
        "seed": 0,
        "out": run_folder or f"runs/{out.stem}",
    }


def _budget(document: Mapping[str, Any], probe: trial.Probe | None) -> str:
    count = document["budget"]["evaluations"]
    if probe is None or probe.estimate is None or probe.ends is None:
        return f"budget: {count} evaluations; `evomerge check` says how long they take"
    return (
        f"budget: {count} evaluations, about {span(probe.estimate)} on {probe.workers} workers; "
        f"started now it ends about {shown(probe.ends)}"
    )


def guessed(file: Path, **given: str | None) -> dict[str, str]:
    """Return the keys `prompt`, `answer`, `choices` and `metric` of a data file's task.

    Args:
        file: a .jsonl or .csv file.
        **given: keys that are known; None is guessed from the names of the columns and the answers.

    Raises:
        ConfigError: no column has a name that is known.
    """
    columns = own_data.columns_of(file)
    keys = {key: value for key, value in given.items() if value is not None}
    for key, names in (("prompt", PROMPTS), ("answer", ANSWERS), ("choices", CHOICES)):
        found = next((name for name in names if name in columns and name not in keys.values()), None)
        if key in keys or (found is None and key == "choices"):
            continue
        if found is None:
            raise ConfigError(
                f"{file}: which column is the {key}?",
                expected=f"one of {', '.join(names)}",
                got=f"the columns {', '.join(columns)}",
                fix=f"name it: --{key} COLUMN",
            )
        keys[key] = found
    if "choices" in keys:
        keys.setdefault("metric", "choice")
    return {"metric": _metric(file, keys), **keys} if "metric" not in keys else keys


def _metric(file: Path, keys: Mapping[str, str]) -> str:
    """Return the metric that fits the answers of a file: number, json, or exact."""
    columns = own_data.Columns(prompt=keys["prompt"], answer=keys["answer"])
    answers = [item.answer.strip() for item in own_data.read(file, columns, "exact").items]
    if all(_is_number(answer) for answer in answers):
        return "number"
    return "json" if all(_is_json(answer) for answer in answers) else "exact"


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False


def entry(task: OwnTask, sources: Mapping[str, str], out: Path) -> dict[str, Any]:
    """Return a data file as an entry of a suite in the config at `out`; what is not given is guessed."""
    keys = guessed(
        task.file, prompt=task.prompt, answer=task.answer, choices=task.choices, metric=task.metric
    )
    place = os.path.relpath(task.file.absolute(), out.absolute().parent)
    row: dict[str, Any] = {"task": task.name, "data": place, **keys}
    if "choices" not in keys:
        row |= _limit(task.file, keys)
    if task.name in sources:
        row["specialist"] = task.name
    return row


def _limit(file: Path, keys: Mapping[str, str]) -> dict[str, Any]:
    """Return a limit of generated tokens where all answers are short; a token has a character or more."""
    columns = own_data.Columns(prompt=keys["prompt"], answer=keys["answer"])
    longest = max(len(item.answer) for item in own_data.read(file, columns, keys["metric"]).items)
    return {"gen_kwargs": {"max_gen_toks": longest + ROOM}} if longest + ROOM < DEFAULT else {}


def _config(document: Mapping[str, Any], out: Path) -> RunConfig:
    return RunConfig.of(document, folder=out.absolute().parent, where=str(out))


def _advice(config: RunConfig) -> Advised | None:
    if len(config.models.sources) < 2:
        return None
    return advise(measure(config.locations, BASE, sample=SAMPLE))


def _space(
    document: dict[str, Any], out: Path, advised: Advised | None, prepared: Prepared
) -> tuple[str, Prepared]:
    """Return the advised search space where it fits the models, else the simplest one."""
    if advised is None or advised.preset == FALLBACK:
        return FALLBACK, prepared
    try:
        return advised.preset, prepare(_config({**document, "space": advised.preset}, out))
    except UserError:
        return FALLBACK, prepared


def _fitted(
    document: dict[str, Any], out: Path, prepared: Prepared, probe: trial.Probe
) -> tuple[Prepared, trial.Probe]:
    """Shorten the budget where the run would take longer than HOURS; return the estimate of what is left."""
    limit = HOURS * 3600
    if probe.estimate is None or probe.estimate <= limit:
        return prepared, probe
    fixed = probe.seconds_before + probe.seconds_after
    each = max(probe.estimate - fixed, 0.0) / EVALUATIONS
    document["budget"]["evaluations"] = max(FEWEST, int((limit - fixed) / each) if each else FEWEST)
    prepared = prepare(_config(document, out))
    return prepared, trial.again(prepared, probe)


def _lines(
    prepared: Prepared, advised: Advised | None, document: Mapping[str, Any], data: Sequence[OwnTask]
) -> list[str]:
    """Return what was found and chosen, one line each."""
    lines = [
        f"models: base and {len(prepared.config.models.sources)} sources, "
        f"{prepared.parameters / 1e6:.1f} M parameters each; they fit"
    ]
    if advised is not None:
        first = advised.advice[0].text if advised.advice else ""
        lines.append(f"space:  {document['space']}, because the fine-tunes are {advised.verdict}: {first}")
    else:
        lines.append(f"space:  {document['space']}")
    lines.append(f"search: {prepared.optimizer}")
    if data:
        tasks = ", ".join(
            f"{task['task']} ({task['prompt']} -> {task['answer']}, {task['metric']})"
            for task in document["suite"]["tasks"]
        )
        lines.append(f"suite:  {tasks}")
    else:
        lines.append(f"suite:  {prepared.suite.name}, {len(prepared.suite.tasks)} tasks")
    return lines


def _comments(lines: Sequence[str]) -> dict[str, str]:
    """Return what stands above each part of the config."""
    why = {line.partition(":")[0]: line.partition(":")[2].strip() for line in lines}
    return {
        "models": why.get("models", ""),
        "space": f"What the search may vary: {why.get('space', '')}",
        "budget": why.get("budget", ""),
    }
