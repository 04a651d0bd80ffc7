"""The findings of `evomerge check`: everything that is known before a run starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from evomerge.delivery.verdict import resolution
from evomerge.evaluation.gains import Gain, dud_sentences
from evomerge.merging.tensors.on_device import merges_there
from evomerge.prepare import Prepared
from evomerge.running.clock import shown, span
from evomerge.running.executors import memory
from evomerge.running.worker import build_harness
from evomerge.search.objective import ObjectiveSpec, check_tokens
from evomerge.search.racing import FULL, full_blocks
from evomerge.text import one_line, printable
from evomerge.trial import Probe, requests

if TYPE_CHECKING:
    from evomerge.evaluation.examples import RenderedItem

GPU = ("model", "sources")
"""What a GPU that merges holds."""
_LONGEST = 1200
"""Characters of a prompt, or of an answer, that are shown; of longer ones the middle is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """How models are asked: one item of each task as the model sees it, and remarks on the batches."""

    prompts: tuple[RenderedItem, ...]
    notes: tuple[str, ...]


def asked(prepared: Prepared) -> Questions:
    """Build a run's items; only configs and tokenizers of the models are read for it.

    Raises ConfigError where the objective names `tokens` and no task that counts generates answers.
    """
    harness, blocks = build_harness(prepared.worker), prepared.worker.blocks
    tasks = harness.items("search").tasks
    generates = any(task.generates and task.builder.spec.counted for task in tasks)
    check_tokens(prepared.config.objective, generates=generates)
    answers = [harness.written("search", block) for block in range(blocks)]
    written, batch_size = max(answers), prepared.worker.batch_size
    notes = harness.notes
    if blocks > 1 and 0 < written < min(batch_size, FULL):
        fewer = full_blocks(sum(answers), batch_size)
        notes.append(
            f"an item block has {written} answers to generate, and generating few at once takes longer: "
            f"racing: {{blocks: {fewer}}} makes the batches larger, and lets candidates leave at fewer points"
        )
    return Questions(prompts=tuple(harness.examples()), notes=tuple(notes))


def as_data(prepared: Prepared, probe: Probe, questions: Questions) -> dict[str, Any]:
    """Return the findings as plain data (`check --json`).

    Args:
        prepared: the checked config.
        probe: the timed evaluation of one candidate.
        questions: from `asked`.

    Returns:
        Values that JSON can hold; times in the unit their key names, costs in the budget's currency.
    """
    steps = probe.gradients
    return {
        "models": prepared.config.locations,
        "parameters": prepared.parameters,
        "space": prepared.space.spec.name,
        "dimension": prepared.space.dimension,
        "optimizer": prepared.optimizer,
        "blocks": prepared.config.racing.count,
        "racing": _races(prepared),
        "surrogate": _uses_surrogate(prepared),
        "starts": [start.name for start in prepared.warm.recipes],
        "gradient_steps": 0 if steps is None else steps.steps,
        "suite": prepared.suite.name,
        "groups": {name: list(tasks) for name, tasks in prepared.suite.groups.items()},
        "items": probe.items,
        "seconds_per_candidate": probe.seconds,
        "workers": probe.workers,
        "memory": {
            "worker": prepared.models.worker(prepared.worker.dtype),
            "files": prepared.models.files,
            "free": memory.free(),
            "gpu": None if (taken := gpu_memory(prepared)) is None else dict(zip(GPU, taken, strict=True)),
        },
        "estimated_minutes": None if probe.estimate is None else probe.estimate / 60,
        "ends": None if probe.ends is None else datetime.fromtimestamp(probe.ends).astimezone().isoformat(),
        "estimated_cost": probe.cost,
        "enough_time": not probe.late,
        "out": str(prepared.folder),
        "resolution": resolution(prepared.suite, probe.test_items).as_data(),
        "specialists": [
            {**asdict(gain), "weight": gain.trust if gain.shown else 0.0} for gain in probe.gains
        ],
        "notes": [*prepared.notes, *questions.notes, *_gain_notes(probe)],
        "judges": {
            name: {**judge, "url": getattr(prepared.suite[name].judge, "url", None), "requests": count}
            for name, count in requests(prepared, probe).items()
            for judge in (prepared.judges[name],)
        },
        "prompts": [asdict(prompt) for prompt in questions.prompts],
    }


