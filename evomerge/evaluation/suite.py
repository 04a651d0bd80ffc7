"""Suite: the tasks that a model is scored on. A YAML file names lm-eval tasks, their weights and splits.

Reading a suite imports neither torch nor lm_eval. `evomerge.evaluation.harness`, which builds the tasks,
checks that they and their metrics exist.

A suite file::

    name: demo
    about: five skills and one likelihood task
    tasks_dir: ../tasks/demo          # relative to this file; what is not in it is lm-eval's
    tasks:
      - task: demo_add                # the lm-eval task, or a name of your choice and `of: TASK`
        metric: acc                   # one of the task's per-item metrics; "metric,filter" picks a filter
        role: skill                   # skill (default), retention or coherence
        weight: 1                     # in the mean over skills; 0: reported, not counted
        specialist: add               # the source whose score is 1; default: the best parent
        splits: {search: search, select: select, test: test}

A split is the name of a dataset split, items that evomerge draws from one (`{from: train, items: 300}`), or
a number alone: then all three are drawn from the split that lm-eval would evaluate. How the tasks are put to
a model (chat template, examples, generation) is said by the keys of `evomerge.evaluation.asking`, in the
suite or in a task.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from evomerge.errors import ConfigError, nearest
from evomerge.evaluation import task_files, task_groups
from evomerge.evaluation.asking import AUTO, DISTRIBUTION, OFF, SPECIALIST, Asking, with_template_text
from evomerge.evaluation.judge_spec import JudgeSpec, of_suite
from evomerge.evaluation.own_data import METRICS, Columns
from evomerge.evaluation.scores import SPLITS, Split
from evomerge.files import expanded
from evomerge.schema import LARGEST_COUNT, LARGEST_FACTOR, Strict, find_preset, load_yaml, parse

LOGLIKELIHOOD = "loglikelihood"
"""The one metric of retention tasks: mean log-likelihood per token of texts or of right answers, in nats."""

COHERENCE = "coherence"
"""The one metric of coherence tasks: see `evomerge.evaluation.coherence`."""

_OWN_METRIC = {"retention": LOGLIKELIHOOD, "coherence": COHERENCE}

_BY_CONTENT = {split: split for split in SPLITS}
_SCORED = "score"
"""The metric of a scorer that returns one number, and of a judge."""
_DATA_KEYS = ("prompt", "answer", "choices", "scorer", "judge")

_BEFORE = {"chat_template": OFF, "companion": OFF, "long_prompts": "cut", "near_duplicates": "keep"}
"""How models were asked before a suite could say it: runs stored then have none of these keys."""

_DIGEST = "2:"
"""The start of digests over the files that the tasks use; older ones are over all files of `tasks_dir`."""


class DrawnItems(Strict):
    """Items that are drawn from a dataset split."""

    from_: str = Field(alias="from", min_length=1)
    """Name of the dataset split."""
    items: int = Field(ge=1, le=LARGEST_COUNT)
    """Number of items. Entries with the same `from` have no item in common."""

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"from": self.from_, "items": self.items}


class Splits(Strict):
    """Where the three splits of a task come from.

    Each is the name of a dataset split, or `{from: NAME, items: NUMBER}`: items that are drawn from one.
    Numbers alone for all three are drawn from the split that lm-eval would evaluate. What is drawn for one
    split is in no other.

    >>> Splits(search=300, select=200, test=500).drawn
    True
    """

    search: int | str | DrawnItems | None = None
    """Items the search optimises. Without it the task is reported only."""
    select: int | str | DrawnItems | None = None
    """Items for the choice of the winner. A task that is reported only can be without them."""
    test: int | str | DrawnItems
    """Items for the report, which influence no choice."""

    @field_validator("search", "select", "test", mode="wrap")
    @classmethod
    def _name_or_count(cls, value: object, parsed: ValidatorFunctionWrapHandler) -> object:
        if isinstance(value, Mapping):
            return parse(DrawnItems, value, "drawn items")
        if value is None or (isinstance(value, str) and value) or isinstance(value, DrawnItems):
            return parsed(value)
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_COUNT:
            return value
        if type(value) is int and value > LARGEST_COUNT:
            raise ValueError(f"expected at most {LARGEST_COUNT:,} items")
        raise ValueError(
            "expected the name of a dataset split, a number of items (1 or more), "
            "or {from: NAME, items: NUMBER}"
        )

    @model_validator(mode="after")
    def _apart(self) -> Splits:
        values = [value for value in (self.search, self.select, self.test) if value is not None]
        if len({isinstance(value, int) for value in values}) > 1:
            raise ValueError(
                "give names of dataset splits for all three, or numbers of items for all three; "
                "a number beside a name says where its items are from: {from: NAME, items: NUMBER}"
            )
        if self.search is not None and self.select is None:
            raise ValueError("a task with search items needs select items: they choose the winner")
        names = [value for value in values if isinstance(value, str)]
        drawn = {value.from_ for value in values if isinstance(value, DrawnItems)}
        if shared := {name for name in names if names.count(name) > 1 or name in drawn}:
            raise ValueError(
                f"the dataset split {sorted(shared)[0]!r} is used twice, "
                "but items that select a model can't test it; name different splits, or give numbers of items"
            )
        return self

    @property
    def drawn(self) -> bool:
        """Whether the splits are numbers of items, drawn from one dataset split."""
        return isinstance(self.test, int)

    def __getitem__(self, split: Split) -> int | str | DrawnItems | None:
        value: int | str | DrawnItems | None = getattr(self, split)
        return value

    def dataset_split(self, split: Split) -> str | None:
        """Return the dataset split that a split's items come from, None where lm-eval says it."""
        value = self[split]
        return value.from_ if isinstance(value, DrawnItems) else value if isinstance(value, str) else None


