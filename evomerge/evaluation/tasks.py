"""Tasks: lm-eval's task objects for a suite, and their documents for each of our splits.

A `TaskBuilder` holds one loaded lm-eval task and its documents per split; `requests` turns a split's
documents into lm-eval Instances. All errors of a suite are raised here, before any model is loaded: unknown
tasks, dataset splits or metrics, too few documents, documents that are in several splits.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import errno
import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask

from evomerge.errors import ConfigError, UserError, nearest
from evomerge.evaluation import builtin_tasks, contamination, task_data
from evomerge.evaluation.answers import IsolatedMetrics
from evomerge.evaluation.asking import Asking
from evomerge.evaluation.live_lm import LiveLM, compiled_templates, quiet
from evomerge.evaluation.own_tasks import own_task
from evomerge.evaluation.permissions import (
    NOTHING,
    Permissions,
    check_task,
    check_types,
    executes_answers,
    refuse_answers,
)
from evomerge.evaluation.prompts import build_requests, set_up, template_of
from evomerge.evaluation.scores import SPLITS, Split
from evomerge.evaluation.suite import COHERENCE, LOGLIKELIHOOD, DrawnItems, Suite, SuiteTask
from evomerge.schema import load_yaml

FEWSHOT_SEED = 1234
"""Seed of the few-shot examples; lm-eval's own default, so that its prompts are reproduced."""

EXECUTES = "HF_ALLOW_CODE_EVAL"
"""The environment variable without which the library `evaluate` executes no answers."""

NOTICE = logging.WARNING + 1
"""Level of messages that people see on the terminal, where libraries' warnings are off."""
logging.addLevelName(NOTICE, "NOTICE")

_log = logging.getLogger(__name__)

_FILE_KINDS = ("json", "csv", "parquet", "arrow", "text")
"""Values of `dataset_path` that are the format of files."""
_HINTS = 5
_SAMPLE = 4


