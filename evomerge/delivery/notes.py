"""Notes: what a reader must know to read a run's tables correctly."""

from __future__ import annotations

from evomerge.delivery import objectives
from evomerge.delivery.summary import Summary
from evomerge.evaluation.gains import dud_sentences
from evomerge.evaluation.scores import SPLITS
from evomerge.running import forward, looks, own_answers
from evomerge.running.batches import decisions
from evomerge.running.store import StoreReader, facts


def stop_sentence(store: StoreReader) -> str | None:
    """Return why the search ended, and why nothing more fitted into its budget; None while it goes on."""
    stopped = facts.STOPPED.get(store)
    if stopped is None or "in whole generations" not in stopped:
        return stopped
    generations = store.generations()
    count = len(generations[-1].recipes) if generations else 0
    return f"{stopped}; a further generation of {count} candidates would have gone beyond it"


def notes(summary: Summary) -> list[str]:
    """Return the notes on a run's tables, one sentence each."""
    store = summary.store
    normaliser = summary.normaliser("test")
    sentences = objectives.notes(summary)
    sentences += dud_sentences(summary.gains())
    if summary.weighting is not None:
        sentences += [gain.sentence for gain in summary.gains() if gain.shown and gain.trust < 1]
    sentences += own_answers.sentences(summary.suite, facts.ANSWERS.get(store) or {})
    sentences += own_answers.distribution_sentences(summary.suite, facts.DISTRIBUTIONS.get(store) or {})
    sentences += _judges(summary)
    for followed, reason in store.gradient_failures():
        planned = (facts.DESCENT.get(store) or {}).get("steps")
        of = "" if planned is None else f" of {planned}"
        sentences.append(f"gradients were followed for {followed}{of} steps only: {reason}")
    sentences += [companion.sentence for companion in summary.companions()]
    for task in normaliser.floored if normaliser is not None else ():
        sentences.append(
            f"{task}: the specialist is hardly better than the base, so the task's part of the mean is noise"
        )
    if (facts.BASELINES.get(store) or {}).get("short"):
        sentences.append(
            "a short list of baselines was raced on `search`, and the best were scored on `test`, because "
            "these models are costly to score (baselines: all scores all of them)"
        )
    sentences += facts.ITEM_NOTES.get(store) or []
    sentences += [decision.sentence for decision in decisions(store)]
    first, *later = store.sessions() or [{}]
    changes = dict.fromkeys(change for versions in later if (change := forward.changes(first, versions)))
    sentences += [
        f"the environment changed during the run, so last digits may differ: {change}" for change in changes
    ]
    sentences += _copied(store)
    winners = set(store.timings("test")) - {named.recipe.hash for named in summary.named}
    if summary.unlimited is not None:
        winners -= {summary.unlimited.recipe.hash}
    if len(winners) > 1:
        sentences.append(
            f"`test` was used for {len(winners)} winners (the budget was raised), "
            "so its p-values are optimistic"
        )
    if (runs := looks.runs_on_the_test_of(store.folder)) > 1:
        sentences.append(
            f"this `test` was looked at by {runs} runs on this machine: the best of several runs on it is "
            "chosen by luck, too"
        )
    return sentences


def _copied(store: StoreReader) -> list[str]:
    """Say which scores came from another run."""
    models: dict[str, set[str]] = {}
    for split in SPLITS:
        for recipe, timing in store.timings(split).items():
            if timing.run is not None:
                models.setdefault(timing.run, set()).add(recipe)
    return [
        f"models whose scores were copied from the run {name}, where the same work had been done: "
        f"{len(recipes)}"
        for name, recipes in models.items()
    ]


def _judges(summary: Summary) -> list[str]:
    """Say what the judges of a run's tasks were asked, and how many verdicts had no score."""
    specs = {task.task: task.judge for task in summary.suite.tasks if task.judge is not None}
    if not specs:
        return []
    from evomerge.evaluation.judge import spent_in

    sentences = []
    for name, spec in specs.items():
        if (spent := spent_in(summary.store.folder, spec)) is None:
            continue
        sentences.append(
            f"{name}: judged by {spec.model}, {spent.verdicts:,} answers in {spent.requests:,} requests "
            f"({spent.tokens:,} tokens); {spent.unreadable:,} verdicts had no score and count 0"
        )
    return sentences
