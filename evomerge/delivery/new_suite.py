"""A new suite of one data file (`evomerge suite new`): its YAML, its splits, and what `test` can show."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evomerge.delivery.verdict import Resolution, resolution
from evomerge.errors import ConfigError, DiskError
from evomerge.evaluation import own_data
from evomerge.evaluation.scores import SPLITS, Split
from evomerge.evaluation.suite import Suite
from evomerge.files import drafted_file

_HEAD = """\
# Items of {data}, split by a hash of their prompts (50 % search, 20 % select, 30 % test).
# All keys of a task: docs/config.md; your own data: docs/your_data.md.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSuite:
    """A suite that was written. repeated: rows left out, because an earlier one asks the same."""

    path: Path
    counts: Mapping[Split, int]
    repeated: int
    visible: Resolution

    @property
    def text(self) -> str:
        """What was written, as text for the terminal."""
        place = shlex.quote(str(self.path))
        lines = [f"wrote {self.path}", "items:  " + ", ".join(f"{self.counts[s]} {s}" for s in SPLITS)]
        if self.repeated:
            lines.append(f"note:   {self.repeated} rows were left out, because an earlier one asks the same")
        lines.append(f"test:   {self.visible.sentence}")
        lines += [f"note:   {note}" for note in self.visible.notes]
        lines.append(f"next:   evomerge evaluate MODEL --suite {place} --split select")
        lines.append(f"        or `suite: {place}` in a run config, then: evomerge check CONFIG")
        return "\n".join(lines)

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "suite": str(self.path),
            "items": dict(self.counts),
            "repeated": self.repeated,
            "resolution": self.visible.as_data(),
        }


def write(
    file: Path,
    *,
    prompt: str,
    answer: str,
    choices: str | None = None,
    metric: str | None = None,
    scorer: str | None = None,
    name: str | None = None,
    out: Path | None = None,
) -> NewSuite:
    """Write the suite of a data file, which stays where it is.

    Args:
        file: a .jsonl or .csv file.
        prompt, answer, choices, metric, scorer: keys of the suite's task.
        name: of the suite and its task; None takes the file's.
        out: the YAML to write, which must not exist; None puts it beside the file.

    Raises:
        ConfigError: the file or an option has a mistake.
        DiskError: the YAML exists, or can't be written.
    """
    path = out if out is not None else file.with_suffix(".yaml")
    if path.exists():
        raise DiskError(f"{path}: exists already", fix="give another file: --out YAML")
    keys = {"prompt": prompt, "answer": answer, "choices": choices, "metric": metric, "scorer": scorer}
    entry = {key: value for key, value in keys.items() if value is not None}
    title = name or file.stem
    place = os.path.relpath(file.absolute(), path.absolute().parent)
    data = {"name": title, "tasks": [{"task": title, "data": place, **entry}]}
    suite = Suite.from_mapping(data, folder=path.absolute().parent, where=str(path))
    (task,) = suite.tasks
    items = own_data.read(file, task.columns, task.metric.partition("_")[0])
    counts = items.counts()
    if empty := [split for split in SPLITS if not counts[split]]:
        raise ConfigError(
            f"{file}: too few items for three splits",
            expected="items whose prompts' hashes give some to each split",
            got=f"{len(items.items)} items, none in {empty[0]}",
            fix="give more items",
        )
    with drafted_file(path) as draft:
        body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        draft.write_text(_HEAD.format(data=place) + body, encoding="utf-8")
    return NewSuite(
        path=path,
        counts=counts,
        repeated=items.repeated,
        visible=resolution(suite, {task.task: counts["test"]}),
    )
