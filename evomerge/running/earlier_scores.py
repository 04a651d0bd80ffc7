"""Scores of another run: copied where the same work here would give the same bits.

A second seed of a search, or other settings of it, need base, specialists and hand-made merges scored once
more. With `scores_from` they are read from a run that has them when a session begins, and stored when they
are asked for, so that the run ends like one that scored them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, StoreError
from evomerge.evaluation.scores import SPLITS, Question, Scores, Split
from evomerge.merging.recipe import Recipe
from evomerge.running.store import RunStore, StoreReader, Timing, differences, facts

ROLES = ("base", "parent", "baseline")
"""Whose scores are copied."""

Values = Callable[[facts.Fact[Any]], Any]
"""Fact -> its value in the run that asks, None where it has none yet."""
Questions = Mapping[str, Sequence[Question]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What an earlier run has of a recipe on a split; timing: of all these blocks together."""

    parts: Mapping[int, Scores]
    timing: Timing
    weights: str | None


class EarlierScores:
    """The scores that a run may take from an earlier one, for the run that is stored in `store`."""

    def __init__(self, earlier: StoreReader, store: RunStore) -> None:
        self._store = store
        self._questions = {
            (split, block): earlier.questions(split, block)
            for split in SPLITS
            for block in range(earlier.blocks(split))
        }
        self._found = dict(_all(earlier, store))

    def has(self, recipe: str, split: Split, blocks: Sequence[int] | None = None) -> bool:
        """Say whether a recipe's (hash) scores can be taken on some blocks of a split, by default on all."""
        blocks = range(self._store.blocks(split)) if blocks is None else blocks
        found = self._found.get((recipe, split))
        return found is not None and found.parts.keys() >= {*blocks} - self._halved(split) == {*blocks}

    def take(self, recipe: Recipe, split: Split, blocks: Sequence[int]) -> bool:
        """Store a recipe's scores on item blocks, all or none; return whether they were there."""
        if not self.has(recipe.hash, split, blocks):
            return False
        found = self._found[recipe.hash, split]
        part, timing = len(blocks) / len(found.parts), found.timing
        self._store.record_scores(
            recipe,
            [found.parts[block] for block in blocks],
            replace(
                timing,
                total=part * timing.total,
                merge=part * timing.merge,
                forward=part * timing.forward,
            ),
            weights=found.weights,
            questions={
                block: questions
                for block in blocks
                if (questions := self._questions[split, block]) and not self._store.questions(split, block)
            },
        )
        return True

    def _halved(self, split: Split) -> set[int]:
        """Return the blocks that this run scores in smaller batches than it began with."""
        return _halved(self._store, split)


def _all(earlier: StoreReader, store: RunStore) -> Iterator[tuple[tuple[str, Split], _Found]]:
    """Yield what an earlier run has, by recipe (hash) and split."""
    seeds = {facts.CONFIG.require(each)["seed"] for each in (earlier, store)}
    blocks = store.blocks("search")  # another seed deals the items into several blocks in another way
    alike = earlier.blocks("search") == blocks and (blocks == 1 or len(seeds) == 1)
    recipes = dict.fromkeys(named.recipe.hash for role in ROLES for named in earlier.entries(role))
    for split in SPLITS if alike else SPLITS[1:]:
        timings, halved = earlier.timings(split), _halved(earlier, split)
        for recipe in recipes:
            results = {n: earlier.result(recipe, split, n) for n in range(store.blocks(split))}
            parts = {n: one for n, one in results.items() if isinstance(one, Scores) and n not in halved}
            weights = facts.WEIGHTS.of(recipe).get(earlier) if split == "test" else None
            if not parts or recipe not in timings or (split == "test" and weights is None):
                continue  # what a damaged store lost is made again
            timing = timings[recipe]
            if timing.run is None:
                timing = replace(timing, worker=Timing.copied_from(earlier.folder.name))
            yield (recipe, split), _Found(parts=parts, timing=timing, weights=weights)


def _halved(store: StoreReader, split: Split) -> set[int]:
    """Return the blocks that a run scores in smaller batches than it began with, for want of memory."""
    return {row["block"] for row in facts.BATCH_SIZES.get(store) or [] if row["split"] == split}


