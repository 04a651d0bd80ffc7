"""Contamination: items that ask nearly the same in two splits, in one task or in two.

A search that sees near copies of `test` items is judged on what it was fitted to. Texts are compared by the
share of the runs of five words that they have in common (Jaccard), found with MinHash (Broder, 1997) and then
counted exactly. Runs of words that many items of a task have, such as instructions, don't count, and texts
with too few other words are not compared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasketch import MinHash, MinHashLSH

from evomerge.errors import ConfigError
from evomerge.evaluation.scores import SPLITS, Split

THRESHOLD = 0.8
"""Texts with this share of their runs of words in common are near duplicates."""
FEWEST_WORDS = 8
"""Shorter texts are not compared."""
_RUN = 5
_COMMON, _FEWEST_COMMON = 0.05, 10
"""Runs that this share of a task's items have, and at least so many, don't count."""
_PERMUTATIONS = 64
_SLACK = 0.15
"""MinHash estimates; pairs are searched at a lower threshold and then counted."""

Texts = Mapping[str, Mapping[Split, Sequence[str]]]
"""Task -> split -> the text of each item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicate:
    """An item that asks nearly the same as another one of a later split, which stays."""

    task: str
    split: Split
    index: int
    other_task: str
    other_split: Split
    text: str

    def __str__(self) -> str:
        where = "" if self.task == self.other_task else f" of {self.other_task}"
        return f"{self.task}: {self.split} item {self.index}, near an item of {self.other_split}{where}"


def near_duplicates(texts: Texts) -> list[NearDuplicate]:
    """Return the items of `search` and `select` that are near duplicates of one in a later split.

    `test` comes last, so none of its items is ever returned.

    >>> text = "how many legs do three healthy adult spiders have"
    >>> found = near_duplicates({"a": {"search": [text], "test": [text + " together"]}})
    >>> print(found[0])
    a: search item 0, near an item of test
    """
    runs = {task: _distinctive(by_split) for task, by_split in texts.items()}
    index = MinHashLSH(threshold=THRESHOLD - _SLACK, num_perm=_PERMUTATIONS)
    found = []
    for split in reversed(SPLITS):
        kept = []
        for task, by_split in runs.items():
            for number, words in by_split.get(split, {}).items():
                sketch = _sketch(words)
                near = index.query(sketch) if split != "test" else ()
                places = (place for place in sorted(near) if _share(words, _at(runs, place)) >= THRESHOLD)
                if (other := next(places, None)) is None:
                    kept.append(((task, split, number), sketch))
                    continue
                text = texts[task][split][number]
                found.append(
                    NearDuplicate(
                        task=task,
                        split=split,
                        index=number,
                        other_task=other[0],
                        other_split=other[1],
                        text=text,
                    )
                )
        for place, sketch in kept:
            index.insert(place, sketch)
    return found


def refuse(found: Sequence[NearDuplicate]) -> None:
    """Raise ConfigError where there are near duplicates."""
    if found:
        raise ConfigError(
            f"{len(found)} items of the suite are near duplicates of items in a later split",
            got=f"{found[0]}: {found[0].text[:80]}",
            fix="remove them from the data, or set near_duplicates: drop",
        )


def without(documents: Mapping[Split, list[Any]], items: Sequence[NearDuplicate]) -> dict[Split, list[Any]]:
    """Return a task's documents without some items; raise ConfigError where a split would lose all."""
    kept = dict(documents)
    for split in {item.split for item in items}:
        gone = {item.index for item in items if item.split == split}
        kept[split] = [doc for number, doc in enumerate(documents[split]) if number not in gone]
        if not kept[split]:
            raise ConfigError(
                f"task {items[0].task!r}: all {len(gone)} {split} items are near duplicates of items in a "
                "later split",
                fix="give other items, or set near_duplicates: keep in the suite",
            )
    return kept


def summary(found: Sequence[NearDuplicate]) -> list[str]:
    """Return one sentence for each task and split that lost items."""
    counts = Counter((item.task, item.split) for item in found)
    return [
        f"{task}: {count} {split} items are near duplicates of items in a later split, so they are left out"
        for (task, split), count in counts.items()
    ]


Place = tuple[str, Split, int]
_ByNumber = dict[Split, dict[int, frozenset[str]]]


def _at(runs: Mapping[str, _ByNumber], place: Place) -> frozenset[str]:
    task, split, number = place
    return runs[task][split][number]


def _share(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def _distinctive(by_split: Mapping[Split, Sequence[str]]) -> _ByNumber:
    """Return for each item with enough words its runs of words that few other items of the task have."""
    runs = {split: [_runs(text) for text in items] for split, items in by_split.items()}
    counts = Counter(run for items in runs.values() for item in items for run in item)
    limit = max(_FEWEST_COMMON, _COMMON * sum(map(len, runs.values())))
    kept: _ByNumber = {}
    for split, items in runs.items():
        rare = (frozenset(run for run in item if counts[run] <= limit) for item in items)
        fewest = FEWEST_WORDS - _RUN + 1
        kept[split] = {number: words for number, words in enumerate(rare) if len(words) >= fewest}
    return kept


def _runs(text: str) -> set[str]:
    words = re.findall(r"\w+", text.casefold())
    return {" ".join(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1)}


def _sketch(words: frozenset[str]) -> MinHash:
    sketch = MinHash(num_perm=_PERMUTATIONS, permutations=_PATTERN.permutations, scheme=_PATTERN.scheme)
    sketch.update_batch([run.encode() for run in sorted(words)])
    return sketch


_PATTERN = MinHash(num_perm=_PERMUTATIONS, seed=1)