class TaskBuilder:
    """One task of a suite: its lm-eval task, its documents per split, its requests.

    spec: the suite's entry. asked: how models are asked. documents: split -> its documents in a fixed order.
    output_type: lm-eval's: loglikelihood, multiple_choice, loglikelihood_rolling or generate_until.
    metric, filter: the metric's name in lm-eval's results, and the filter whose results it is computed from.

    Raises:
        ConfigError: the dataset splits, the metric or the documents don't fit.
    """

    def __init__(self, spec: SuiteTask, task: Any, *, asked: Asking, lm: LiveLM, seed: int) -> None:
        self.spec, self.asked = spec, asked
        self.output_type: str = task.OUTPUT_TYPE
        self._task, self._lm = task, lm
        set_up(task, spec, asked)
        rolling = self.output_type == "loglikelihood_rolling"  # its texts are no conversations
        self._template = None if rolling else template_of(spec.task, asked, lm.tokenizer)
        self.templated = self._template is not None
        """Whether a chat template separates prompt and answer."""
        for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            if hasattr(task, name):
                setattr(task, name, _remembered(getattr(task, name)))
        self.documents = self._drawn(seed) if spec.splits.drawn else self._named(seed)
        shots = getattr(task.config, "num_fewshot", None)
        if shots is not None and (type(shots) is not int or shots < 0):
            raise ConfigError(
                f"task {spec.task!r}: num_fewshot", expected="a whole number, 0 or more", got=repr(shots)[:80]
            )
        if shots:
            self._keep_scored_documents_out_of_the_prompts()
        self.sample: tuple[Any, ...] = ()
        """A few requests with their answers, for checks before anything is scored."""
        self.metric, self.filter = self._metric()
        self.near_duplicates: tuple[contamination.NearDuplicate, ...] = ()
        """Items that were left out."""

    def texts(self) -> dict[Split, list[str]]:
        """Return what each item asks, by split; see `evomerge.evaluation.contamination`."""
        with compiled_templates():
            return {split: list(map(self._identity, docs)) for split, docs in self.documents.items()}

    @property
    def notes(self) -> list[str]:
        """What is odd about the items' ids."""
        parts: dict[str, list[Any]] = {}
        for split, docs in self.documents.items():
            parts.setdefault(str(self.spec.splits.dataset_split(split)), []).extend(docs)
        return task_data.repeated_ids(self.spec.task, parts)

    def leave_out(self, items: Sequence[contamination.NearDuplicate]) -> None:
        """Drop items of `search` and `select`; raise ConfigError where a split would lose all."""
        self.near_duplicates = tuple(items)
        self.documents = contamination.without(self.documents, items)

    def requests(self, split: Split) -> Any:
        """Return a copy of the lm-eval task whose `instances` are the split's requests.

        Few-shot examples are drawn from the same seed for every split.
        """
        return self._view(split, self.documents[split])

    def gold(self, document: Any) -> list[int]:
        """Return the indices of a multiple-choice document's right answers."""
        target = (
            self._task.doc_to_text(document)
            if getattr(self._task, "multiple_input", 0)
            else self._task.doc_to_target(document)
        )
        if isinstance(target, str):
            choices = self._task.doc_to_choice(document)
            return [choices.index(target)] if target in choices else []
        return [int(index) for index in (target if isinstance(target, list) else [target])]

    def _view(self, split: Split, documents: Sequence[Any]) -> Any:
        view = copy.copy(self._task)
        if (where := self.spec.splits.dataset_split(split)) is not None:
            # From this lm-eval knows the documents' split, and leaves each out of its own few-shot examples.
            view._config = copy.copy(view.config)
            view.set_config("test_split", where)
        if hasattr(view, "sampler"):
            view.sampler = copy.copy(view.sampler)
        view.set_fewshot_seed(FEWSHOT_SEED)
        view.doc_iterator = lambda **_: enumerate(documents)
        try:
            with quiet(), compiled_templates():
                build_requests(view, self.asked, self._template, self._lm)
        except ConfigError as error:
            raise ConfigError(
                f"task {self.spec.task!r}: {error.what}",
                expected=error.expected,
                got=error.got,
                fix=error.fix,
            ) from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # templates and code of the task
            raise ConfigError(
                f"task {self.spec.task!r} can't build its requests", got=f"{type(error).__name__}: {error}"
            ) from error
        for instance in view.instances:
            _check_request(self.spec.task, instance)
        return view

    def _named(self, seed: int) -> dict[Split, list[Any]]:
        if not isinstance(self._task, ConfigurableTask):
            raise ConfigError(
                f"task {self.spec.task!r} is written in Python and selects its dataset split itself",
                fix="give numbers of items for its splits",
            )
        pools: dict[str, list[Any]] = {}
        for split in reversed(SPLITS):  # so that more search items don't change the other splits
            if (name := self.spec.splits.dataset_split(split)) is None or name in pools:
                continue
            if name not in self._task.dataset:
                raise ConfigError(
                    f"task {self.spec.task!r} has no dataset split {name!r}",
                    fix=nearest(name, self._task.dataset),
                )
            view = copy.copy(self._task)
            view._config = copy.copy(view.config)
            view.set_config("test_split", name)
            pools[name] = _rows(view.test_docs())
            if not pools[name]:
                raise ConfigError(f"task {self.spec.task!r}: its dataset split {name!r} is empty")
        parts = {split: part for split in SPLITS if (part := self.spec.splits[split]) is not None}
        documents = {split: pools[name] for split, name in parts.items() if isinstance(name, str)}
        self._refuse_shared(documents)
        with compiled_templates():
            seen = {self._identity(document) for docs in documents.values() for document in docs}
        for name, pool in pools.items():
            drawn = {
                s: part.items
                for s, part in parts.items()
                if isinstance(part, DrawnItems) and part.from_ == name
            }
            documents |= self._draw(pool, drawn, [seed, _number(self.spec.source), _number(name)], seen)
        return {split: documents[split] for split in parts}

    def _refuse_shared(self, documents: Mapping[Split, Sequence[Any]]) -> None:
        owner: dict[str, Split] = {}
        shared: list[tuple[Split, Split, str]] = []
        with compiled_templates():
            for split, docs in documents.items():
                for key in {self._identity(document) for document in docs}:
                    if owner.setdefault(key, split) != split:
                        shared.append((owner[key], split, key))
        if shared:
            first, second, key = min(shared, key=lambda item: item[2])
            raise ConfigError(
                f"task {self.spec.task!r}: {len(shared)} items are in more than one split",
                expected="splits without common items, because shared items make held-out scores useless",
                got=f"in {first} and in {second}: {key[:80]}",
                fix="remove them from one of the dataset splits, or give numbers of items instead",
            )

    def _drawn(self, seed: int) -> dict[Split, list[Any]]:
        counts = {s: n for s in SPLITS if isinstance(n := self.spec.splits[s], int)}
        return self._draw(self._task.eval_docs, counts, [seed, _number(self.spec.source)], set())

    def _draw(
        self, pool: Any, counts: Mapping[Split, int], seeds: Sequence[int], seen: set[str]
    ) -> dict[Split, list[Any]]:
        """Draw documents that differ from each other and from those seen, which is completed by them."""
        if not counts:
            return {}
        before = len(seen)
        order = np.random.default_rng(seeds).permutation(len(pool))
        documents: dict[Split, list[Any]] = {split: [] for split in counts}
        # The test items are drawn first, so that more search items don't change the other splits.
        open_splits = [split for split in reversed(SPLITS) if split in counts]
        with compiled_templates():
            for index in order:
                document = pool[int(index)]
                if (key := self._identity(document)) in seen:
                    continue
                seen.add(key)
                documents[open_splits[0]].append(document)
                if len(documents[open_splits[0]]) == counts[open_splits[0]]:
                    open_splits.pop(0)
                    if not open_splits:
                        return documents
        raise ConfigError(
            f"task {self.spec.task!r} has too few items for its splits",
            expected=" + ".join(f"{n} ({split})" for split, n in counts.items()),
            got=f"{len(seen) - before} different items",
        )

    def _identity(self, document: Any) -> str:
        """Return a text that is equal for documents with the same question and choices.

        Few-shot examples don't count. The answer counts only if there is no question (plain text).
        """
        config = self._task.config
        python = not isinstance(self._task, ConfigurableTask)
        text = self._task.doc_to_text(document) if python or config.doc_to_text is not None else ""
        parts = [text] if isinstance(text, str) else []
        if config.doc_to_choice is not None:
            parts += [str(choice) for choice in self._task.doc_to_choice(document)]
        if not any(parts) or self.output_type == "loglikelihood_rolling":
            parts = [str(self._task.doc_to_target(document))]
        return "\n".join(parts)

    def _keep_scored_documents_out_of_the_prompts(self) -> None:
        scored = {_content(document) for docs in self.documents.values() for document in docs}
        task, sampler = self._task, getattr(self._task, "sampler", None)
        shown = task.fewshot_docs() if sampler is None else sampler.fewshot_docs()
        pool = [document for document in shown if _content(document) not in scored]
        shots = task.config.num_fewshot
        least = shots if isinstance(sampler, FirstNSampler) else shots + 1  # others may draw one too many
        if len(pool) < least:
            raise ConfigError(
                f"task {self.spec.task!r} takes its few-shot examples from the items it is scored on",
                expected=f"{least} examples or more that are in none of its splits",
                got=str(len(pool)),
                fix="set fewshot_split to another dataset split, or reduce the numbers of items",
            )
        if sampler is None:  # a task written in Python draws from one of these
            task._training_docs = task._fewshot_docs = pool
            return
        sampler.replace_df(pool)
        sampler.fewshot_indices = None  # they have been applied by fewshot_docs()

    def _metric(self) -> tuple[str, str | None]:
        """Return the metric and its filter, after processing a placeholder answer to the first document."""
        name, _, chosen = self.spec.metric.partition(",")
        if self.spec.smooth is not None and self.output_type != "generate_until":
            raise ConfigError(
                f"task {self.spec.task!r} generates no answers, so `smooth` says nothing about it",
                got=f"output_type: {self.output_type}",
                fix="remove smooth: the probability of right answers is this task's smooth signal",
            )
        if self.output_type == "loglikelihood_rolling":
            if name != LOGLIKELIHOOD:
                raise self._unknown_metric(name, [LOGLIKELIHOOD])
            return name, None
        generates = self.output_type == "generate_until"
        if self.spec.role != "skill" and generates != (self.spec.role == "coherence"):
            expected = {
                "retention": "a task with output_type: loglikelihood_rolling (texts), loglikelihood or "
                "multiple_choice (right answers), or `data` with prompts and answers",
                "coherence": "a task with output_type: generate_until",
            }
            raise ConfigError(
                f"task {self.spec.task!r} can't measure {self.spec.role}",
                expected=expected[self.spec.role],
                got=f"output_type: {self.output_type}",
            )
        if self.spec.role == "retention":
            return LOGLIKELIHOOD, None
        view = self._view("test", self.documents["test"][:_SAMPLE])
        self.sample = tuple(view.instances)
        first = [instance for instance in view.instances if instance.doc_id == 0]
        for instance in view.instances:
            instance.resps = ["" if instance.request_type == "generate_until" else (-1.0, False)]
            instance.resps *= instance.repeats or 1
        try:
            view.apply_filters()
            filters = list(view.instances[0].filtered_resps)
            if chosen and chosen not in filters:
                raise ConfigError(
                    f"task {self.spec.task!r} has no filter {chosen!r}", fix=nearest(chosen, filters)
                )
            key = chosen or filters[0]
            if self.spec.role == "coherence":
                return COHERENCE, key
            results = view.process_results(first[0].doc, [instance.filtered_resps[key] for instance in first])
        except (KeyboardInterrupt, ConfigError):
            raise
        except BaseException as error:
            if EXECUTES in str(error):
                raise ConfigError(
                    f"task {self.spec.task!r} executes the models' answers as code, but does not say so",
                    expected="unsafe_code: true in its YAML, so that they are executed in a sandbox",
                ) from error
            raise ConfigError(
                f"task {self.spec.task!r} can't process a result", got=f"{type(error).__name__}: {error}"
            ) from error
        for metric in filter(None, (name, self.spec.smooth)):
            self._check_metric(metric, results, view.higher_is_better())
        return name, key

    def _check_metric(self, name: str, results: Mapping[str, Any], higher: Mapping[str, bool]) -> None:
        numbers = [key for key, value in results.items() if is_number(value)]
        if name in results and name not in numbers:
            raise ConfigError(
                f"task {self.spec.task!r}: metric {name!r} has no value for a single item",
                fix=f"use a per-item metric: {', '.join(numbers) or 'this task has none'}",
            )
        if name not in results:
            raise self._unknown_metric(name, numbers)
        if higher.get(name) is False:
            raise ConfigError(
                f"task {self.spec.task!r}: lower is better for its metric {name!r}",
                expected="a metric where higher is better",
                fix=f"choose another, or define one in the task's YAML. Per item: {', '.join(numbers)}",
            )

    def _unknown_metric(self, name: str, valid: Iterable[str]) -> ConfigError:
        return ConfigError(f"task {self.spec.task!r} has no metric {name!r}", fix=nearest(name, valid))


