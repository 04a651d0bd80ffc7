"""A mergekit YAML as a run config: its merge is a warm start, and the search varies what it sets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.delivery.config_file import placed
from evomerge.delivery.convert.draft import RANGES, Draft, apart, filters, genes, location, method_of, named
from evomerge.errors import ConfigError
from evomerge.merging.chat_templates import BUILT_IN
from evomerge.merging.mergekit import reader
from evomerge.merging.methods import Method
from evomerge.running.store import BASE

EVALUATIONS = 120
FALLBACK = "global_weights"
"""The search space of merges without a number to search."""
ALWAYS = ("weight", "density", "t", "select_topk")
"""Parameters that are searched; others only where the file sets them."""


def convert(data: Mapping[str, Any], draft: Draft, file: Path) -> None:
    """Enter a merge into a draft. file: where it is.

    Raises:
        ConfigError: the file is not valid, or nothing says what to score on.
    """
    reader.check(data)
    method = method_of(str(data["merge_method"]), draft)
    if not draft.has_suite:
        raise ConfigError(
            f"{file}: a merge does not say what to score on", fix="give --suite NAME, or --data FILE"
        )
    ours, names = _models(data, method, draft)
    draft.document["space"] = _space(data, ours, draft)
    draft.suite("")
    draft.document["warm_start"] = {
        "recipes": [os.path.relpath(file.absolute(), draft.options.out.absolute().parent)]
    }
    draft.document["budget"] = {"evaluations": draft.options.evaluations or EVALUATIONS}
    if dtype := data.get("out_dtype") or data.get("dtype"):
        draft.document["dtype"] = str(dtype)
    _tokenizer(data, names, draft)
    draft.note(f"the search starts from the merge of {file.name}, which is scored beside the baselines")


def _entries(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield every mapping of a file that can name a model or hold parameters: itself, slices, sources."""
    yield data
    for key in ("models", "slices", "sources"):
        for item in data.get(key) or ():
            yield from _entries(item)
    if isinstance(data.get("modules"), Mapping):
        for item in data["modules"].values():
            yield from _entries(item)


def _models(data: Mapping[str, Any], method: Method, draft: Draft) -> tuple[Method, dict[str, str]]:
    """Enter base and sources; return the method of the search, and name -> location of all models."""
    where = f"{draft.kind}: models"
    places = [location(item["model"], where, draft) for item in _entries(data) if "model" in item]
    bases = [
        location(b, where, draft) for item in _entries(data) if (b := item.get("base_model")) is not None
    ]
    base = draft.options.base or (bases[0] if bases else None)
    if base is None:
        if method.needs_base:
            raise ConfigError(f"{draft.kind}: {method.name} needs base_model", fix="add it to the file")
        base = places[0]
        draft.note(
            f"the merge has no base, but scores are measured from one (0 is the base): {base} takes "
            "that part; another one: --base MODEL"
        )
    if method.ordered and bases:
        places = [bases[0], *(place for place in places if place != bases[0])]
    if not _is_stack(data):
        method, places = apart(places, base, method, draft)
    names = named(place for place in places if place != base)
    draft.models(base, names)
    return method, {**names, BASE: base}


def _is_stack(data: Mapping[str, Any]) -> bool:
    return data["merge_method"] == "passthrough" or _stacked(data)