def text(prepared: Prepared, probe: Probe, questions: Questions) -> str:
    """Return the findings as text for the terminal; arguments as in `as_data`."""
    items = ", ".join(f"{probe.items[s]} items in {probe.seconds[s]:.2f} s on {s}" for s in probe.items)
    config, worker = prepared.config, prepared.worker
    count = len(config.models.sources)
    lines = [
        f"models: base and {count} sources, {prepared.parameters / 1e6:.1f} M parameters each; "
        "architectures, shapes and vocabularies match",
        f"space:  {prepared.space.describe()}",
        f"search: {prepared.optimizer}",
        f"        {_search_settings(prepared, probe)}",
        f"goal:   {_goal(config.objective)}",
        f"suite:  {prepared.suite.name}; one candidate takes {items}",
        *(
            f"        {name} stands for {len(tasks)} tasks: {', '.join(tasks)}"
            for name, tasks in prepared.suite.groups.items()
        ),
        f"device: {worker.device}, forward passes in {worker.dtype}, "
        f"{probe.workers} worker{'s' * (probe.workers > 1)}"
        + (f", generation by {worker.generation}" if worker.generation != "transformers" else ""),
        f"memory: {_memory(prepared, probe.workers)}",
        f"out:    {prepared.folder}",
    ]
    if (taken := gpu_memory(prepared)) is not None:
        live, kept = (f"{size / 1e9:.1f} GB" for size in taken)
        lines.insert(
            -1,
            f"merge:  on {worker.device}, where a worker takes {live} for its live model and up to {kept} "
            "for base and sources",
        )
    if probe.estimate is None or probe.ends is None:
        lines.append("cost:   unknown (the budget sets only `patience`)")
    else:
        end = f"started now it ends about {shown(probe.ends)}"
        lines.append(f"cost:   about {probe.estimate / 60:.1f} minutes for the whole run; {end}")
    if probe.cost is not None and config.budget.cost is not None:
        lines.append(f"        about {probe.cost:.2f} at {config.budget.cost.per_hour:g} per hour")
    if probe.late:
        needed = span(probe.seconds_before + probe.seconds_after)
        lines.append(
            f"note:   the budget's time is too short: baselines, one generation and test take {needed}"
        )
    lines += _judges(prepared, probe)
    visible = resolution(prepared.suite, probe.test_items)
    lines.append(f"test:   {visible.sentence}")
    lines += [f"note:   {note}" for note in visible.notes]
    notes = (f"note:   {note}" for note in (*prepared.notes, *questions.notes, *_gain_notes(probe)))
    return "\n".join([*lines, *_specialists(probe.gains), *notes, *_prompts(questions.prompts)])


def gpu_memory(prepared: Prepared) -> tuple[int, int] | None:
    """Return the bytes of a worker's live model and of base and sources on a GPU that merges, else None."""
    if not merges_there(prepared.worker.merge_on, prepared.worker.device):
        return None
    return prepared.models.live(prepared.worker.dtype), prepared.models.files


def _judges(prepared: Prepared, probe: Probe) -> Iterator[str]:
    """Say what is sent to judges, where, and how often at most."""
    counts = requests(prepared, probe)
    for task in prepared.suite.tasks:
        if (judge := task.judge) is None:
            continue
        count = counts[task.task]
        often = "an unknown number of requests" if count is None else f"at most {count:,} requests"
        yield (
            f"judge:  {task.task}: prompts, right answers and the models' answers are sent to {judge.url}, "
            f"where {judge.model} judges them{f' (key in ${judge.key})' if judge.key else ''}"
        )
        limit = f"the run stops at {judge.most_requests:,} (most_requests)"
        yield f"        {often}, with replies of at most {judge.max_tokens} tokens; {limit}"


def _memory(prepared: Prepared, workers: int) -> str:
    """Return what a run takes of this machine's memory, in one line."""
    size, free = prepared.models.worker(prepared.worker.dtype), memory.free()
    each = "" if workers == 1 else f"each of {workers} workers "
    parts = f"{each}about {size / 1e9:.1f} GB, and {prepared.models.files / 1e9:.1f} GB of files"
    if free is None or prepared.worker.device != "cpu":
        return parts
    short = size * workers > free
    return f"{parts}; {free / 1e9:.1f} GB are free here" + (
        ", too little: lower executor.workers" if short else ""
    )