def build(suite: Suite, *, lm: LiveLM, seed: int, permissions: Permissions = NOTHING) -> list[TaskBuilder]:
    """Load a suite's tasks, in suite order.

    lm: tokenises and renders prompts. Raises ConfigError: as in `load` and TaskBuilder.
    """
    named = [spec.source for spec in suite.tasks if spec.data is None]
    loaded = iter(load(suite, named, permissions) if named else ())
    tasks = [
        next(loaded) if spec.data is None else own_task(suite, spec, permissions) for spec in suite.tasks
    ]
    builders = []
    for spec, task in zip(suite.tasks, tasks, strict=True):
        unsafe = getattr(task, "UNSAFE_CODE", False)  # a class can say so too
        if unsafe or executes_answers({"metric_list": task.config.metric_list}):
            refuse_answers(spec.task, permissions, got="UNSAFE_CODE of its class")
            task.process_results = IsolatedMetrics(suite, spec.source, permissions, task.aggregation())
        try:
            with quiet():
                builders.append(TaskBuilder(spec, task, asked=suite.asking(spec.task), lm=lm, seed=seed))
        except (KeyboardInterrupt, UserError):
            raise
        except BaseException as error:
            raise ConfigError(
                f"task {spec.task!r} can't be used", got=f"{type(error).__name__}: {error}"
            ) from error
    _leave_out_near_duplicates(suite, builders)
    return builders


