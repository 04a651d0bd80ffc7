"""Prompts: an lm-eval task set up as its suite says, and its requests built with the chat template.

Prompts are lm-eval's own: this module passes it the settings that its command line would pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import jinja2
from lm_eval.api.registry import filter_registry
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.filters import build_filter_ensemble

from evomerge.errors import ConfigError, nearest
from evomerge.evaluation.asking import AUTO, OFF, Asking, is_source
from evomerge.evaluation.live_lm import LiveLM
from evomerge.evaluation.suite import SuiteTask

_RUNS_CODE = ("custom",)
"""Filters that need a Python function, which a suite can't name."""
_GENERATES = ("gen_kwargs", "think_end_token", "companion")
"""Keys of a task that say something about generated answers only."""
_PROMPTED = ("chat_template", "system_prompt", "description", "fewshot_as_multiturn")
"""Keys of a task that only lm-eval's own way to build a prompt obeys."""


def set_up(task: Any, spec: SuiteTask, asked: Asking) -> None:
    """Replace settings of an lm-eval task by those of its suite, as lm-eval's command line would.

    task: a loaded task, which is changed. spec: the suite's entry. asked: how the task is asked.

    Raises:
        ConfigError: a key of the entry has no effect on this kind of task, or a filter is not lm-eval's.
    """
    _refuse_without_effect(task, spec, asked)
    config = task.config
    if spec.num_fewshot is not None:
        config.num_fewshot = spec.num_fewshot
    elif asked.num_fewshot is not None and config.num_fewshot != 0:
        config.num_fewshot = asked.num_fewshot
    if asked.description is not None:
        config.description = asked.description
    if asked.gen_kwargs is not None and config.output_type == "generate_until":
        config.generation_kwargs = {
            **copy.deepcopy(config.generation_kwargs or {}),
            **asked.gen_kwargs.given(),
        }
    if asked.filters is not None:
        task._filters = [_pipeline(spec.task, pipeline.name, pipeline.filter) for pipeline in asked.filters]


def _refuse_without_effect(task: Any, spec: SuiteTask, asked: Asking) -> None:
    own = spec.asked()
    if asked.enable_thinking and task.OUTPUT_TYPE in ("loglikelihood", "multiple_choice"):
        raise ConfigError(
            f"task {spec.task!r} scores given answers, before which a model can't reason",
            expected="enable_thinking: true only for tasks with output_type: generate_until",
            got=f"output_type: {task.OUTPUT_TYPE}",
            fix="set enable_thinking: false in the task's entry",
        )
    if task.OUTPUT_TYPE != "generate_until" and (key := next(filter(own.get, _GENERATES), None)):
        raise ConfigError(
            f"task {spec.task!r}: {key} is about generated answers, but the task generates none",
            expected="a task with output_type: generate_until",
            got=f"output_type: {task.OUTPUT_TYPE}",
            fix=f"remove {key} from the task, or set it for the whole suite",
        )
    builds_alone = (
        not isinstance(task, ConfigurableTask) and type(task).fewshot_context is Task.fewshot_context
    )
    if builds_alone and (key := next((key for key in _PROMPTED if own.get(key) not in (None, OFF)), None)):
        raise ConfigError(
            f"task {spec.task!r} is written in Python and builds its prompts itself, without {key}",
            fix=f"remove {key} from the task",
        )


def _pipeline(task: str, name: str, steps: tuple[Mapping[str, Any], ...]) -> Any:
    valid = [function for function in filter_registry if function not in _RUNS_CODE]
    components = []
    for step in steps:
        if step["function"] not in valid:
            raise ConfigError(
                f"task {task!r}: filter {name!r}: there is no function {step['function']!r}",
                fix=nearest(step["function"], valid),
            )
        components.append((step["function"], {key: step[key] for key in step if key != "function"}))
    pipeline = build_filter_ensemble(name, components)
    try:
        for make in pipeline.filters:
            make()
    except Exception as error:
        raise ConfigError(
            f"task {task!r}: filter {name!r} can't be made", got=f"{type(error).__name__}: {error}"
        ) from error
    return pipeline


def template_of(task: str, asked: Asking, tokenizer: Any) -> str | None:
    """Return the jinja text of a task's chat template, None for plain text.

    Raises:
        ConfigError: the tokenizer has no template of that name, or several and none is the default.
    """
    choice = asked.chat_template or OFF
    if choice == OFF or is_source(choice):
        return None if choice == OFF else choice
    own = tokenizer.chat_template or {}
    templates: Mapping[str, str] = own if isinstance(own, Mapping) else {"default": own}
    if choice == AUTO and not templates:
        if asked.enable_thinking:
            raise ConfigError(
                f"task {task!r}: enable_thinking is an argument of the chat template, "
                "but the tokenizer has none",
                fix="remove enable_thinking, or set chat_template to a jinja file beside the suite",
            )
        return None
    name = "default" if choice == AUTO else choice
    if name in templates:
        return templates[name]
    if choice == AUTO:
        raise ConfigError(
            f"task {task!r}: the tokenizer has several chat templates and none is its default",
            expected="chat_template: the name of one of them",
            got=", ".join(sorted(templates)),
        )
    raise ConfigError(
        f"task {task!r}: there is no chat template {choice!r}",
        expected="auto, off, the name of one of the tokenizer's templates, or a jinja file beside the suite",
        got=f"a tokenizer with {', '.join(sorted(templates)) or 'no template'}",
        fix=nearest(choice, templates) if templates else "set chat_template: off, or give a file",
    )


def build_requests(view: Any, asked: Asking, template: str | None, lm: LiveLM) -> None:
    """Build the requests of a task's documents as lm-eval's command line does.

    view: a copy of the task that iterates over the documents. template: from `template_of`.

    Raises:
        ConfigError: the chat template has no system turn, which a system prompt needs.
    """
    render = None
    if template is not None:
        render = lm.renderer(template, thinking=asked.enable_thinking)
        if asked.system_prompt:
            _refuse_dropped(template, asked.system_prompt, lm.tokenizer)
    view.build_all_requests(
        system_instruction=asked.system_prompt,
        apply_chat_template=render is not None,
        fewshot_as_multiturn=render is not None and asked.fewshot_as_multiturn is not False,
        chat_template=render,
    )


def _refuse_dropped(template: str, system_prompt: str, tokenizer: Any) -> None:
    """Refuse a template that fails on a system turn, because lm-eval then leaves the turn out."""
    turns = [{"role": "system", "content": system_prompt}, {"role": "user", "content": "?"}]
    try:
        tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except jinja2.TemplateError as error:
        raise ConfigError(
            "the chat template refuses a system prompt",
            got=str(error),
            fix="remove system_prompt and write its text into the tasks' questions, or use another template",
        ) from None