class SuiteTask(Asking):
    """One task of a suite, which can also have all keys of [asking](#asking)."""

    task: str = Field(min_length=1)
    """The lm-eval task; or any name, where `of` says which task it is. A group or tag of tasks stands for one
    such entry per task."""
    of: str | None = Field(None, min_length=1)
    """The lm-eval task, where `task` is a name of your choice: a task can stand twice, with two metrics or
    asked in two ways. What is asked in the same way is computed once."""
    metric: str = Field(min_length=1)
    """One of the task's per-item metrics; `metric,filter` picks a filter. Retention and coherence tasks have
    one."""
    smooth: str | None = Field(None, min_length=1)
    """Another per-item metric, from 0 to 1, that gives partial credit for generated answers; it takes the
    place of the probability of right answers in `objective.smooth`."""
    role: Literal["skill", "retention", "coherence"] = "skill"
    """What the task measures: a skill, the base's general ability, or the coherence of free generations."""
    weight: Annotated[float, Field(ge=0, le=LARGEST_FACTOR)] = 1.0
    """Weight in the mean over tasks of the same role; 0 reports the task without counting it."""
    specialist: str | None = None
    """The source that was trained for the task. Default: the best parent."""
    splits: Splits
    """Items for search, selection and test. Of `data`: numbers, or by default a hash of the prompts."""
    data: str | None = Field(None, min_length=1)
    """A JSONL or CSV file, relative to the suite's file, in place of an lm-eval task."""
    prompt: str | None = Field(None, min_length=1)
    """The column of the prompts in `data`, or a jinja text over the columns."""
    answer: str | None = Field(None, min_length=1)
    """The column of the right answers in `data`, or a jinja text over the columns."""
    choices: str | None = Field(None, min_length=1)
    """The column of the choices in `data`: lists, or in CSV texts separated by `|`."""
    scorer: str | None = Field(None, min_length=1)
    """A Python function `module:function` or `file.py:function` that scores the answers to `data`."""
    judge: JudgeSpec | None = None
    """A model behind an OpenAI-compatible server that scores the answers to `data`. It is asked only with
    `ask_judges`."""

    @model_validator(mode="before")
    @classmethod
    def _own_metric(cls, data: Any) -> Any:
        role_metric = _OWN_METRIC.get(str(data.get("role"))) if isinstance(data, Mapping) else None
        if isinstance(data, Mapping) and role_metric and "data" not in data:
            return {"metric": role_metric, **data}
        if isinstance(data, Mapping) and isinstance(file := data.get("data"), str):
            scored = data.get("scorer") or data.get("judge")
            metric = _SCORED if scored else "choice" if data.get("choices") else "exact"
            metric = role_metric or metric
            return {"task": Path(file).stem, "metric": metric, "splits": _BY_CONTENT, **data}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> SuiteTask:
        if self.role == "retention" and self.metric != LOGLIKELIHOOD:
            raise ValueError(
                f"a retention task is measured by {LOGLIKELIHOOD!r} (nats per token), not by {self.metric!r}"
            )
        if self.role == "coherence" and self.metric.partition(",")[0] != COHERENCE:
            raise ValueError(f"a coherence task is measured by {COHERENCE!r}, not by {self.metric!r}")
        self._check_data()
        if self.role != "skill" and self.smooth is not None:
            raise ValueError(f"a {self.role} task has no partial credit; remove smooth")
        if self.role != "skill" and self.specialist is not None:
            raise ValueError(f"a {self.role} task is compared with the base model; it has no specialist")
        return self

    def _check_retention_data(self) -> None:
        if wrong := next((key for key in _DATA_KEYS[2:] if getattr(self, key) is not None), None):
            raise ValueError(f"a retention task asks how likely the right answers are; remove {wrong}")

    def _check_data(self) -> None:
        keys = [key for key in _DATA_KEYS if getattr(self, key) is not None]
        if self.data is None:
            if keys:
                raise ValueError(f"{keys[0]} is a key of tasks with `data`")
            return
        if missing := [key for key in ("prompt", "answer") if key not in keys]:
            raise ValueError(f"a task with `data` needs {missing[0]}")
        if self.of is not None or self.role == "coherence":
            raise ValueError("a task with `data` is a skill or measures retention, without `of`")
        if self.role == "retention":
            self._check_retention_data()
        else:
            self._check_metric()
        if not self.splits.drawn and any(self.splits[split] not in (None, split) for split in SPLITS):
            raise ValueError("splits of a task with `data` are numbers of items, or left out")

    def _check_metric(self) -> None:
        """Refuse keys of `data` that say in two ways how its answers are scored."""
        if self.judge is not None:
            if self.choices is not None or self.scorer is not None:
                raise ValueError("a judge reads generated answers; remove choices and scorer")
            if self.metric.partition(",")[0] != _SCORED:
                raise ValueError(f"a judge's metric is {_SCORED!r}; remove metric")
        elif self.scorer is not None:
            if self.choices is not None:
                raise ValueError("a scorer reads generated answers; remove choices")
            if not all(part.strip() for part in self.scorer.partition(":")):
                raise ValueError("scorer: expected module:function or file.py:function")
        elif self.metric.partition("_")[0] not in METRICS:
            raise ValueError(f"metric: {nearest(self.metric, METRICS)}")
        elif (self.metric == "choice") != (self.choices is not None):
            raise ValueError("the metric choice and the key choices need each other")

    @property
    def columns(self) -> Columns:
        """Where the parts of the items of `data` stand."""
        assert self.prompt is not None
        assert self.answer is not None
        return Columns(prompt=self.prompt, answer=self.answer, choices=self.choices)

    @property
    def source(self) -> str:
        """The lm-eval task."""
        return self.of or self.task

    @property
    def counted(self) -> bool:
        """Whether the task counts in the mean, the retention or the coherence; else it is only reported.

        A task without search items never counts, so that the search and the report use the same mean.
        """
        return self.weight > 0 and self.splits.search is not None


