"""The inputs of a run, models, what was measured of them, and task files, guarded while it goes on.

A run compares them with what they were when it began: when a worker has loaded them, around every job (only
sizes and times of the models' files, which costs microseconds) and before a winner is declared. So no stored
score comes from other inputs than the run's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from evomerge.errors import ConfigError, ModelError, UserError
from evomerge.evaluation import task_files
from evomerge.evaluation.suite import Suite
from evomerge.merging.methods.declaration import FileKind
from evomerge.merging.sources import model_files
from evomerge.merging.sources.opening import open_sources
from evomerge.merging.sources.source import Source

_SHOWN: Mapping[FileKind, str] = {"fisher": "Fisher file", "gram": "Gram file"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """What models and task files were when a run began.

    fingerprints: model -> hash of its config, headers, sizes and sampled weights. files: model -> facts about
    its files, which tell what changed; may lack models. suite: digest of the suite and its task files.
    task_files: file that the suite's tasks use -> hash of its content, which tells what changed. measured:
    kind -> model -> its Fisher or Gram file, whose facts are among the model's.
    """

    fingerprints: Mapping[str, str]
    files: Mapping[str, model_files.Facts]
    suite: str = ""
    task_files: task_files.Hashes = field(default_factory=dict)
    measured: Mapping[FileKind, Mapping[str, str]] = field(default_factory=dict)


def facts_of(
    sources: Mapping[str, Source], measured: Mapping[FileKind, Mapping[str, str]]
) -> dict[str, dict[str, dict[str, int | str]]]:
    """Return model -> file -> facts of models' files and of what was measured of them.

    A measured file goes by its kind, because it may lie anywhere; a missing one is left out.
    """
    files = {name: model_files.facts(source) for name, source in sources.items()}
    for kind, places in measured.items():
        for name, place in places.items():
            if name in files and Path(place).is_file():
                files[name][_SHOWN[kind]] = model_files.facts_of_measured(Path(place))
    return files


def changed_models(before: RunInputs, now: RunInputs) -> str:
    """Say which files of which models changed, "" where none did."""
    changed = []
    for name, fingerprint in now.fingerprints.items():
        known = name in before.files
        differences = _changes(before.files[name], now.files[name]) if known else []
        if differences or before.fingerprints.get(name) != fingerprint:
            changed.append(f"{name}: {', '.join(differences) or 'config, headers, sizes or weights'}")
    return "; ".join(changed)


def _changes(before: model_files.Facts, now: model_files.Facts) -> list[str]:
    """List the files that changed; those that a run of an older version did not look at count as before."""
    overlooked = {*model_files.ASKING, *_SHOWN.values()} - before.keys()
    return model_files.changes(before, {name: now[name] for name in now if name not in overlooked})


def refuse_changed_suite(
    suite: Suite, before: RunInputs, *, where: str = "", error: type[UserError] = ConfigError
) -> None:
    """Raise an error where a suite or the files that its tasks use are not those of a run's inputs.

    where: the run's folder, for the message. error: its class.
    """
    if not before.suite or before.suite == (digest := suite.digest(like=before.suite)):
        return
    changed = task_files.changes(before.task_files, suite.file_hashes()) if before.task_files else ""
    if not changed and before.task_files:
        changed = "keys of the suite's file (no file of its tasks)"
    raise error(
        f"{where}the suite or its task files changed since the run began, so scores would not be comparable",
        expected=None if changed else before.suite,
        got=changed or digest,
        fix="restore what was there and resume, or start a new run in another folder",
    )


class InputGuard:
    """Compares a run's inputs with what is there now.

    Args:
        inputs: what they were when the run began.
        models: name -> location.
        base, tokenizer, experts: as in a Recipe.
        suite: the suite, whose task files lie where they are read.
    """

    def __init__(
        self,
        inputs: RunInputs,
        *,
        models: Mapping[str, str],
        base: str,
        tokenizer: str,
        experts: str,
        suite: Suite,
    ) -> None:
        self._inputs, self._models, self._base = inputs, models, base
        self._tokenizer, self._experts, self._suite = tokenizer, experts, suite
        self._seen: model_files.Stats = {}

    def compare(self) -> None:
        """Compare models and task files with the run's.

        Raises:
            ModelError: a model changed, is missing or damaged.
            ConfigError: the suite or its task files changed.
        """
        self._compare_models()
        refuse_changed_suite(self._suite, self._inputs)

    def check(self) -> None:
        """Compare the models if a size, time or inode of their files changed since the last comparison.

        Raises ModelError as `compare` does.
        """
        if model_files.changed_since(self._seen):
            self._compare_models()

    def _compare_models(self) -> None:
        sources = open_sources(self._models, self._base, tokenizer=self._tokenizer, experts=self._experts)
        measured = self._inputs.measured
        others = [Path(place) for places in measured.values() for place in places.values()]
        self._seen = model_files.stats(sources.values(), others)
        now = RunInputs(
            fingerprints={name: source.fingerprint for name, source in sources.items()},
            files=facts_of(sources, measured),
        )
        if changed := changed_models(self._inputs, now):
            raise ModelError(
                "model files changed since the run began",
                got=changed,
                fix="put the old files back and resume, or start a new run in another folder",
            )