def _leave_out_near_duplicates(suite: Suite, builders: Sequence[TaskBuilder]) -> None:
    """Drop items that ask nearly the same as one of a later split, or raise ConfigError."""
    if suite.near_duplicates == "keep":
        return
    found = contamination.near_duplicates({builder.spec.task: builder.texts() for builder in builders})
    if suite.near_duplicates == "refuse":
        contamination.refuse(found)
    for builder in builders:
        builder.leave_out([item for item in found if item.task == builder.spec.task])


def load(suite: Suite, names: Sequence[str], permissions: Permissions) -> list[Any]:
    """Load tasks of a suite as lm-eval's task objects, in the order of their names.

    Raises:
        ConfigError: a task is unknown or can't be loaded, or would run code without permission.
    """
    with quiet():
        manager = _manager(suite, names)
        valid = set(manager.all_subtasks)
        for name in names:
            if name not in valid:
                raise _unknown_task(suite, name, valid, name in manager.all_tasks)
        for name in names:
            entry = manager.task_index[name]
            check_task(name, Path(entry.yaml_path), entry.cfg or {}, permissions)
        for name in dict.fromkeys(names):
            _announce(name, manager.task_index[name].cfg or {})
        return [_loaded(manager, name, permissions) for name in names]


def _loaded(manager: Any, name: str, permissions: Permissions) -> Any:
    try:
        with _code_eval(allowed=permissions.allow_code_execution):
            return _load(manager, name)
    except ConfigError as error:
        raise ConfigError(
            f"task {name!r}: {error.what}", expected=error.expected, got=error.got, fix=error.fix
        ) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code of the task may call sys.exit
        raise ConfigError(
            f"task {name!r} can't be loaded", got=f"{type(error).__name__}: {error}", fix=_advice(error)
        ) from error


