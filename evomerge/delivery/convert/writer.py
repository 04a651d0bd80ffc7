"""Say what a file is, convert it, check the run config and write it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.config import RunConfig, load_suite
from evomerge.delivery.config_file import annotated
from evomerge.delivery.convert import evolve, genetic, merge
from evomerge.delivery.convert.draft import ConvertOptions, Draft
from evomerge.errors import ConfigError, DiskError
from evomerge.files import drafted_file
from evomerge.schema import load_yaml_documents
from evomerge.search.spaces.preset import SpaceSpec
from evomerge.search.spaces.resolve import resolve

KINDS = "a config of mergekit-evolve or mergenetic, or a merge for mergekit"
ORDER = (
    *("models", "space", "suite", "objective", "optimizer", "budget", "warm_start"),
    *("executor", "dtype", "tokenizer", "chat_template", "seed", "out"),
)
"""The order of the parts in a written config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A config that was written. kind: what the file was. notes: what changed."""

    path: Path
    kind: str
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """What was read and written, what changed, and the next command."""
        place = shlex.quote(str(self.path))
        lines = [f"read:    {self.kind}", *(f"changed: {note}" for note in self.notes)]
        return "\n".join([*lines, f"wrote:   {self.path}", f"next:    evomerge check {place}"])

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"config": str(self.path), "kind": self.kind, "notes": list(self.notes)}


def convert(file: Path, options: ConvertOptions) -> Converted:
    """Write the run config that a file of another project stands for.

    Args:
        file: a config of mergekit-evolve or mergenetic, or a mergekit YAML.
        options: what the file does not say.

    Raises:
        ConfigError: the file is none of these, not valid, or something of it has no counterpart; nothing is
            written.
        DiskError: `options.out` exists, or can't be written.
    """
    if options.out.exists():
        raise DiskError(f"{options.out}: exists already", fix="give another file: --out YAML")
    if options.suite is not None and options.data:
        raise ConfigError("--suite and --data: both say what to score on", fix="leave one of them out")
    data = _read(file)
    draft = Draft(kind=_kind(data, file), root=file.parent, options=options)
    try:
        _fill(draft, data, file)
    except ConfigError as error:
        if str(file) in error.what:
            raise
        raise ConfigError(
            f"{file}: {error.what}", expected=error.expected, got=error.got, fix=error.fix
        ) from None
    document = draft.document
    ordered = {key: document[key] for key in ORDER if key in document}
    kind = (
        f"a config of {draft.kind}" if draft.kind in (evolve.TOOL, genetic.TOOL) else "a merge for mergekit"
    )
    with drafted_file(options.out) as part:
        head = f"A run config by `evomerge convert`, from {file.name}, {kind}."
        text = annotated(ordered, {}, head, draft.notes)
        part.write_text(text, encoding="utf-8")
    return Converted(path=options.out, kind=kind, notes=tuple(draft.notes))


def _fill(draft: Draft, data: Mapping[str, Any], file: Path) -> None:
    """Enter a file into a draft, and check the run config that it becomes."""
    _refuse_unused(draft)
    if draft.kind == evolve.TOOL:
        evolve.convert(data, draft)
    elif draft.kind == genetic.TOOL:
        genetic.convert(data, draft)
    else:
        merge.convert(data, draft, file)
    draft.document.setdefault("seed", 0)
    draft.document.setdefault("out", f"runs/{draft.options.out.stem}")
    if draft.options.run_folder is not None:
        draft.document["out"] = draft.options.run_folder
    _check(draft.document, draft)


def _read(file: Path) -> dict[str, Any]:
    documents = load_yaml_documents(file)
    if len(documents) > 1:
        raise ConfigError(
            f"{file}: {len(documents)} documents in one file, separated by ---",
            expected="one; a run searches one merge",
            fix="make the models of the first ones with `evomerge merge`, and convert the last one alone",
        )
    return documents[0]


def _kind(data: Mapping[str, Any], file: Path) -> str:
    """Return which project's file it is."""
    if "genome" in data:
        return evolve.TOOL
    if "merge_method" in data:
        return "mergekit"
    if any(key in data for key in genetic.KEYS):
        return genetic.TOOL
    if "experts" in data:
        got = "a config of mergekit-moe, which makes a mixture of experts"
    elif "space" in data and "budget" in data:
        got = "a run config of evomerge already"
    elif "groups" in data:
        got = "a recipe of evomerge, which goes into a run config: warm_start: {recipes: [FILE]}"
    else:
        got = f"the keys {', '.join(map(str, list(data)[:8])) or 'none'}"
    raise ConfigError(f"{file}: nothing that can be converted", expected=KINDS, got=got)


def _check(document: dict[str, Any], draft: Draft) -> None:
    """Raise ConfigError where the config is not valid, as far as no model is needed to see it."""
    out = draft.options.out
    config = RunConfig.of(document, folder=out.absolute().parent, where="the config made of it")
    if isinstance(config.space, SpaceSpec):
        resolve(config.space)
    suite = load_suite(config.suite)
    if isinstance(document["suite"], str):
        return
    for row in document["suite"]["tasks"]:
        if members := suite.groups.get(row["task"]):
            row["weight"] = float(f"{row.get('weight', 1.0) / len(members):.6g}")
            draft.note(
                f"{row['task']} stands for {len(members)} tasks, each with its own scores; their weights are "
                f"1 / {len(members)} of the group's"
            )


def _refuse_unused(draft: Draft) -> None:
    if draft.options.method is not None and draft.kind != genetic.TOOL:
        raise ConfigError(
            "--method is for configs of mergenetic",
            got=draft.kind,
            fix="leave --method out; the file names it",
        )
