"""Permissions: which code of a suite's tasks may run, and whether its judges may be asked, as the user said.

A task file can name Python code, and a task can execute a model's answers. Neither runs unless the user
allows it. The files are checked as text, before lm-eval reads them, because lm-eval imports the code that a
file names while it reads it. Trusted without being asked: lm-eval's own tasks and those of evomerge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError
from evomerge.files import expanded
from evomerge.schema import PythonName, load_yaml, preset_folder

CODE_EVAL = "code_eval"
"""The metric of the library `evaluate` that executes answers."""

_GENERATION_CODE = ("custom_generate", "trust_remote_code")


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """What the user allowed.

    trust_tasks: Python code that task files name may run. allow_code_execution: models' answers may be
    executed, in a process with limits (see `evaluation.sandbox`). ask_judges: prompts and answers may be sent
    to the servers of the suite's judges.
    """

    trust_tasks: bool = False
    allow_code_execution: bool = False
    ask_judges: bool = False

    @property
    def options(self) -> str:
        """The options of a command line that give them."""
        return (
            " --trust-tasks" * self.trust_tasks
            + " --allow-code-execution" * self.allow_code_execution
            + " --ask-judges" * self.ask_judges
        )


NOTHING = Permissions()
"""The default: no code runs, and no judge is asked."""


def executes_answers(config: Mapping[str, Any]) -> bool:
    """Say whether a task executes answers as code.

    config: the task's file with its includes merged.
    """
    metrics = config.get("metric_list") or ()
    names = [metric.get("metric") for metric in metrics if isinstance(metric, Mapping)]
    return config.get("unsafe_code", False) is not False or CODE_EVAL in map(str, names)


def check_types(path: Path, data: Mapping[str, Any]) -> None:
    """Refuse a task file whose names, metrics or includes are of another type; raise ConfigError."""
    for key in ("task", "group", "tag", "include"):
        if not isinstance(data.get(key, ""), str | list):
            raise ConfigError(f"{path}: {key}", expected="a name, or a list", got=repr(data[key])[:80])
    if not isinstance(data.get("metric_list") or [], list):
        raise ConfigError(f"{path}: metric_list", expected="a list", got=repr(data["metric_list"])[:80])


def check_task(name: str, path: Path, config: Mapping[str, Any], permissions: Permissions) -> None:
    """Refuse a task that would run code without permission; raise ConfigError.

    path: the task's file. config: its contents with its includes merged, read as plain data.
    """
    for file, data in _chain(path):
        code = next(_code(data), None)
        if code is not None and not permissions.trust_tasks:
            raise ConfigError(
                f"task {name!r} would run Python code: {code}",
                expected="a task without code, or your permission to run it",
                got=str(file),
                fix="read that code first; if you trust it, set trust_tasks: true in the run config, "
                "or add --trust-tasks",
            )
    if executes_answers(config):
        refuse_answers(
            name, permissions, got=f"{'unsafe_code' if 'unsafe_code' in config else CODE_EVAL} in {path}"
        )


def refuse_answers(name: str, permissions: Permissions, *, got: str) -> None:
    """Refuse a task that executes answers, unless that is allowed; raise ConfigError.

    got: what says that it executes them.
    """
    if not permissions.allow_code_execution:
        raise ConfigError(
            f"task {name!r} executes the models' answers as code",
            expected="your permission",
            got=got,
            fix="set allow_code_execution: true in the run config, or add --allow-code-execution; "
            "the answers then run in a process with limits (docs/security.md)",
        )


def _chain(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a task file and all that it includes, as lm-eval finds them; trusted files are left out."""
    waiting, seen = [path], set()
    while waiting:
        file = expanded(waiting.pop()).resolve()
        if file in seen or _trusted(file):
            continue
        seen.add(file)
        data = load_yaml(file, task_file=True)
        check_types(file, data)
        yield file, data
        included = data.get("include") or ()
        for place in [included] if isinstance(included, str) else included:
            waiting.append(file.parent / str(place))


def _trusted(file: Path) -> bool:
    """Say whether a file, with links resolved, belongs to lm-eval or to evomerge."""
    import lm_eval.tasks

    ours = preset_folder("benchmarks/suites").parent / "tasks"
    return any(file.is_relative_to(root.resolve()) for root in (Path(lm_eval.tasks.__file__).parent, ours))


def _code(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what in a task file leads to the execution of Python code."""
    yield from (f"!function {name}" for name in _functions(data))
    if "class" in data:
        yield f"the class {data['class']}"
    if data.get("use_prompt") is not None:
        yield f"the prompt {data['use_prompt']} of another package or file"
    metrics = data.get("metric_list")
    for metric in metrics if isinstance(metrics, list) else ():
        if isinstance(metric, Mapping) and not _is_lm_evals(metric):
            yield f"the metric {metric.get('metric')}, a script of the library `evaluate`"
    options = data.get("generation_kwargs")
    for key in _GENERATION_CODE:
        if isinstance(options, Mapping) and options.get(key):
            yield f"generation_kwargs: {key}"


def _is_lm_evals(metric: Mapping[str, Any]) -> bool:
    """Say whether lm-eval has a metric itself; it loads all others as scripts, from a folder or the hub."""
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    return str(metric.get("metric")) in metric_registry and not metric.get("hf_evaluate")


def _functions(data: object) -> Iterator[PythonName]:
    if isinstance(data, PythonName):
        yield data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _functions(key)
            yield from _functions(value)
    elif isinstance(data, Sequence) and not isinstance(data, str):
        for value in data:
            yield from _functions(value)
