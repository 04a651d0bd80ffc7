"""Asking: how a suite's tasks are put to a model, from chat template to answer filter, as data.

The keys stand in a suite for all of its tasks, or in a task for that one. `evomerge.evaluation.prompts`
carries them out with lm-eval.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from evomerge.errors import ConfigError
from evomerge.files import expanded, read_regular
from evomerge.schema import LARGEST_COUNT, LARGEST_FACTOR, Strict

AUTO, OFF, SPECIALIST, DISTRIBUTION = "auto", "off", "specialist", "distribution"
LARGEST_TEMPLATE = 1_000_000
"""Bytes of a template file; the longest ones of the hub have some 20,000."""

_ENDINGS = (".jinja", ".jinja2", ".j2", ".txt")


class GenerationSpec(Strict):
    """How answers are generated; each key replaces that of the task's own `generation_kwargs`.

    Without `do_sample` and `temperature`, generation is greedy. Sampling draws from a fixed seed.
    """

    max_gen_toks: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    """Longest answer in tokens."""
    until: str | tuple[str, ...] | None = None
    """Texts that end an answer; they are no part of it."""
    do_sample: bool | None = None
    """Draw each token instead of taking the likeliest one."""
    temperature: float | None = Field(None, ge=0, le=LARGEST_FACTOR)
    """Of the draws."""
    top_k: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    """Draw among this many of the likeliest tokens."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw among the likeliest tokens that have this probability together."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Draw among tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float | None = Field(None, gt=0, le=LARGEST_FACTOR)
    """Divides the scores of tokens that occurred before."""

    def given(self) -> dict[str, Any]:
        """Return the keys that were set, as lm-eval takes them."""
        data = self.model_dump(exclude_none=True)
        if isinstance(until := data.get("until"), tuple):
            data["until"] = list(until)
        return data


class FilterSpec(Strict):
    """A filter pipeline, as in lm-eval's `filter_list`."""

    name: str = Field(min_length=1)
    """Its name, which `metric: METRIC,NAME` picks."""
    filter: tuple[dict[str, Any], ...] = Field(min_length=1)
    """Its steps: `function`, one of lm-eval's filters, and its arguments."""

    @field_validator("filter")
    @classmethod
    def _functions(cls, steps: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for step in steps:
            if not isinstance(step.get("function"), str):
                raise ValueError("every step needs a `function`, the name of one of lm-eval's filters")
        return steps


class Asking(Strict):
    """How a task is put to a model. Keys of a task replace those of the suite."""

    chat_template: str | None = Field(None, min_length=1)
    """`auto` (the suite's default): the tokenizer's own, if it has one; `off`: plain text; the name of one of
    its templates; or a jinja file, relative to the suite's file."""
    system_prompt: str | None = None
    """Text of the system turn, before `description`."""
    description: str | None = None
    """Replaces the task's own: a text before the examples and the question."""
    num_fewshot: int | None = Field(None, ge=0, le=LARGEST_COUNT)
    """Number of solved examples in a prompt. In a suite, tasks whose file says 0 keep it."""
    fewshot_as_multiturn: bool | None = None
    """Examples as turns of a conversation (default with a template), or in one user turn."""
    gen_kwargs: GenerationSpec | None = None
    """How answers are generated."""
    enable_thinking: bool | None = None
    """An argument of the chat template: whether the model reasons before it answers."""
    think_end_token: int | str | None = None
    """The text or token that ends the reasoning. Only what follows it is scored."""
    filters: tuple[FilterSpec, ...] | None = None
    """Replaces the task's own `filter_list`: what is taken from an answer before it is scored."""
    companion: Literal["auto", "off", "specialist", "distribution"] | None = None
    """`auto` (the suite's default): the search also sees the likelihood of the gold answer of tasks that
    generate, which costs one forward pass more; `specialist`: on `search` of its specialist's own answer
    where that is right; `distribution`: the exact metric alone, but gradients follow what its specialist
    expects at each token of its own answers, which needs no right ones; `off`: the exact metric alone."""
    long_prompts: Literal["refuse", "cut"] | None = None
    """A prompt longer than the model's context is an error (the suite's default), or loses its start."""

    @field_validator("chat_template", "companion", mode="before")
    @classmethod
    def _yaml_flags(cls, value: object) -> object:
        """YAML reads `off` as false."""
        return {"False": OFF, "True": AUTO}.get(str(value), value)

    @field_validator("filters")
    @classmethod
    def _names(cls, filters: tuple[FilterSpec, ...] | None) -> tuple[FilterSpec, ...] | None:
        names = [pipeline.name for pipeline in filters or ()]
        if filters is not None and (not names or len(set(names)) < len(names)):
            raise ValueError("expected at least one filter, and every name once")
        return filters

    def asked(self) -> dict[str, Any]:
        """Return the keys that are set."""
        values = {name: getattr(self, name) for name in Asking.model_fields}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, common: Asking) -> Asking:
        """Return these keys, completed by those of the suite; `gen_kwargs` are completed key by key."""
        merged = common.asked() | self.asked()
        if common.gen_kwargs is not None and self.gen_kwargs is not None:
            merged["gen_kwargs"] = GenerationSpec.model_validate(
                common.gen_kwargs.given() | self.gen_kwargs.given()
            )
        return Asking.model_construct(**{name: merged.get(name) for name in Asking.model_fields})

    def contradiction(self) -> str | None:
        """Say which keys, after `over`, exclude each other; None where none do."""
        if self.enable_thinking and self.think_end_token is None:
            return (
                "enable_thinking needs think_end_token, which ends the reasoning: only what follows is scored"
            )
        if self.chat_template == OFF and self.enable_thinking:
            return "enable_thinking is an argument of the chat template, which is off"
        if self.chat_template == OFF and self.fewshot_as_multiturn:
            return "fewshot_as_multiturn needs a chat template, which is off"
        return None


def is_source(template: str) -> bool:
    """Say whether a chat template is jinja text, not a name."""
    return "{" in template


def with_template_text(data: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Return a suite's or task's plain data with the text of its template file in place of the path.

    So the template is part of the suite: of its digest, and of what is stored and sent to workers.

    Raises:
        ConfigError: the file is missing or holds no template.
    """
    name = data.get("chat_template")
    if not isinstance(name, str) or name in (AUTO, OFF) or is_source(name):
        return dict(data)
    path = folder / expanded(name)
    if not path.is_file() and "/" not in name and not name.endswith(_ENDINGS):
        return dict(data)  # the name of a tokenizer's template
    try:
        text = read_regular(path, LARGEST_TEMPLATE).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"{where}: chat_template: the file can't be read",
            expected="auto, off, a name of one of the tokenizer's templates, or a file beside the suite",
            got=f"{path}: {reason}",
        ) from None
    if not is_source(text):
        raise ConfigError(f"{where}: chat_template: not a jinja template", got=str(path))
    return {**data, "chat_template": text}
