"""The facts of a run: every key of the table `run`, declared once, with its type and who writes it.

A fact is one JSON value under a name: the config, the suite, why the search ended. Read one with
`facts.CONFIG.get(store)`, write it with `.set(store, value)`; a key is spelled nowhere else. To add a fact,
declare it here and add its line in runs/README.md (a test compares the two).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

from evomerge.errors import StoreError

T = TypeVar("T")


class FactReader(Protocol):
    """A store as far as facts read it."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        ...

    def read_value(self, key: str) -> Any:
        """Return the JSON value under a key, None where there is none."""
        ...


class FactWriter(Protocol):
    """A store as far as facts write it."""

    def write_value(self, key: str, value: Any) -> None:
        """Store or replace the JSON value under a key."""
        ...


@dataclass(frozen=True, slots=True)
class Fact(Generic[T]):
    """One key of the table `run`.

    type: of its value, which is plain JSON data. written_by: the module that writes it. in_digest: whether
    two runs with the same seed agree in it, so that it counts in `digest`.
    """

    key: str
    type: type[T]
    written_by: str
    about: str
    in_digest: bool = True

    def get(self, store: FactReader) -> T | None:
        """Return the value in a store, None where it has none."""
        return cast("T | None", store.read_value(self.key))

    def require(self, store: FactReader) -> T:
        """Return the value in a store; raise StoreError where it has none."""
        value = self.get(store)
        if value is None:
            raise StoreError(
                f"{store.folder}: the run store has no fact `{self.key}` ({self.about})",
                fix=f"see what is whole: evomerge doctor {store.folder}",
            )
        return value

    def set(self, store: FactWriter, value: T | None) -> None:
        """Store or replace the value."""
        store.write_value(self.key, value)


@dataclass(frozen=True, slots=True)
class FactFamily(Generic[T]):
    """Facts that share a first word; what follows says what each is about, as in `gradient RECIPE LOSS`."""

    prefix: str
    parts: tuple[str, ...]
    type: type[T]
    written_by: str
    about: str
    in_digest: bool = True

    @property
    def key(self) -> str:
        """The form of the keys, for people."""
        return " ".join((self.prefix, *self.parts))

    @property
    def pattern(self) -> str:
        """The form of the keys, for SQL's GLOB."""
        return f"{self.prefix} *"

    def of(self, *parts: str) -> Fact[T]:
        """Return one of the facts."""
        assert len(parts) == len(self.parts)
        key = " ".join((self.prefix, *parts))
        return Fact(key, self.type, self.written_by, self.about, self.in_digest)