def _announce(name: str, config: Mapping[str, Any]) -> None:
    """Say that a task's data may be downloaded, unless it is in local files."""
    place = config.get("dataset_path")
    if isinstance(place, str) and place not in _FILE_KINDS and not Path(place).exists():
        part = f" ({config['dataset_name']})" if config.get("dataset_name") else ""
        if multiprocessing.parent_process() is None:  # once, not by every worker
            text = "task %s: loading the data set %s%s; the first time it is downloaded"
            _log.log(NOTICE, text, name, place, part)


def _advice(error: BaseException) -> str | None:
    """Say what to do where a task's data can't be loaded or written, or its code needs a package."""
    if isinstance(error, ConnectionError):
        return "load the suite once where the hub can be reached; its cache (HF_HOME) can be copied"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"install the package that has {error.name}; for IFEval's checks: pip install 'evomerge[ifeval]'"
        )
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
        return f"if {error.filename or 'the home folder'} can't be written, set HF_HOME to a folder that can"
    return None


@contextlib.contextmanager
def _code_eval(*, allowed: bool) -> Iterator[None]:
    """Let the library `evaluate` load its metric code_eval, or not; afterwards it refuses to execute answers.

    lm-eval's tasks try the metric on code of their own while they are loaded.
    """
    os.environ.pop(EXECUTES, None)
    if allowed:
        os.environ[EXECUTES] = "1"
    try:
        yield
    finally:
        os.environ.pop(EXECUTES, None)


def _check_request(task: str, instance: Any) -> None:
    """Refuse a request that no model can answer: something else than texts, or an empty answer."""
    asked = instance.args[:2] if instance.request_type == "loglikelihood" else instance.args[:1]
    if not asked or not all(isinstance(part, str) for part in asked) or not asked[-1]:
        raise ConfigError(
            f"task {task!r}: item {instance.doc_id} gives a request that can't be scored",
            expected="texts, and an answer that is not empty",
            got=", ".join(repr(part)[:80] for part in asked) or "nothing",
            fix="check doc_to_text and doc_to_target, and that the data has their columns in every row",
        )


