"""The choice of a merge's chat template: its names, its file, and the built-in templates.

chat_template: chat          # the template of the model `chat`, with its end tokens and generation settings
chat_template: auto          # the most common one among the models
chat_template: chatml        # a built-in one
chat_template: own.jinja     # a file beside the YAML file; its text is what recipes and runs store
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import ConfigError, nearest
from evomerge.files import expanded, read_regular

AUTO, BASE = "auto", "base"
LARGEST_TEMPLATE = 1_000_000
"""Bytes of a chat template; the longest of the hub have some 30,000."""
_ENDINGS = (".jinja", ".jinja2", ".j2", ".txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """A known format. end: the token that ends an answer; None means the tokenizer's end-of-text token."""

    text: str
    end: str | None = None


BUILT_IN = {
    "alpaca": BuiltIn(
        text="""\
{%- for message in messages -%}
    {%- set content = message['content'] | trim -%}
    {%- if message['role'] == 'system' -%}
        {{- content + '\\n\\n' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '### Instruction:\\n' + content + '\\n\\n' -}}
    {%- else -%}
        {{- '### Response:\\n' + content + (eos_token or '') + '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Response:\\n' -}}
{%- endif -%}
"""
    ),
    "chatml": BuiltIn(
        text="""\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""",
        end="<|im_end|>",
    ),
    "llama3": BuiltIn(
        text="""\
{{- bos_token or '' -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
    {{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
""",
        end="<|eot_id|>",
    ),
    "mistral": BuiltIn(
        text="""\
{{- bos_token or '' -}}
{%- set ahead = namespace(text='') -%}
{%- for message in messages -%}
    {%- set content = message['content'] | trim -%}
    {%- if message['role'] == 'system' -%}
        {%- set ahead.text = content + '\\n\\n' -%}
    {%- elif message['role'] == 'user' -%}
        {{- '[INST] ' + ahead.text + content + ' [/INST]' -}}
        {%- set ahead.text = '' -%}
    {%- else -%}
        {{- ' ' + content + (eos_token or '') -}}
    {%- endif -%}
{%- endfor -%}
"""
    ),
}


def is_text(choice: str) -> bool:
    """Say whether a choice is the text of a template, not a name."""
    return "{" in choice


def chosen_template(choice: str, base: str | None, models: Iterable[str]) -> str:
    """Return a checked choice, with the base's name in place of `base`; "" means the tokenizer's model's.

    The name of a model comes before the keywords and the names of built-in templates. Raises ConfigError.

    >>> chosen_template("base", "llama", ["llama", "chat"]), chosen_template("chatml", None, ["chat"])
    ('llama', 'chatml')
    """
    models = tuple(models)
    if not choice or choice in models or choice == AUTO or choice in BUILT_IN:
        return choice
    if is_text(choice):
        _check_syntax(choice)
        return choice
    if choice == BASE and base is not None:
        return base
    if choice == BASE:
        raise ConfigError("chat_template: base, but there is no base model", fix="name a model")
    raise ConfigError(
        f"chat_template: {choice!r} is no model, no built-in template and no file",
        expected="base, a model's name, auto, a built-in template or a .jinja file",
        fix=nearest(choice, tuple(dict.fromkeys((*models, BASE, AUTO, *BUILT_IN)))),
    )


def with_text(choice: str, folder: Path, models: Iterable[str]) -> str:
    """Return the text of a template file in place of its path; other choices as they are.

    folder: where relative paths start. models: the names of the models.

    So recipes and stored runs don't depend on the file. Raises ConfigError for a file that can't be read.
    """
    if not choice or choice in (AUTO, BASE, *BUILT_IN, *models) or is_text(choice):
        return choice
    path = folder / expanded(choice)
    if not path.is_file() and "/" not in choice and not choice.endswith(_ENDINGS):
        return choice  # a misspelt name, which `chosen_template` refuses
    try:
        text = read_regular(path, LARGEST_TEMPLATE).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError("chat_template: the file can't be read", got=f"{path}: {reason}") from None
    if not is_text(text):
        raise ConfigError("chat_template: not a jinja template", got=str(path))
    return text


@functools.lru_cache(maxsize=8)
def _check_syntax(text: str) -> None:
    import jinja2

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    plain = text.replace("endgeneration", "endif").replace("{% generation", "{% if true")
    try:
        environment.parse(plain.replace("{%- generation", "{%- if true"))  # a tag of transformers' own
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            "chat_template: not a valid jinja template", got=f"line {error.lineno}: {error.message}"
        ) from None