def _goal(objective: ObjectiveSpec) -> str:
    """Return what the search looks for, in one line."""
    if objective.several:
        return f"a front of {', '.join(objective.names)}"
    kinds = {
        "floors": "the mean of the tasks, none of them below what the best hand-made merge has",
        "mean": "the mean of the tasks; a task may be given up for others",
        "balanced": "the mean of the tasks' logarithms, in which the weakest counts most",
    }
    within = "; within the constraints" if objective.constraints else ""
    return f"{kinds[objective.kind]} (objective: {{kind: {objective.kind}}}){within}"


def _specialists(gains: Sequence[Gain]) -> Iterator[str]:
    """Yield a line for each task of the mean: its specialist's score and the base's."""
    if gains:
        yield "specialists and base on `search`:"
    for gain in gains:
        yield f"        {gain.task}: {gain.numbers}{'' if gain.shown else ' (not shown to be better)'}"


def _gain_notes(probe: Probe) -> list[str]:
    """Return which tasks count with less than their weight, and which not at all."""
    unsure = [gain.sentence for gain in probe.gains if gain.shown and gain.trust < 1]
    return dud_sentences(probe.gains) + unsure


def _prompts(prompts: Sequence[RenderedItem]) -> Iterator[str]:
    yield "what a model sees, one item per task; the tokens of the answer are in brackets:"
    for prompt in prompts:
        yield f"  {prompt.task}: {prompt.prompt_tokens} tokens, then {_ending(prompt)}"
        yield from (f"    | {line}" for line in printable(_cut(prompt.prompt)).split("\n"))
        yield f"    > {one_line(_cut(''.join(f'[{token}]' for token in prompt.answer)))}"


def _ending(prompt: RenderedItem) -> str:
    """Say how many tokens are scored, or what ends a generated answer."""
    if prompt.limit is None:
        return f"{len(prompt.answer)} that are scored"
    until = ", ".join(f"'{one_line(text)}'" for text in prompt.until or ())
    return f"up to {prompt.limit} generated{f', until {until}' if until else ''} (below: the reference)"


def _cut(text: str) -> str:
    """Leave out the middle of a long text."""
    if len(text) <= _LONGEST:
        return text
    left_out = len(text) - _LONGEST
    return f"{text[: _LONGEST // 2]} ... {left_out:,} characters left out ... {text[-_LONGEST // 2 :]}"


def _races(prepared: Prepared) -> bool:
    config = prepared.config
    return config.racing.count > 1 and config.racing.keep < 1 and config.objective.items_decide


def _uses_surrogate(prepared: Prepared) -> bool:
    surrogate, objective = prepared.config.surrogate, prepared.config.objective
    if surrogate == "off":
        return False
    return objective.items_decide or (surrogate.front and objective.items_decide_front)


def _search_settings(prepared: Prepared, probe: Probe) -> str:
    """Return racing, surrogate and starting points in one line."""
    config, warm = prepared.config, prepared.warm
    blocks = config.racing.count
    scoring = "every candidate is scored on all items"
    if blocks > 1:
        early = "clearly worse candidates stop early" if _races(prepared) else "no candidate stops early"
        scoring = f"{blocks} item blocks, {early}"
    surrogate = "off"
    if config.surrogate != "off":
        objective = config.objective
        reason = "several objectives" if objective.several else "the objective charges for depth"
        if not objective.several and not objective.depth:
            reason = "the objective limits tokens"
        surrogate = "on" if _uses_surrogate(prepared) else f"off ({reason})"
    starts = ["baselines"]
    if warm.recipes:
        starts.append(f"{len(warm.recipes)} recipe{'s' if len(warm.recipes) > 1 else ''}")
    if (gradients := probe.gradients) is not None:
        most = "at most " if warm.automatic else ""
        steps = f"{most}{gradients.steps} gradient steps on {gradients.share:.0%} of the items each"
        starts.append(steps + ", which take the whole budget: no generation" * probe.sated)
    return f"{scoring}; surrogate {surrogate}; starts from {', '.join(starts)}"
