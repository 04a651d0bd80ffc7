"""What lies beside the weights of a written folder, in a form that older programs open, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.beside import Beside, beside
from evomerge.merging.sources.chat import Chat, chosen, notes
from evomerge.merging.sources.file_kinds import is_tokenizers
from evomerge.merging.sources.model_config import text_part, text_path, with_text_part
from evomerge.merging.sources.opening import with_chat_models
from evomerge.merging.sources.source import Source
from evomerge.schema import load_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_VERSION_5 = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "TokenizersBackendFast")
"""Classes of tokenizers that transformers has from version 5 on."""
OF_THIS_MACHINE = ("is_local", "local_files_only")
"""Entries of a tokenizer_config.json that say how the tokenizer was opened before it was written."""
BOTH_KNOW = "PreTrainedTokenizerFast"


def asked(recipe: Recipe, sources: Mapping[str, Source]) -> Chat | None:
    """Return what templates and generation settings become; None leaves those that are copied."""
    return chosen(recipe.chat_template, recipe.pattern, with_chat_models(recipe, sources))


def folder_notes(recipe: Recipe, sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Return what a user should know of the files beside the weights: what differs, what is left out."""
    left_out = beside(sources[recipe.pattern]).left_out
    more = f" and {len(left_out) - 12} more" if len(left_out) > 12 else ""
    listed = f"left out of the folder: {', '.join(left_out[:12])}{more}"
    return (*notes(recipe, with_chat_models(recipe, sources)), *((listed,) if left_out else ()))


def copy_beside(taken: Beside, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Copy files of a model's folder; tokenizer: the one to write in place of the model's own."""
    for name, path in taken.files.items():
        if tokenizer is None or not is_tokenizers(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        own = taken.files.get("tokenizer_config.json")
        _set_class(folder, None if own is None else load_json(own).get("tokenizer_class"))
    else:
        _set_class(folder, None)


def _set_class(folder: Path, own: object) -> None:
    """Make a tokenizer_config.json that transformers 5 wrote one that version 4 opens, too.

    own: the class that the tokenizer had before it was extended, if it named one.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    data = load_json(path)
    before = dict(data)
    for key in OF_THIS_MACHINE:
        data.pop(key, None)
    if data.get("tokenizer_class") in OF_VERSION_5 and (folder / "tokenizer.json").is_file():
        known = isinstance(own, str) and own not in OF_VERSION_5
        data["tokenizer_class"] = own if known else BOTH_KNOW
    if isinstance(data.get("extra_special_tokens"), list):  # version 4 expects a mapping of names here
        more = data.pop("extra_special_tokens")
        data["additional_special_tokens"] = [*(data.get("additional_special_tokens") or ()), *more]
    if data != before:
        write_json(path, data)


def readable(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config.json with the type of the weights, and with entries under their older names, too.

    transformers 4 reads `torch_dtype`, `rope_theta` and `rope_scaling`; version 5 `dtype` and
    `rope_parameters`. Parts of the config for single modules are completed in the same way.

    >>> readable({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "bfloat16")["rope_theta"]
    500000.0
    """
    return _readable(config, dtype, text_path(config))


def _readable(config: Mapping[str, Any], dtype: str, text: tuple[str, ...]) -> dict[str, Any]:
    new = dict(config)
    for key, value in config.items():
        if isinstance(value, Mapping) and ({"dtype", "torch_dtype"} & value.keys() or key in text[:1]):
            new[key] = _readable(value, dtype, text[1:])
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and isinstance(rope.get("rope_theta"), int | float):
        new.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            new.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
    return new | {"dtype": dtype, "torch_dtype": dtype}


def with_ends(config: dict[str, Any], asking: Chat | None) -> dict[str, Any]:
    """Return a config whose end tokens are those of the generation settings, if these were chosen."""
    ends = None if asking is None or asking.generation is None else asking.generation.get("eos_token_id")
    if ends is None:
        return config
    text = {**text_part(config)}
    config = with_text_part(config, text | ({"eos_token_id": ends} if "eos_token_id" in text else {}))
    return config | ({"eos_token_id": ends} if "eos_token_id" in config else {})


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face folders have them."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
