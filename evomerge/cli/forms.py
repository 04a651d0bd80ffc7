"""The forms in which `export` and `merge` write: which options each takes, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.cli.terminal import complain, output, relative
from evomerge.errors import ConfigError, nearest

if TYPE_CHECKING:
    from evomerge.api.runs import Written

COMPARED = {
    True: "; its weights are those that were scored on `test`, bit for bit",
    False: "; WARNING: its weights differ from those that were scored on `test`",
    None: "; its weights were not compared, because this recipe was not scored on `test`",
}
"""What is said of an exported folder, by `Exported.equal`."""


def check_form(
    form: str, valid: tuple[str, ...], rank: int | None, keep_rest: bool, shard_size: str | None = None
) -> None:
    """Raise ConfigError for an unknown form, or for options that are another form's."""
    if form not in valid:
        raise ConfigError(f"--as {form}: no such form", fix=nearest(form, valid))
    for option, used in (("--rank", rank is not None), ("--keep-rest", keep_rest)):
        if used and form != "adapter":
            raise ConfigError(
                f"{option} is for adapters",
                got=f"--as {form}",
                fix=f"leave {option} out, or add --as adapter",
            )
    if shard_size is not None and form != "model":
        raise ConfigError("--shard-size is for models", got=f"--as {form}", fix="leave --shard-size out")


def say_adapter(done: Written) -> None:
    """Say what was written as an adapter, and in red what it lost of the merge."""
    report, recipe = done.adapter, done.recipe
    assert report is not None
    output.say(f"wrote {relative(done.place)}, a LoRA adapter on {report.base} (recipe {recipe[:12]})")
    output.say(report.summary())
    data: dict[str, Any] = {
        "folder": str(done.place),
        "recipe": recipe,
        "base": report.base,
        "exact": report.exact,
        "rank": report.rank,
        "energy": report.energy,
        "whole": list(report.whole),
        "lost": list(report.lost),
    }
    if done.scores:
        data["lossy"] = done.loss is not None
        data["test"] = [
            {"task": task, "merge": merge_score, "adapter": adapter}
            for task, merge_score, adapter in done.scores
        ]
    output.data(data)
    say_notes(done.notes)
    if done.loss is not None:
        complain(f"WARNING: {done.loss}", style="bold red")


def shard_bytes(size: str | None) -> int | None:
    """Return the bytes of a size such as `5GB` (10^9 bytes each) or `5GiB` (2^30); None for None.

    Raises:
        ConfigError: it is no size, or below one kilobyte.

    >>> shard_bytes("5GB"), shard_bytes("1.5 mib")
    (5000000000, 1572864)
    """
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt])(i?)b\s*", size, re.IGNORECASE)
    power = "kmgt".index(match[2].lower()) + 1 if match else 0
    bytes_ = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if bytes_ < 1_000:
        raise ConfigError(
            f"--shard-size {size}: not a size of files", expected="at least 1KB, like 5GB, 500MB or 2GiB"
        )
    return bytes_


def say_notes(notes: Iterable[str]) -> None:
    """Say what the user should know of what was written."""
    for note in notes:
        output.say(f"note: {note}")


def say_file(out: Path, recipe: str) -> None:
    """Say what was written as a file."""
    output.say(f"wrote {relative(out)} (recipe {recipe[:12]})")
    output.data({"file": str(out), "recipe": recipe})
