"""Scores of another run: taken where the same work here would give the same bits.

A second seed of a search, or other settings of it, need base, specialists and hand-made merges scored once
more. With `scores_from` they are copied from a run that has them: whole item blocks, when they are asked for,
so that the run ends like one that scored them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError
from evomerge.evaluation.scores import Question, Scores, Split
from evomerge.merging.recipe import Recipe
from evomerge.running.store import BASE, RunStore, StoreReader, Timing, differences, facts

Values = Callable[[facts.Fact[Any]], Any]
"""Fact -> its value in the run that asks, None where it has none yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What an earlier run has of a recipe, as `RunStore.record_scores` stores it."""

    parts: tuple[Scores, ...]
    timing: Timing
    weights: str | None
    questions: Mapping[int, Mapping[str, Sequence[Question]]]


class EarlierScores:
    """The scores of an earlier run, for the run that is stored in `store`."""

    def __init__(self, earlier: StoreReader, store: RunStore) -> None:
        self._earlier, self._store = earlier, store
        mine, theirs = _models(lambda fact: fact.get(store)), _models(lambda fact: fact.get(earlier))
        self._models = {name for name, model in mine.items() if theirs.get(name) == model}
        self._all = mine == theirs
        configs = facts.CONFIG.require(earlier), facts.CONFIG.require(store)
        blocks = store.blocks("search")
        seeds = {config["seed"] for config in configs}  # which draw the blocks, where there are several
        self._same_blocks = earlier.blocks("search") == blocks and (blocks == 1 or len(seeds) == 1)

    def has(self, recipe: Recipe, split: Split, blocks: Sequence[int]) -> bool:
        """Say whether the earlier run has a recipe's scores on all these blocks of a split."""
        return self._parts(recipe, split, blocks) is not None

    def take(self, recipe: Recipe, split: Split, blocks: Sequence[int]) -> bool:
        """Store a recipe's scores on item blocks, all or none; return whether the earlier run has them."""
        if (found := self._find(recipe, split, blocks)) is None:
            return False
        self._store.record_scores(
            recipe, found.parts, found.timing, weights=found.weights, questions=found.questions
        )
        return True

    def close(self) -> None:
        """Close the earlier run's store."""
        self._earlier.close()

    def _parts(self, recipe: Recipe, split: Split, blocks: Sequence[int]) -> tuple[Scores, ...] | None:
        if split == "search" and not self._same_blocks:
            return None
        if facts.BATCH_SIZES.get(self._store):  # halved here, so that the same work gives other bits
            return None
        if not (self._all or {BASE, *recipe.used_models(), *_of_text(recipe)} <= self._models):
            return None
        parts = [self._earlier.result(recipe.hash, split, block) for block in blocks]
        scored = tuple(part for part in parts if isinstance(part, Scores))
        return scored if len(scored) == len(parts) else None

    def _find(self, recipe: Recipe, split: Split, blocks: Sequence[int]) -> _Found | None:
        if (parts := self._parts(recipe, split, blocks)) is None:
            return None
        timing = self._earlier.timings(split)[recipe.hash]
        part = len(parts) / len(self._earlier.scored_blocks(split)[recipe.hash])
        return _Found(
            parts=parts,
            timing=replace(
                Timing.elsewhere(self._earlier.folder.name),
                total=part * timing.total,
                merge=part * timing.merge,
                forward=part * timing.forward,
            ),
            weights=facts.WEIGHTS.of(recipe.hash).get(self._earlier) if split == "test" else None,
            questions={
                block: questions
                for block in blocks
                if not self._store.questions(split, block)
                and (questions := self._earlier.questions(split, block))
            },
        )


def open_for(folder: Path, store: RunStore, versions: Mapping[str, str]) -> tuple[EarlierScores | None, str]:
    """Return the scores of the run in `folder` for the one in `store`, or why none are taken.

    versions: of this session. A run that goes on needs no earlier one: what it took is stored.
    """
    if not StoreReader.exists(folder):
        return None, f"no scores are taken from {folder}: there is no run any more"
    earlier = StoreReader.read(folder)
    if found := obstacles(earlier, lambda fact: fact.get(store), versions):
        earlier.close()
        return None, f"no scores are taken from {folder}: {'; '.join(found)}"
    return EarlierScores(earlier, store), f"scores that {folder} has are taken from it"


def refuse_other(folder: Path, begun: facts.Values, versions: Mapping[str, str]) -> None:
    """Refuse a run whose scores can't be those of a run that begins with these facts; raise UserError.

    What is found out later, as how requests share rows, is taken to be equal.
    """
    with StoreReader.read(folder) as earlier:
        found = obstacles(earlier, lambda fact: begun.get(fact, fact.get(earlier)), versions)
    if found:
        raise ConfigError(
            f"scores_from: the scores of {folder} can't be this run's",
            expected="a run on the same base, suite, device and settings of forward passes",
            got="; ".join(found),
            fix="make them equal, or leave out scores_from",
        )


def obstacles(earlier: StoreReader, mine: Values, versions: Mapping[str, str]) -> list[str]:
    """Say what keeps an earlier run's scores from being this run's; [] where nothing does."""
    found = []
    if _models(lambda fact: fact.get(earlier)).get(BASE) != _models(mine)[BASE]:
        found.append("another base model there")
    if facts.SUITE_DIGEST.get(earlier) != mine(facts.SUITE_DIGEST):
        found.append("another suite, or other task files there")
    for fact in (facts.ARITHMETIC, facts.FORWARD, facts.SHARING, facts.JUDGES, facts.ANSWERS):
        found += _differences(fact.key, fact.get(earlier), mine(fact))
    texts = [config["stored_text"] for config in (facts.CONFIG.require(earlier), mine(facts.CONFIG))]
    found += _differences("stored_text", *texts)
    if facts.BATCH_SIZES.get(earlier):
        found.append("its batch sizes were halved for want of memory")
    if facts.MIGRATED.get(earlier) is not None:
        found.append("it was begun by an older evomerge")
    sessions = [change for session in earlier.sessions() for change in differences(session, versions)]
    return found + list(dict.fromkeys(sessions))


def _models(of: Values) -> dict[str, tuple[Any, Any]]:
    """Return per model of a run what its files were: weights, config, and what is asked with."""
    files = of(facts.MODEL_FILES) or {}
    return {name: (fingerprint, files.get(name)) for name, fingerprint in of(facts.FINGERPRINTS).items()}


def _of_text(recipe: Recipe) -> set[str]:
    """Return where a recipe's vocabulary and chat template come from, in its words: models, or how."""
    return {recipe.tokenizer, recipe.chat_template} - {""}


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