def read_for(folder: Path, store: RunStore, versions: Mapping[str, str]) -> tuple[EarlierScores | None, str]:
    """Return the scores of the run in `folder` for the one in `store`, or why none are taken.

    versions: of this session. A run that goes on needs no earlier one: what it took is stored.
    """
    try:
        with StoreReader.read(folder) as earlier:
            if found := obstacles(earlier, lambda fact: fact.get(store), versions):
                return None, f"no scores are copied from {folder}: {'; '.join(found)}"
            return EarlierScores(earlier, store), f"scores that {folder} has are copied from there"
    except StoreError as error:
        return None, f"no scores are copied from {folder}: {error.what}"


def refuse_other(folder: Path, out: Path, begun: facts.Values, versions: Mapping[str, str]) -> None:
    """Refuse a run whose scores can't be those of a run that begins with these facts; raise UserError.

    What is found out later, as how requests share rows, is taken to be equal. out: the folder of the latter.
    """
    if folder.resolve() == out.resolve():
        raise ConfigError("scores_from: names this run's own folder", got=str(folder), fix="name another run")
    if not StoreReader.exists(folder):
        raise ConfigError("scores_from: there is no run", got=str(folder), fix="name the folder of a run")
    with StoreReader.read(folder) as earlier:
        found = obstacles(earlier, lambda fact: begun.get(fact, fact.get(earlier)), versions)
    if found:
        raise ConfigError(
            f"scores_from: the scores of {folder} can't be this run's",
            expected="a run on the same models, items, device and settings of forward passes",
            got="; ".join(found),
            fix="make them equal, or leave out scores_from",
        )


def obstacles(earlier: StoreReader, mine: Values, versions: Mapping[str, str]) -> list[str]:
    """Say what keeps an earlier run's scores from being this run's; [] where nothing does."""
    if facts.MIGRATED.get(earlier) is not None:
        return ["it was begun by an older evomerge"]
    found = []
    configs = facts.CONFIG.require(earlier), mine(facts.CONFIG)
    if _models(lambda fact: fact.get(earlier)) != _models(mine):
        found.append("other models there, or in another order")
    hashes = facts.FULL_HASHES.get(earlier), mine(facts.FULL_HASHES)
    if all(hashes) and hashes[0] != hashes[1]:
        found.append("other bytes in the models' files there")
    if _items(lambda fact: fact.get(earlier)) != _items(mine):
        found.append("another suite, or other task files there")
    for fact in (facts.ARITHMETIC, facts.FORWARD, facts.SHARING, facts.ANSWERS):
        found += _differences(fact.key, fact.get(earlier), mine(fact))
    found += _differences("stored_text", *(config["stored_text"] for config in configs))
    if facts.JUDGES.get(earlier) or mine(facts.JUDGES):
        found.append("answers are judged, and the verdicts belong to their run")
    if any(config["executor"]["name"] == "ray" for config in configs):
        found.append("the processors of a Ray cluster are not known")
    if "cuda" in mine(facts.ARITHMETIC):
        found += _differences("device", *(config["executor"]["device"] for config in configs))
    if not earlier.sessions():
        found.append("it does not say which libraries it was made with")
    sessions = [change for session in earlier.sessions() for change in differences(session, versions)]
    return found + list(dict.fromkeys(sessions))


def _models(of: Values) -> list[tuple[str, Any, Any]]:
    """Return per model of a run, in order, what its files were: weights, config, what is asked with."""
    files = of(facts.MODEL_FILES) or {}
    return [(name, fingerprint, files.get(name)) for name, fingerprint in of(facts.FINGERPRINTS).items()]


def _items(of: Values) -> tuple[Any, Any]:
    """Return what decides over a run's items and how they are asked: not how tasks count in a mean."""
    suite = dict(of(facts.SUITE))
    aside = {"about", "name", "tasks"}
    tasks = [{key: value for key, value in task.items() if key != "weight"} for task in suite["tasks"]]
    files = of(facts.TASK_FILES)
    rest = {key: value for key, value in suite.items() if key not in aside}
    return (tasks, rest), files or of(facts.SUITE_DIGEST)


def _differences(name: str, there: Any, here: Any) -> list[str]:
    """Name what differs between two values, key by key where both are mappings of plain values."""
    if there == here:
        return []
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        plain = not any(isinstance(side.get(key), list | dict) for key in differing for side in (there, here))
        if plain:
            return [f"{key}: {there.get(key)} there, {here.get(key)} here" for key in differing]
        return [f"other {name} of {', '.join(differing)}"]
    return [f"{name.replace('_', ' ')}: {there} there, {here} here"]
