"""A config from a file or from a dict, with the same checks for both."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from evomerge.config import RunConfig
from evomerge.errors import ConfigError
from evomerge.schema import load_yaml, parse_yaml

AnyConfig = str | PathLike[str] | Mapping[str, Any] | RunConfig
"""The path of a YAML file, the same as a dict, or a config that was read."""
Answers = Callable[[str, dict[str, Any]], float | dict[str, float]]
"""A scorer: (answer, row of the data file) -> a number, or several by name."""


def read(
    config: AnyConfig,
    *,
    scorer: Answers | None = None,
    seed: int | None = None,
    out: str | PathLike[str] | None = None,
    **budget: Any,
) -> RunConfig:
    """Return a run config with everything resolved that it names.

    Args:
        config: the path of a YAML file or a dict with the same keys. Relative paths of a dict start in the
            working directory.
        scorer: scores the generated answers of tasks with data of their own that name no `scorer` and no
            `choices`. The function must be in a file or an installed module, because workers import it.
        seed, out: replace those of the config.
        **budget: `workers` and `device` of the executor, `scores_from`, and limits that replace those of the
            config: `evaluations`, `items`, `generations`, `hours`, `until`, `cost`, `patience`, `failures`,
            `per_hour`.

    Raises:
        ConfigError: the config has mistakes; all are listed.
    """
    place = None if out is None else str(out)
    if isinstance(config, RunConfig):
        changes: dict[str, Any] = {
            name: value for name, value in (("seed", seed), ("out", place)) if value is not None
        }
        if budget or scorer is not None:
            raise ConfigError(
                "a RunConfig takes no further settings", fix="give the path of its file, or a dict"
            )
        return config.model_copy(update=changes)
    if isinstance(config, Mapping):
        data = plain(config, "config")
        return _of(data, scorer, Path.cwd(), "config", seed=seed, out=place, **budget)
    path = Path(config)
    if scorer is None:
        return RunConfig.load(path, seed=seed, out=place, **budget)
    return _of(load_yaml(path), scorer, path.resolve().parent, str(path), seed=seed, out=place, **budget)


def _of(
    data: Mapping[str, Any], scorer: Answers | None, folder: Path, where: str, **replaced: Any
) -> RunConfig:
    if scorer is None:
        return RunConfig.of(data, folder=folder, where=where, **replaced)
    suite = data.get("suite")
    if not isinstance(suite, Mapping):
        raise ConfigError(
            f"{where}: a scorer needs a suite that is written out in the config",
            expected="suite: {name: ..., tasks: [{task: ..., data: FILE, prompt: COLUMN, answer: COLUMN}]}",
            got=f"suite: {suite!r}",
            fix="write the suite out, or name the scorer in the suite's file",
        )
    code = place_of(scorer)
    tasks = [
        {**task, "scorer": code}
        if isinstance(task, Mapping) and "data" in task and not {"choices", "scorer"} & set(task)
        else task
        for task in suite.get("tasks") or ()
    ]
    if not any(isinstance(task, Mapping) and task.get("scorer") == code for task in tasks):
        raise ConfigError(
            f"{where}: no task for the scorer",
            expected="a task with `data`, `prompt` and `answer`, without `choices` and `scorer`",
            fix="remove `scorer` or `choices` of the task that the function is to score",
        )
    data = {**data, "suite": {**suite, "tasks": tasks}, "trust_tasks": True}
    return RunConfig.of(data, folder=folder, where=where, **replaced)


def place_of(function: Answers) -> str:
    """Return where workers find a function: `module:name`, or `file.py:name` for that of a script.

    Raises:
        ConfigError: it has no name there, like a lambda or a function of a notebook.

    >>> import textwrap
    >>> place_of(textwrap.indent)
    'textwrap:indent'
    """
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = None
    found = getattr(sys.modules.get(module), name, None) is function
    if not found or (module == "__main__" and not (file and Path(file).is_file())):
        raise ConfigError(
            "scorer: workers could not import this function",
            expected="a function that a module or a file defines at its top level",
            got=f"{module}.{name}" if name else repr(function)[:80],
            fix="write it to a file beside the data, and import it from there",
        )
    return f"{Path(str(file)).resolve()}:{name}" if module == "__main__" else f"{module}:{name}"


def plain(value: Any, where: str) -> Any:
    """Return a dict as YAML would have given it: paths become texts, tuples lists; raise ConfigError."""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"{where}: keys are texts", got=repr(wrong[0])[:80])
        checked = {key: plain(item, f"{where}: {key}") for key, item in value.items()}
        return parse_yaml(yaml.safe_dump(checked, sort_keys=False)) if where == "config" else checked
    if isinstance(value, str):
        return str(value)
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, Sequence):
        return [plain(item, where) for item in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a number of numpy or torch
    if value is None or isinstance(value, bool | int | float):
        return value
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"), where)
    raise ConfigError(
        f"{where}: not a value that a config can have",
        expected="a text, a number, true or false, a list or a dict",
        got=type(value).__name__,
    )