CONFIG = Fact(
    "config",
    dict[str, Any],
    "prepare",
    "the run config, without `out`, permissions and secrets",
    in_digest=False,
)
IDENTITY = Fact("identity", str, "prepare", "hash of all settings that change results")
SUITE = Fact("suite", dict[str, Any], "prepare", "the suite, without the place of its task files")
SUITE_DIGEST = Fact("suite_digest", str, "prepare", "hash of the suite and the files its tasks use")
TASK_FILES = Fact(
    "task_files",
    dict[str, str],
    "prepare",
    "per file that the suite's tasks use, hash of its content",
    in_digest=False,
)
FINGERPRINTS = Fact(
    "fingerprints",
    dict[str, str],
    "prepare",
    "per model, hash of its config, headers, sizes and sampled weights",
)
MODEL_FILES = Fact(
    "model_files",
    dict[str, dict[str, dict[str, int | str]]],
    "prepare",
    "per model and file: size, hash of the header, hash of samples of the contents",
)
FULL_HASHES = Fact(
    "full_hashes",
    dict[str, dict[str, str]],
    "compose",
    "per model and file, hash of every byte (with `--full-hash`)",
    in_digest=False,
)
JUDGES = Fact(
    "judges",
    dict[str, dict[str, Any]],
    "prepare",
    "per task with a judge: the served model, its origin as the server says it, a hash of how it is asked",
)
BASELINES = Fact(
    "baselines",
    dict[str, Any],
    "prepare",
    "names of the hand-made merges that are scored (null: all), and whether they are raced as a short list",
)
NORMS = Fact("norms", dict[str, float], "compose", "norm of each source's task vector")
MOVEMENTS = Fact(
    "movements",
    list[float],
    "compose",
    "per gene, how far it moves the merged model, for the surrogate's distances; none in runs before it, "
    "whose genes count alike",
)
ANSWERS = Fact(
    "answers",
    dict[str, list[str | None]],
    "compose",
    "per task with `companion: specialist`, the specialist's right answers on `search`",
)
DISTRIBUTIONS = Fact(
    "distributions",
    dict[str, dict[str, Any]],
    "compose",
    "per task with `companion: distribution`, the specialist's answers on `search` as tokens, and at each of "
    "them the likeliest ones (`ids`, int32) with their log-probabilities (`logs`, float32), both in base64",
)
LAYERS = Fact("layers", int, "prepare", "number of the base model's layers")
BLOCKS = Fact("blocks", int, "prepare", "item blocks of `search`; `select` and `test` are one block each")
SHARING = Fact(
    "sharing",
    dict[str, bool],
    "compose",
    "whether requests that begin alike share a row, when scored and when generated; the first worker decided "
    "it on the base",
    in_digest=False,
)
WEIGHTING = Fact(
    "weighting",
    str,
    "prepare",
    "the rule that weights tasks in the mean: `errors` (of the specialists' gains); none in runs before it",
)
STACKS = Fact(
    "stacks",
    int,
    "prepare",
    "evaluations that hand-made stacks may cost before a search of layer paths; none in runs before them",
)
GENES = Fact(
    "genes",
    list[dict[str, Any]],
    "prepare",
    "per gene of the search space: name, kind, and bounds or choices, so that tables need no models",
    in_digest=False,
)
OPTIMIZER = Fact("optimizer", str, "prepare", "name of the optimizer and why it was chosen")
ARITHMETIC = Fact("arithmetic", str, "prepare", "type of device, and dtype of the forward passes")
FORWARD = Fact(
    "forward",
    dict[str, Any],
    "prepare",
    "how forward passes are computed: attention, context length, batch size, threads",
    in_digest=False,
)
WARM_START = Fact(
    "warm_start", list[dict[str, Any]], "prepare", "names and recipes that the search starts from"
)
BATCH_SIZES = Fact(
    "batch_sizes",
    list[dict[str, Any]],
    "running.batches",
    "each halving of a batch size for want of memory: split, block, new and old size, phase, and whether all "
    "scores of the block were made again",
)
GRADIENT = FactFamily(
    "gradient",
    ("RECIPE", "LOSS"),
    dict[str, Any],
    "running.slopes",
    "a step of a gradient start: loss and derivatives, or the failure; `items` is its cost",
)
GRADIENT_SECONDS = Fact(
    "gradient_seconds",
    float,
    "running.slopes",
    "time that all workers together took for gradients",
    in_digest=False,
)
GRADIENT_PARTS = Fact(
    "gradient_parts", int, "running.slopes", "parts that the items of a gradient step are divided into"
)
CHOSEN_ON = Fact(
    "chosen_on", list[int], "search", "item blocks of `search` that the finalists were chosen on"
)
DESCENT = Fact(
    "descent_plan",
    dict[str, Any],
    "search",
    "how many gradient steps the search decided on by its budget, and the share of the items in each",
)
FRUGAL = Fact("frugal", bool, "search", "that the search stops where generations add nothing to gradients")
WEIGHTS = FactFamily(
    "weights",
    ("RECIPE",),
    str,
    "running.store",
    "type and SHA-256 of the merged weights that were scored on `test`, which an export must equal",
)
SPENT = Fact("spent", list[int], "running.store", "last told generation, and the items scored by then")
PENDING = Fact(
    "pending",
    list[list[int]],
    "running.store",
    "of an asynchronous search: from which arrival on, how many candidates are pending",
)
PROPOSED = Fact(
    "proposed",
    int,
    "running.store",
    "of an asynchronous search: how many candidates it has proposed; the table `ask` has those that arrived",
)
ITEM_NOTES = Fact(
    "item_notes",
    list[str],
    "compose",
    "which items were left out as near duplicates, one sentence for each task and split",
    in_digest=False,
)
STOPPED = Fact("stopped", str, "compose", "why the search ended; null while it goes on")
STOP = Fact(
    "stop",
    dict[str, Any],
    "running.budget",
    "which limit of the clock ended the search, and after which generation",
    in_digest=False,
)
CLOCK = Fact(
    "clock",
    dict[str, Any],
    "running.forecast",
    "this session's limit of the clock and the last estimate, in epoch seconds",
    in_digest=False,
)
MIGRATED = Fact(
    "migrated",
    dict[str, Any],
    "running.store",
    "schema version before `evomerge migrate`, and whether the search can go on",
    in_digest=False,
)
STORE_ID = Fact(
    "store_id",
    int,
    "running.store",
    "a random number, drawn for each store, with which the checksums of all other rows begin",
    in_digest=False,
)

FACTS: tuple[Fact[Any] | FactFamily[Any], ...] = tuple(
    declared for declared in tuple(globals().values()) if isinstance(declared, Fact | FactFamily)
)
"""All of them, in the order of the table in runs/README.md."""

Values = Mapping[Fact[Any], Any]
"""Facts with their values, to be written in one transaction."""


def outside_digest() -> list[str]:
    """Return the keys that `digest` leaves out."""
    return sorted(fact.key for fact in FACTS if not fact.in_digest)


def as_table() -> str:
    """Return the declarations as the Markdown table of runs/README.md."""
    rows = [
        f"| `{fact.key}` | {fact.about} | `{fact.written_by}` | {'yes' if fact.in_digest else 'no'} |"
        for fact in FACTS
    ]
    return "\n".join(["| fact | value | written by | in `digest` |", "|---|---|---|---|", *rows])
