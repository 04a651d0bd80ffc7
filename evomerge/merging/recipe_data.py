"""Entries of a recipe file as plain data: checked, or a ConfigError that names the place. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import ConfigError, nearest

LAYERS = 10_000
"""Most layers of a model; work is done layer by layer, so a misread number would take hours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """Where the embedding row of one token comes from.

    model: the model; None means a row of zeros. token, row: of that model; without either, the same token.
    force: whether all models get the row, also those that have the token.
    """

    model: str | None = None
    token: str | None = None
    row: int | None = None
    force: bool = False

    def as_data(self) -> dict[str, Any]:
        """Return the row as plain data, the inverse of `token_rows`."""
        named = {"model": self.model, "token": self.token, "row": self.row, "force": self.force or None}
        return {key: value for key, value in named.items() if value is not None}


def token_rows(data: object, where: str) -> dict[str, TokenRow]:
    """Return token -> where its row comes from."""
    rows = {}
    for token, listed in mapping(data, where).items():
        place = f"{where}[{token!r}]"
        entry = mapping(listed, place)
        check_keys(entry, ("model", "token", "row", "force"), required=(), where=place)
        row, force = entry.get("row"), entry.get("force", False)
        other = optional_name(entry.get("token"), f"{place}: token")
        model = optional_name(entry.get("model"), f"{place}: model")
        if row is not None and whole(row, f"{place}: row", 2**31 - 1) < 0:
            raise ConfigError(f"{place}: row", expected="a whole number >= 0", got=repr(row))
        if not isinstance(force, bool):
            raise ConfigError(f"{place}: force", expected="true or false", got=repr(force)[:80])
        if (row is not None or other is not None) and (model is None or None not in (row, other)):
            raise ConfigError(place, expected="a model with one of token and row, or none of them")
        rows[str(token)] = TokenRow(model=model, token=other, row=row, force=force)
    return rows


def check_keys(data: Mapping[str, Any], valid: Sequence[str], *, required: Sequence[str], where: str) -> None:
    for key in data:
        if key not in valid:
            raise ConfigError(f"{where}: unknown key {key!r}", fix=nearest(str(key), valid))
    for key in required:
        if key not in data:
            raise ConfigError(f"{where}: missing key {key!r}")


def mapping(data: object, where: str) -> Mapping[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise ConfigError(where, expected="a mapping", got=type(data).__name__)
    return data


def optional_name(value: object, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(where, expected="the name of a model", got=repr(value))
    return value


def whole(value: object, where: str, limit: int = LAYERS) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > limit:
        raise ConfigError(where, expected=f"a whole number of at most {limit}", got=repr(value)[:80])
    return value


def shifts(data: object, sources: Sequence[str], where: str) -> tuple[int, ...]:
    """Return one shift per source; a mapping may leave out sources that are not shifted."""
    where = f"{where}: shift"
    if isinstance(data, Mapping):
        check_keys(data, sources, required=(), where=where)
        if len(set(sources)) < len(sources):
            raise ConfigError(where, expected="a list, because a source appears twice", got="a mapping")
        return tuple(whole(data.get(source, 0), where) for source in sources)
    if data is not None and not isinstance(data, list):
        raise ConfigError(where, expected="source: whole number, or a list of whole numbers", got=repr(data))
    return tuple(whole(value, where) for value in data or ())


def locations(data: object, where: str) -> dict[str, str]:
    locations = mapping(data, where)
    for name, place in locations.items():
        if not name or not isinstance(place, str) or not place:
            raise ConfigError(f"{where}: {name!r}", expected="a name and a location (text)", got=repr(place))
    return {str(name): place for name, place in locations.items()}


def strings(data: object, where: str) -> list[str]:
    values = [data] if isinstance(data, str) else data
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ConfigError(where, expected="a name or a list of names", got=repr(data))
    return values
