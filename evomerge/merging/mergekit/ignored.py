"""Keys that mergekit ignores, taken out of a file's data before it is read, with a note for each.

Published files hold parameters that their method does not have (`normalize` for model_stock), and parameters
of the whole merge below a single model. mergekit looks up only what a method asks for, so these change
nothing. Only keys that mean something elsewhere in the format are ignored; all others are errors, as misspelt
ones are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.merging import methods
from evomerge.merging.methods import Method

ENTRIES = {
    "file": (
        *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
        *("tokenizer_source", "tokenizer", "chat_template", "name"),
    ),
    "module": ("models", "slices", "parameters"),
    "slice": ("sources", "parameters", "base_model"),
    "model": ("model", "parameters"),
    "source": ("model", "parameters", "layer_range"),
}
"""The keys of each part of a file."""
USED: dict[str, dict[str, object]] = {
    "ties": {"rescale": False},
    "breadcrumbs": {"rescale": False},
    "breadcrumbs_ties": {"rescale": False},
    "multislerp": {"normalize_weights": True, "eps": 1e-8},
}
"""Parameters that mergekit uses and evomerge doesn't have, with the value that changes nothing."""
UNWEIGHTED = ("ram", "ramplus_tl")
"""Methods to which mergekit gives no weights and no `lambda`: they change nothing, and only 1 is written."""
OTHERS = ("int8_mask", "rescale", "normalize_weights", "eps")
"""Parameters of mergekit that no method of evomerge declares."""


def without_ignored(data: Mapping[str, Any], method: Method) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a file's data without the keys that mergekit ignores, and a note for each of them."""
    notes: dict[str, None] = {}
    return _part(data, "file", method, notes), tuple(notes)


def _part(data: Any, kind: str, method: Method, notes: dict[str, None]) -> Any:
    """Return one part of a file without ignored keys; what has another form is left to the reader."""
    if not isinstance(data, Mapping):
        return data
    result: dict[Any, Any] = {}
    for key, value in data.items():
        if key not in ENTRIES[kind] and key in _known():
            notes[f"`{key}` has no effect in a {kind}'s entry; mergekit ignores it, too"] = None
        elif key == "parameters":
            result[key] = _parameters(value, method, notes, of_source=kind in ("model", "source"))
        elif key in ("models", "slices", "sources") and isinstance(value, list):
            inner = {"models": "model", "slices": "slice", "sources": "source"}[key]
            result[key] = [_part(entry, inner, method, notes) for entry in value]
        elif key == "modules" and isinstance(value, Mapping):
            result[key] = {name: _part(module, "module", method, notes) for name, module in value.items()}
        else:
            result[key] = value
    return result


def _parameters(data: Any, method: Method, notes: dict[str, None], *, of_source: bool) -> Any:
    if not isinstance(data, Mapping):
        return data
    result: dict[Any, Any] = {}
    for name, value in data.items():
        unweighted = method.name in UNWEIGHTED and name in ("weight", "lambda")
        declared = None if unweighted else method.parameters.get(name)
        if declared is not None and of_source and not declared.per_source:
            notes[f"{name} below a single model has no effect, as in mergekit; it is one of the merge"] = None
        elif declared is None and name in USED.get(method.name, {}):
            if value != USED[method.name][name]:
                result[name] = value  # the reader refuses it
        elif declared is None and name == "int8_mask":
            pass  # saves mergekit memory
        elif declared is None and name in _parameter_names():
            owner = f"mergekit's {method.name}" if unweighted else method.name
            notes[f"{owner} has no parameter {name}, so it has no effect, as in mergekit"] = None
        else:
            result[name] = value
    return result


def _parameter_names() -> set[str]:
    return {*OTHERS, *(name for method in methods.names() for name in methods.get(method).parameters)}


def _known() -> set[str]:
    return {*_parameter_names(), *(key for keys in ENTRIES.values() for key in keys)}
