"""How a model is asked and where its answers end: chat templates, end tokens, generation settings.

A merge has those of the model that gives its tokenizer, unless its recipe's `chat_template` chooses others.
The live model that is scored and the exported folder both get what `chosen` returns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import ModelError
from evomerge.files import read_regular
from evomerge.merging.chat_templates import AUTO, BUILT_IN, LARGEST_TEMPLATE
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources import vocabulary
from evomerge.merging.sources.beside import folders_of, unwrapped
from evomerge.merging.sources.model_config import text_part
from evomerge.merging.sources.source import Source
from evomerge.schema import load_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"
DEFAULT = "default"
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OF_TOKENS = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids"),
)
"""Generation settings that hold token ids, beside those whose names end in `_token_id`."""
_NO_SETTINGS = ("transformers_version", "_from_model_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """templates: name -> jinja text. generation: the content of generation_config.json; None without one."""

    templates: Mapping[str, str]
    generation: Mapping[str, Any] | None

    @property
    def template(self) -> str | dict[str, str] | None:
        """The templates as a tokenizer holds them."""
        if set(self.templates) <= {DEFAULT}:
            return self.templates.get(DEFAULT)
        return dict(self.templates)


def chat_of(source: Source) -> Chat:
    """Read a model's own templates and generation settings. Raises ModelError for damaged files."""
    folders = folders_of(source)
    templates = next((found for folder in folders if (found := read_templates(folder))), {})
    generation = next((load_json(f / GENERATION) for f in folders if (f / GENERATION).is_file()), None)
    own, tokens = folders[0], source.vocabulary or {}
    if len(folders) > 1 and not (own / GENERATION).is_file() and (own / "tokenizer_config.json").is_file():
        end = load_json(own / "tokenizer_config.json").get("eos_token")
        end = tokens.get(str(end.get("content") if isinstance(end, dict) else end))
        generation = generation or _from_config(source)
        if end is not None and end not in (known := _listed(generation.get("eos_token_id"))):
            generation = {**generation, "eos_token_id": [*known, end]}
    return Chat(templates=templates, generation=generation)


def chosen(choice: str, pattern: str, sources: Mapping[str, Source]) -> Chat | None:
    """Return what a merge's tokenizer and generation settings become; None leaves both as they are.

    Args:
        choice: as in a Recipe.
        pattern: the name of the model that gives the tokenizer.
        sources: name -> model, in the recipe's order; among them those that `needed` names.
    """
    own, vocabulary_ = chat_of(sources[pattern]), sources[pattern].vocabulary
    owner = owner_of(choice, pattern, sources)
    if owner == pattern:
        return own if choice or len(folders_of(sources[pattern])) > 1 else None
    if owner is not None:
        chat = chat_of(sources[owner])
        settings, _ = _moved(
            chat.generation or _from_config(sources[owner]), _tokens(sources[owner]), vocabulary_
        )
        fallback = own.generation or _from_config(sources[pattern])
        if "eos_token_id" not in settings and "eos_token_id" in fallback:
            settings["eos_token_id"] = fallback["eos_token_id"]
        return Chat(templates=chat.templates, generation=settings or None)
    if choice not in BUILT_IN:
        return replace(own, templates={DEFAULT: choice})
    end = (vocabulary_ or {}).get(BUILT_IN[choice].end or "")
    generation = own.generation
    if end is not None:
        generation = generation or _from_config(sources[pattern])
        known = _listed(generation.get("eos_token_id"))
        generation = {**generation, "eos_token_id": known if end in known else [*known, end]}
    return Chat(templates={DEFAULT: BUILT_IN[choice].text}, generation=generation)