class Suite(Asking):
    """What a model is scored on: lm-eval tasks, their weights and their splits, and how models are asked.

    It can also have all keys of [asking](#asking), for tasks that don't set them.

    Made by `Suite.load`.
    """

    name: str = Field(min_length=1)
    """Name of the suite."""
    about: str = ""
    """One line for people."""
    tasks_dir: Path | None = None
    """Folder of lm-eval task YAMLs, relative to the suite's file. Other tasks are lm-eval's own."""
    chat_template: str | None = Field(AUTO, min_length=1)
    companion: Literal["auto", "off", "specialist", "distribution"] | None = "auto"
    long_prompts: Literal["refuse", "cut"] | None = "refuse"
    near_duplicates: Literal["drop", "refuse", "keep"] = "drop"
    """What happens to `search` and `select` items that ask nearly the same as one in a later split, in any
    task; `test` items always stay."""
    tasks: tuple[SuiteTask, ...]
    """The tasks; at least one skill with `search` items and a weight above 0."""
    _folder: Path = PrivateAttr(Path())
    """Where `data` and `scorer` start."""
    _groups: task_groups.Groups = PrivateAttr({})
    """The groups that the file names, with their tasks."""

    @model_validator(mode="after")
    def _searchable(self) -> Suite:
        names = [task.task for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the task {twice[0]!r} is listed twice")
        if not any(task.role == "skill" and task.counted for task in self.tasks):
            raise ValueError("a suite needs a skill task with search items and a weight above 0")
        for task in self.tasks:
            if (problem := self.asking(task.task).contradiction()) is not None:
                raise ValueError(f"task {task.task!r}: {problem}")
            if task.companion in (SPECIALIST, DISTRIBUTION) and task.specialist is None:
                raise ValueError(
                    f"task {task.task!r}: `companion: {task.companion}`, but it names no `specialist`"
                )
        return self

    @classmethod
    def load(cls, name_or_path: str | Path, *, beside: Path | None = None) -> Suite:
        """Read a suite from a file, or a packaged suite by name.

        Args:
            name_or_path: a path, or else the name of a packaged suite.
            beside: the folder where relative paths start first; then the current folder.

        Raises:
            ConfigError: there is no such suite, or it is not valid; all problems are listed at once.

        >>> Suite.load("demo").name
        'demo'
        """
        path = find_preset("benchmarks/suites", str(name_or_path), beside=beside)
        return cls.from_mapping(load_yaml(path), folder=path.parent, where=str(path))

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, folder: Path, where: str) -> Suite:
        """Build a suite from plain data. Raises ConfigError that lists all problems.

        folder: where `tasks_dir` starts. where: the file's name in messages.
        """
        groups: task_groups.Groups = {}
        location = data.get("tasks_dir") if isinstance(data, Mapping) else None
        if isinstance(location, str):
            location = (folder / expanded(location)).resolve()
            if not location.is_dir():
                raise ConfigError(
                    f"{where}: tasks_dir is not a folder",
                    expected="a folder of lm-eval task YAMLs, relative to the suite file",
                    got=str(location),
                )
            data = {**data, "tasks_dir": location}
        if isinstance(data, Mapping):
            data = with_template_text(data, folder, where)
            if isinstance(tasks := data.get("tasks"), list):
                rows = [
                    with_template_text(row, folder, where) if isinstance(row, Mapping) else row
                    for row in tasks
                ]
                own = location if isinstance(location, Path) else None
                rows, groups = task_groups.expanded(rows, own, where, keys=Asking.model_fields)
                data = {**data, "tasks": rows}
        suite = parse(cls, data, where)
        suite._folder, suite._groups = folder.resolve(), groups
        for what, paths in (("data", suite.data_files), ("scorer", suite.scorer_files)):
            if missing := [path for path in paths.values() if not path.is_file()]:
                raise ConfigError(f"{where}: {what} is not a file", got=str(missing[0]))
        return suite

    @classmethod
    def from_store(cls, data: Mapping[str, Any], where: str) -> Suite:
        """Return a suite as it was stored with a run. Raises ConfigError.

        Before models were asked with their chat template, runs stored no key for it; it was off.
        """
        return parse(cls, _BEFORE | dict(data), where)

    def as_stored(self, data: Mapping[str, Any]) -> Suite:
        """Return a file's suite, asked as in a run that stored `data` where both say nothing about it."""
        changes = {
            key: value
            for key, value in _BEFORE.items()
            if key not in data and key not in self.model_fields_set
        }
        return self.model_copy(update=changes)

    def asking(self, task: str) -> Asking:
        """Return how a task is put to models: its own keys, completed by the suite's."""
        return self[task].over(self)

    def weighted(self, weights: Mapping[str, float]) -> Suite:
        """Return the suite with the weights of some of its tasks replaced.

        Raises:
            ConfigError: there is no such task, or no skill task would count.
        """
        if unknown := [name for name in weights if name not in {task.task for task in self.tasks}]:
            raise ConfigError(
                f"suite {self.name!r} has no task {unknown[0]!r}, whose weight was set",
                fix=nearest(unknown[0], [task.task for task in self.tasks]),
            )
        tasks = [task.model_dump() | {"weight": weights.get(task.task, task.weight)} for task in self.tasks]
        where = f"suite {self.name!r} with new weights"
        changed = parse(Suite, self.model_dump() | {"tasks": tasks}, where)
        changed._folder, changed._groups = self._folder, self._groups
        return changed

    def files(self) -> dict[str, Path]:
        """Return the files that the tasks use, by name; see `evomerge.evaluation.task_files`."""
        own = self.data_files | self.scorer_files
        if self.tasks_dir is None:
            return own
        names = [task.source for task in self.tasks if task.data is None]
        return task_files.used(self.tasks_dir, names) | own

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The groups and tags of lm-eval that the suite's file names: name -> the tasks they stand for."""
        return dict(self._groups)

    @property
    def data_files(self) -> dict[str, Path]:
        """The files of the tasks' own data: as written in the suite -> path."""
        names = (task.data for task in self.tasks if task.data is not None)
        return {name: Path(os.path.normpath(self._folder / expanded(name))) for name in names}

    @property
    def scorer_files(self) -> dict[str, Path]:
        """The Python files that scorers name, and what these import from beside them: name -> path."""
        found: dict[str, Path] = {}
        for scorer in (task.scorer for task in self.tasks if task.scorer is not None):
            name = scorer.rpartition(":")[0]
            if name.endswith(".py"):
                path = self._folder / expanded(name)
                found |= {name: path} | task_files.imported(path, self._folder)
        return found

    def scorer_place(self, scorer: str) -> str:
        """Return a scorer with the whole path of its file."""
        place, _, function = scorer.rpartition(":")
        path = self._folder / expanded(place) if place.endswith(".py") else place
        return f"{path}:{function}"

    def file_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file that the tasks use; raise ConfigError where one can't be read."""
        return task_files.hashes(self.files())

    def test_digest(self) -> str:
        """Return a SHA-256 of what `test` is: its tasks, where their items come from, and their files."""
        tasks = sorted(
            {f"{task.source} {task.splits.test} {task.prompt} {task.choices}" for task in self.of("test")}
        )
        return hashlib.sha256(json.dumps([tasks, self.file_hashes()]).encode()).hexdigest()

    def digest(self, *, like: str = _DIGEST) -> str:
        """Return a SHA-256 over everything that determines the scores.

        That is the suite's content without `about`, and the names and bytes of the files that its tasks use,
        at any place. Built-in tasks belong to the lm-eval version, which a run records separately.

        like: a stored digest to compare with, which may be over all files of `tasks_dir`.

        Keys that say how models are asked count where they are set. `chat_template: off` and `companion: off`
        count as not set, as in runs that were stored before there were such keys; `long_prompts` changes no
        score.
        """
        content = self.model_dump(mode="json", exclude={"about", "tasks_dir", "tasks"})
        content = _without_unset(content)
        for key in ("chat_template", "companion"):
            if content.get(key) == OFF:
                del content[key]
        if self.near_duplicates == "keep":  # likewise
            del content["near_duplicates"]
        content["tasks"] = [_without_unset(task.model_dump(mode="json")) for task in self.tasks]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        older = not like.startswith(_DIGEST)
        files = task_files.all_below(self.tasks_dir) if older and self.tasks_dir else self.files()
        for name, file_hash in task_files.hashes(files).items():
            digest.update(f"\0{name}\0".encode())
            digest.update(bytes.fromhex(file_hash))
        return digest.hexdigest() if older else _DIGEST + digest.hexdigest()

    def of(self, split: Split) -> tuple[SuiteTask, ...]:
        """Return the tasks that have items in a split, in suite order."""
        assert split in SPLITS, split
        return tuple(task for task in self.tasks if task.splits[split] is not None)

    def __getitem__(self, task: str) -> SuiteTask:
        for spec in self.tasks:
            if spec.task == task:
                return spec
        raise KeyError(task)


def comparable(digest: str, other: str) -> bool:
    """Whether two stored digests of suites are over the same kind of files, so that they can be equal."""
    return digest.startswith(_DIGEST) == other.startswith(_DIGEST)


def _without_unset(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out keys of `Asking`, `of`, `smooth` and those of `data` that are not set; and `long_prompts`.

    Of a judge, what says how it is reached is left out, too.
    """
    asking = {*Asking.model_fields, "of", "smooth", "data", *_DATA_KEYS}
    kept = {
        key: value
        for key, value in content.items()
        if key != "long_prompts" and not (key in asking and value is None)
    }
    return kept | ({"judge": of_suite(kept["judge"])} if "judge" in kept else {})