def _space(data: Mapping[str, Any], method: Method, draft: Draft) -> str | dict[str, Any]:
    if _is_stack(data):
        draft.note("the merge stacks layers: the search varies their order")
        return {
            "kind": "layer_path",
            "name": "converted",
            "about": "layers of the merge's models in another order",
            "base": draft.document["models"]["base"] in _places(data, draft),
        }
    values, flags, parts, graded = _settings(data)
    shares = method.name != data["merge_method"]
    if shares and "t" in values:
        values["weight"] = values.pop("t")  # 0 is the base, 1 the other model
    wanted = [name for name in RANGES if name in ALWAYS or name in values]
    negative = any(value < 0 for value in values.get("weight", ()))
    varied = genes(method, wanted, negative=negative, shares=shares, values=values)
    if not varied:
        draft.note(f"{method.name} has no weights to search, so the space is {FALLBACK}")
        return FALLBACK
    space: dict[str, Any] = {
        "name": "converted",
        "about": f"{method.name}, as in the merge that the search starts from",
        "method": method.name,
        "layers": 1 if graded else "all",
    }
    if parts:
        space |= {"modules": filters(parts), "outside": filters(parts)}
    space["genes"] = varied
    declared = method.parameters
    flags = {} if shares else flags
    fixed: dict[str, Any] = {
        n: bool(v) for n, v in flags.items() if n in declared and declared[n].kind == "flag"
    }
    fixed |= {
        name: found[0]
        for name, found in values.items()
        if name in declared and name not in varied and declared[name].kind != "flag"
    }
    if fixed:
        space["fixed"] = fixed
    return space


def _places(data: Mapping[str, Any], draft: Draft) -> list[str]:
    """Return the locations of the models that a file lists, as a config has them."""
    listed = [item["model"] for item in _entries(data) if "model" in item]
    return [placed(location(model, f"{draft.kind}: models", draft), draft.options.out) for model in listed]


def _stacked(data: Mapping[str, Any]) -> bool:
    """Say whether slices are anything else than the layers of each model in their own places."""
    lists = [item["slices"] for item in _entries(data) if item.get("slices")]
    for slices in lists:
        end = 0
        for part in slices:
            ranges = {tuple(source["layer_range"]) for source in part["sources"]}
            if len(ranges) > 1 or next(iter(ranges))[0] != end:
                return True
            end = next(iter(ranges))[1]
    return False


def _settings(
    data: Mapping[str, Any],
) -> tuple[dict[str, list[float]], dict[str, object], list[str], bool]:
    """Return numbers by parameter, flags, filters in order, and whether anything differs by layer."""
    values: dict[str, list[float]] = {}
    flags: dict[str, object] = {}
    parts: list[str] = []
    graded = any(len(item.get("slices") or ()) > 1 for item in _entries(data))
    for item in _entries(data):
        for name, setting in (item.get("parameters") or {}).items():
            for part, value in _conditions(setting):
                if part is not None and part != "*" and part not in parts:
                    parts.append(part)
                numbers = value if isinstance(value, list) else [value]
                graded |= len(numbers) > 1
                if isinstance(value, bool) or name == "normalize":
                    flags[name] = value
                else:
                    values.setdefault(name, []).extend(float(number) for number in numbers)
    return values, flags, parts, graded


def _conditions(setting: object) -> Iterator[tuple[str | None, Any]]:
    if isinstance(setting, list) and any(isinstance(item, Mapping) for item in setting):
        for item in setting:
            yield item.get("filter"), item["value"]
    else:
        yield None, setting


def _tokenizer(data: Mapping[str, Any], names: Mapping[str, str], draft: Draft) -> None:
    by_place = {place: name for name, place in reversed(list(names.items()))}
    tokenizer = data.get("tokenizer") if isinstance(data.get("tokenizer"), Mapping) else {}
    assert isinstance(tokenizer, Mapping)
    source = tokenizer.get("source") or data.get("tokenizer_source")
    if source == "union" or (source in by_place and by_place[source] != BASE):
        draft.document["tokenizer"] = by_place.get(source, source)
    elif source not in (None, "base") and source not in by_place:
        draft.note(f"the tokenizer's source, {source}, is none of the models and is left out")
    if tokenizer.get("tokens") or tokenizer.get("pad_to_multiple_of"):
        draft.note("single tokens' rows and padding are left out: candidates have the run's vocabulary")
    template = data.get("chat_template")
    if template in by_place:
        draft.document["chat_template"] = by_place[template]
    elif template in ("auto", "base", *BUILT_IN):
        draft.document["chat_template"] = template
    elif template:
        draft.note("`chat_template` is left out: name a jinja file in the config")