def _number(name: str) -> int:
    """Return a number for a name, as a seed."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_number(value: object) -> bool:
    """Say whether a metric's value is a single number, and not data for an aggregation."""
    return isinstance(value, int | float | np.number | np.bool_)


def _manager(suite: Suite, names: Sequence[str]) -> Any:
    """Return lm-eval's index of the suite's own tasks, and of its built-in ones for all other names."""
    own: list[str] = []
    if suite.tasks_dir is not None:
        for path in sorted(Path(suite.tasks_dir).rglob("*.yaml")):
            data = load_yaml(path, task_file=True)  # lm-eval skips a malformed file without a message
            check_types(path, data)
        own = [str(suite.tasks_dir)]
        manager = lm_eval.tasks.TaskManager(include_path=own, include_defaults=False)
        names = [name for name in names if name not in manager.all_tasks]
        if not names:
            return manager
    # Indexing all built-in tasks takes half a minute, and searching the folders of a few tasks two seconds.
    folders = builtin_tasks.folders(names)
    if folders or own:  # the suite's own come last, where they replace others with the same name
        manager = lm_eval.tasks.TaskManager(include_path=[*folders, *own], include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    if own:
        return manager
    for name in names:
        if not builtin_tasks.mentioned(name):
            raise _unknown_task(suite, name, set(builtin_tasks.places()), False)
    return lm_eval.tasks.TaskManager()


def _unknown_task(suite: Suite, name: str, valid: set[str], group: bool) -> ConfigError:
    own = f"in {suite.tasks_dir}, nor " if suite.tasks_dir is not None else ""
    where = f"{own}among lm-eval's built-in tasks"
    if group:
        return ConfigError(
            f"suite {suite.name!r}: {name!r} is a group of tasks",
            expected="the name of one task in `of`",
            fix="write `task: GROUP` without `of`, or list its tasks separately",
        )
    close = difflib.get_close_matches(name, sorted(valid), n=_HINTS)
    hint = nearest(name, sorted(valid)) if suite.tasks_dir is not None else f"nearest: {', '.join(close)}"
    return ConfigError(f"suite {suite.name!r}: there is no task {name!r} {where}", fix=hint)


def _load(manager: Any, name: str) -> Any:
    entry = manager.task_index[name]
    options = (entry.cfg or {}).get("dataset_kwargs") or {}
    overrides: dict[str, Any] = {}
    if entry.yaml_path is not None and "data_files" in options:
        folder = Path(entry.yaml_path).resolve().parent
        task_data.refuse_empty(entry.cfg.get("dataset_path"), options["data_files"], folder)
        files = _absolute(options["data_files"], folder)
        overrides = {"dataset_kwargs": {**options, "data_files": files}}
    # lm-eval loads a named task with some keys replaced as a member of a group.
    group = {"group": f"evomerge_{name}", "task": [{"task": name, **overrides}]}
    return manager.load([group])["tasks"][name]


def _absolute(files: Any, folder: Path) -> Any:
    """Make local paths in `data_files` absolute, because lm-eval starts them at the current folder."""
    if isinstance(files, Mapping):
        return {key: _absolute(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_absolute(value, folder) for value in files]
    local = folder / str(files)
    if Path(str(files)).is_absolute():
        return files
    return str(local) if "://" not in str(files) and any(folder.glob(str(files))) else files


def _remembered(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a doc_to_* method so that the rendering of a document is computed only once.

    Documents are recognised by `id`, and a reference to each is kept, so that no `id` is reused.
    """
    renderings: dict[int, tuple[Any, Any]] = {}

    def call(document: Any, *other_template: Any) -> Any:
        if any(template is not None for template in other_template):
            return method(document, *other_template)
        if (rendering := renderings.get(id(document))) is None:
            rendering = renderings[id(document)] = (document, method(document))
        return rendering[1]

    return call


def _rows(documents: Any) -> list[Any]:
    """Return a dataset's rows, read by column, which takes a tenth of the time of iterating over rows."""
    if not isinstance(documents, datasets.Dataset):
        return list(documents)
    columns = documents[:]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _content(document: Any) -> str:
    return json.dumps(document, sort_keys=True, default=str)