def needed(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the models among which a recipe's `chat_template` chooses."""
    if recipe.chat_template in recipe.models:
        return recipe.pattern, recipe.chat_template
    return tuple(recipe.models) if recipe.chat_template == AUTO else (recipe.pattern,)


def owner_of(choice: str, pattern: str, sources: Mapping[str, Source]) -> str | None:
    """Return the name of the model whose template is chosen, None for a built-in template or a text."""
    if not choice or choice in sources:
        return choice or pattern
    if choice != AUTO:
        return None
    by_name = {
        name: chat.templates for name, source in sources.items() if (chat := chat_of(source)).templates
    }
    counts = Counter(map(_key, by_name.values()))
    return max(by_name, key=lambda name: counts[_key(by_name[name])], default=pattern)  # the first of equals


def open_tokenizer(choice: str, pattern: str, sources: Mapping[str, Source]) -> PreTrainedTokenizerBase:
    """Open a merge's tokenizer with the chosen chat template. Raises ModelError."""
    tokenizer: Any = vocabulary.open_tokenizer(sources[pattern])
    if (chat := chosen(choice, pattern, sources)) is not None:
        tokenizer.chat_template = chat.template
    return tokenizer  # type: ignore[no-any-return]


def read_templates(folder: Path) -> dict[str, str]:
    """Return name -> jinja text of a folder's templates: the tokenizer's, else the processor's.

    Raises ModelError for damaged files.
    """
    found, legacy = _of_tokenizer(folder), folder / "chat_template.json"
    text = load_json(legacy).get("chat_template") if not found and legacy.is_file() else None
    return {DEFAULT: text} if isinstance(text, str) else found


def _of_tokenizer(folder: Path) -> dict[str, str]:
    """Return name -> jinja text of a folder's templates, as transformers' tokenizers read them."""
    files = {DEFAULT: folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: _text(path) for name, path in files.items() if path.is_file()}
    if found or not (folder / "tokenizer_config.json").is_file():
        return found
    listed = load_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(listed, str):
        return {DEFAULT: listed}
    if isinstance(listed, dict):
        return {str(name): text for name, text in listed.items() if isinstance(text, str)}
    named = [entry for entry in listed or () if isinstance(entry, dict)] if isinstance(listed, list) else []
    return {str(e["name"]): str(e["template"]) for e in named if "name" in e and "template" in e}


def write(chat: Chat, folder: Path) -> None:
    """Make a written folder's templates and generation settings those of `chat`, where they differ.

    Templates are written in both forms, because older versions of transformers read only the second: files,
    and an entry of tokenizer_config.json.
    """
    settings = load_json(folder / GENERATION) if (folder / GENERATION).is_file() else None
    if chat.generation is not None and settings != chat.generation:
        (folder / GENERATION).write_text(json.dumps(chat.generation, indent=2) + "\n", encoding="utf-8")
    if _of_tokenizer(folder) == chat.templates:
        return
    more = folder / "additional_chat_templates"
    for path in (folder / "chat_template.jinja", *more.glob("*.jinja")):
        path.unlink(missing_ok=True)
    for name, text in chat.templates.items():
        more.mkdir(exist_ok=True) if name != DEFAULT else None
        path = folder / "chat_template.jinja" if name == DEFAULT else more / f"{Path(name).name}.jinja"
        path.write_text(text, encoding="utf-8")
    template = chat.template
    if isinstance(template, dict):
        entry: Any = [{"name": name, "template": text} for name, text in template.items()]
    else:
        entry = template
    for name in ("tokenizer_config.json", "chat_template.json"):  # the second is read by processors
        if (folder / name).is_file():
            data = load_json(folder / name)
            data.pop("chat_template", None)
            data |= {} if entry is None else {"chat_template": entry}
            (folder / name).write_text(
                json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )


def notes(recipe: Recipe, sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Say what the models' templates, end tokens and generation settings lose in the merge.

    sources: the models of the merge, and those that `needed` names.
    """
    choice, pattern = recipe.chat_template, recipe.pattern
    chats = {name: chat_of(source) for name, source in sources.items()}
    owner = owner_of(choice, pattern, sources)
    result = chosen(choice, pattern, sources) or chats[pattern]
    if owner is not None and choice:
        lost = _moved(
            _settings(sources[owner], chats[owner]), _tokens(sources[owner]), sources[pattern].vocabulary
        )[1]
        taken = (f"chat_template: auto takes the template of {owner}",) if choice == AUTO else ()
        return (*taken, *(f"{key} of {owner} names tokens that the merge lacks" for key in lost))
    found: list[str] = []
    ends = {name: _ends(source, chats[name].generation) for name, source in sources.items()}
    kept = _ends(sources[pattern], result.generation)
    if choice:
        end = BUILT_IN[choice].end if choice in BUILT_IN else None
        known = sources[pattern].vocabulary
        if end is not None and known is not None and end not in known:
            found.append(f"chat_template: {choice} ends answers with {end}, which is no token of the merge")
    elif any(chat.templates and chat.templates != result.templates for chat in chats.values()):
        labels: dict[Any, str] = {(): "none"}
        for chat in chats.values():
            labels.setdefault(_key(chat.templates), chr(ord("A") + (len(labels) - 1) % 26))
        who = _each({name: labels[_key(chat.templates)] for name, chat in chats.items()})
        found.append(f"chat templates differ: {who}; the merge has that of {pattern}{_HOW}")
    if any(set(theirs) - set(kept) for theirs in ends.values()):
        who = _each({name: " ".join(theirs) or "none" for name, theirs in ends.items()})
        found.append(f"tokens that end answers differ: {who}; the merge has {' '.join(kept) or 'none'}{_HOW}")
    settings = {name: _plain(chat.generation) for name, chat in chats.items()}
    ours = _plain(result.generation)
    keys = {key for theirs in settings.values() for key in theirs if theirs[key] != ours.get(key)}
    if keys:
        shown = {
            name: ", ".join(f"{key} {value}" for key, value in theirs.items() if key in keys) or "none"
            for name, theirs in settings.items()
        }
        found.append(f"generation settings differ: {_each(shown)}; the merge has those of {pattern}{_HOW}")
    return tuple(found)


_HOW = " (`chat_template` chooses: a model's name, auto, a built-in template or a file)"


def _each(values: Mapping[str, str]) -> str:
    """Return `a, b: this; c: that`."""
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in by_value.items())


def _key(templates: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(templates.items()))


def _settings(source: Source, chat: Chat) -> Mapping[str, Any]:
    return chat.generation or _from_config(source)


def _plain(generation: Mapping[str, Any] | None) -> dict[str, str]:
    """Return generation settings that hold no tokens, as text."""
    return {
        key: json.dumps(value)
        for key, value in (generation or {}).items()
        if not _holds_tokens(key) and key not in _NO_SETTINGS
    }


def _ends(source: Source, generation: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the tokens that end a model's answers, as text."""
    ids = _listed((generation or _from_config(source)).get("eos_token_id"))
    by_id = {row: token for token, row in (_tokens(source) or {}).items()}
    return tuple(by_id.get(row, f"id {row}") for row in ids)


def _from_config(source: Source) -> dict[str, Any]:
    config, text = source.config, text_part(source.config)
    found = {key: text.get(key, config.get(key)) for key in _ENDS}
    return {key: value for key, value in found.items() if value is not None}


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def _tokens(source: Source) -> Mapping[str, int] | None:
    """Return a model's own tokens, whatever rows its embeddings were moved to."""
    return unwrapped(source).vocabulary


def _holds_tokens(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids")) or key in _OF_TOKENS


def _moved(
    settings: Mapping[str, Any], theirs: Mapping[str, int] | None, ours: Mapping[str, int] | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return generation settings with token ids of another vocabulary, and keys that name missing tokens."""
    if theirs is None or ours is None or theirs == ours:
        return dict(settings), ()
    by_id = {row: token for token, row in theirs.items()}

    def ids(row: int) -> int | None:
        return ours.get(by_id.get(row, ""))

    moved: dict[str, Any] = {}
    lost = []
    for key, value in settings.items():
        if not _holds_tokens(key) or value is None:
            moved[key] = value
            continue
        new = _with_ids(value, ids)
        if _count(new) < _count(value):
            lost.append(key)
        if new not in (None, []):
            moved[key] = new
    return moved, tuple(lost)


def _with_ids(value: Any, ids: Callable[[int], int | None]) -> Any:
    if isinstance(value, list):
        inner = [_with_ids(each, ids) for each in value]
        return [each for each in inner if each is not None]
    return ids(value) if isinstance(value, int) else value


def _count(value: Any) -> int:
    return sum(map(_count, value)) if isinstance(value, list) else int(value is not None)


def _text(path: Path) -> str:
    try:
        return read_regular(path, LARGEST_TEMPLATE).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: can't be read", got=str(error)) from None
