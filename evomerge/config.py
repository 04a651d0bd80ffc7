"""The run config: one strict YAML file that describes a run completely.

It names presets (search space, suite) or points at files of the same form. Paths of models, spaces and
suites are relative to the config file; `out` is relative to where the command is started.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from evomerge.errors import ConfigError, nearest
from evomerge.evaluation.permissions import Permissions
from evomerge.evaluation.suite import Suite
from evomerge.files import expanded
from evomerge.merging.chat_templates import with_text
from evomerge.merging.methods.declaration import FILES, FileKind
from evomerge.merging.sources.hub import split_id
from evomerge.running.budget import BudgetSpec, replaced
from evomerge.running.executors import ExecutorSpec
from evomerge.running.store import BASE
from evomerge.schema import LARGEST_COUNT, LARGEST_SEED, Strict, find_preset, load_yaml, parse, preset_folder
from evomerge.search.baselines import BaselinesSpec
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.optimizers import OptimizerSpec
from evomerge.search.racing import RacingSpec
from evomerge.search.spaces.kinds import AnySpec, parse_space
from evomerge.search.surrogate.guide import SurrogateSpec
from evomerge.search.warm_start import WarmStartSpec
from evomerge.text import holds_secret

PERMISSIONS = tuple(field.name for field in dataclasses.fields(Permissions))
"""Keys of a config that allow code to run. No run stores them: who continues it gives them again."""

DEMO_CONFIG = Path(__file__).parent / "zoo" / "demo.yaml"
"""The demo is nothing but this run config, on the models beside it."""


class ModelsSpec(Strict):
    """The models: each a folder, a Hugging Face hub id (`org/name` or `org/name@revision`), or
    `path+adapter` for a LoRA on a model."""

    base: str
    """The model that task vectors are measured from."""
    sources: dict[str, str]
    """Name -> location of each fine-tune or adapter. The names appear in every table; `base` is reserved."""
    other_modules: Literal["copy", "merge", "search"] = "copy"
    """What becomes of modules beside the text decoder, such as a vision tower: a copy of the base's, the mean
    of the sources', or part of the search, like embeddings. Every merge of the run does the same."""
    experts: Literal["stored", "matched"] = "stored"
    """Order of the experts of a mixture: as in the files, or `matched`, each model's in the order in which
    they are most like the base's. For models that were not fine-tuned from the base."""
    fisher: dict[str, str] = Field(default_factory=dict)
    """Source -> file of its Fisher information (`evomerge fisher`), for spaces with the method `fisher`."""
    gram: dict[str, str] = Field(default_factory=dict)
    """Source -> file of its Gram matrices (`evomerge gram`), for spaces with the method `regmean`."""
    hub: dict[str, str] = Field(default_factory=dict)
    """Name (`base` or a source's) -> hub id of a local folder's model. Model cards and exported recipes name
    it in place of the folder."""

    @property
    def measured(self) -> dict[FileKind, dict[str, str]]:
        """Return kind -> source -> its Fisher or Gram file."""
        return {"fisher": self.fisher, "gram": self.gram}

    @field_validator("sources")
    @classmethod
    def _named(cls, sources: dict[str, str]) -> dict[str, str]:
        if len(sources) < 1:
            raise ValueError("a merge needs at least one source")
        if BASE in sources:
            raise ValueError(f"{BASE!r} is the name of the base model; call the source something else")
        return sources

    @model_validator(mode="after")
    def _measured(self) -> ModelsSpec:
        for kind in FILES:
            for name in getattr(self, kind):
                if name not in self.sources:
                    raise ValueError(f"{kind} names {name!r}, which is none of the sources")
        return self

    @model_validator(mode="after")
    def _on_hub(self) -> ModelsSpec:
        for name, place in self.hub.items():
            if name != BASE and name not in self.sources:
                raise ValueError(f"hub: no model {name!r}; {nearest(name, (BASE, *self.sources))}")
            if split_id(place) is None:
                raise ValueError(
                    f"hub: {name}: {place!r} is no hub id; expected org/name or org/name@revision"
                )
        return self


class TrackerSpec(Strict):
    """One entry of `tracking`: an experiment tracker that receives the run's metrics."""

    name: Literal["tensorboard", "wandb", "mlflow"]
    """The tracker. A bare name stands for `{name: NAME}`."""
    project: str = Field(default="evomerge", min_length=1)
    """The W&B project or the MLflow experiment."""
    mode: Literal["online", "offline"] = "online"
    """W&B only: `offline` writes files that `wandb sync` uploads later."""
    uri: str | None = None
    """MLflow only: the tracking store. Default: the database RUN/mlflow.db. `${NAME}` stands for an
    environment variable, whose value is not stored."""
    folder: str | None = None
    """TensorBoard only: the folder of the event files. Default: RUN/tensorboard."""

    @model_validator(mode="after")
    def _its_own(self) -> TrackerSpec:
        owners = {"project": ("wandb", "mlflow"), "mode": ("wandb",), "uri": ("mlflow",)}
        for field, names in (owners | {"folder": ("tensorboard",)}).items():
            default = type(self).model_fields[field].default  # a stored config names every setting
            if getattr(self, field) != default and self.name not in names:
                raise ValueError(f"{field} is a setting of {' and '.join(names)}, not of {self.name}")
        return self


class VerdictSpec(Strict):
    """What a winner must keep for a green verdict; it changes no search."""

    kept: float = Field(default=0.5, ge=0, le=1)
    """Least share of the specialist's gain over the base on every task of the mean: 0 is the base, 1 the
    specialist. A task that is significantly below it turns the verdict amber."""


class RunConfig(Strict):
    """A run, as written in its YAML file."""

    models: ModelsSpec
    """The base model and the models to merge."""
    space: str | AnySpec
    """What the search may vary: the name of a preset, the path of a file, or a space written out in place."""
    suite: str | dict[str, Any]
    """What candidates are scored on: the name of a preset, the path of a file, or a suite written out in
    place, whose files start where this config lies."""
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    """The search algorithm."""
    objective: ObjectiveSpec = Field(default_factory=ObjectiveSpec)
    """What the search minimises."""
    verdict: VerdictSpec = Field(default_factory=VerdictSpec)
    """What the report calls a loss."""
    budget: BudgetSpec
    """When the search ends."""
    executor: ExecutorSpec = Field(default_factory=ExecutorSpec)
    """Where and how candidates are scored."""
    racing: RacingSpec = Field(default_factory=RacingSpec)
    """How clearly worse candidates stop early. `off` scores every candidate on all items."""
    surrogate: SurrogateSpec | Literal["off"] = Field(default_factory=SurrogateSpec)
    """The model of the scores that proposes and screens candidates. `off` leaves both to the optimizer."""
    warm_start: WarmStartSpec = Field(default_factory=WarmStartSpec)
    """What the search starts from besides the baselines: another run, recipe files, gradients."""
    baselines: BaselinesSpec = "auto"
    """The hand-made merges that the winner is compared with, beside base and parents: `all`, a list of
    names as reports show them, or `auto`: all for small models; for models of 50 million weights or more a
    short list, raced like candidates, of which the best five are scored on `test`."""
    weak_specialists: Literal["refuse", "allow"] = "refuse"
    """Whether a run starts where the specialists of more than half of the tasks are not shown to be better
    than the base. It measures hardly anything, so it is refused in `check`, and before its baselines."""
    finalists: int = Field(default=8, ge=1, le=10_000)
    """Number of candidates that are scored again on `select`, beside their greedy soup."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the exported weights. Candidates are rounded to it before they are scored."""
    tokenizer: str = ""
    """Where vocabularies differ, the vocabulary of the merged model: `base`, `union`, or a source's name."""
    chat_template: str = ""
    """The chat template of the merged model, with which candidates are asked, too: `base` or a source's name
    (with its end tokens and generation settings), `auto` (the most common one among the models), `alpaca`,
    `chatml`, `llama3`, `mistral`, or a jinja file. Default: as the model that gives the tokenizer."""
    trust_tasks: bool = False
    """Allow the Python code that the suite's task files name to run. Not stored with the run."""
    allow_code_execution: bool = False
    """Allow tasks that execute the models' answers; they run in a process with limits. Not stored with the
    run."""
    ask_judges: bool = False
    """Allow prompts and answers to be sent to the servers of the suite's judges. Not stored with the run."""
    stored_text: int = Field(default=4000, ge=0, le=LARGEST_COUNT)
    """How many characters of every generated answer, and of every item's prompt, the run stores; 0 stores
    neither."""
    tracking: tuple[TrackerSpec, ...] = ()
    """Experiment trackers that receive the run's metrics; none by default."""
    scores_from: str | None = Field(default=None, min_length=1)
    """The folder of another run, finished or not, with the same models, items and forward passes. The scores
    that it has of base, specialists and hand-made merges are copied, so that a second seed or other settings
    of the search don't score them again. It changes no score, only what a run takes."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of every random draw of the run."""
    out: str = Field(min_length=1)
    """The run folder, relative to the folder in which the command is started."""

    @field_validator("surrogate", mode="before")
    @classmethod
    def _switched(cls, surrogate: object) -> object:
        """YAML reads `on` and `off` as true and false."""
        return {"True": {}, "on": {}, "False": "off"}.get(str(surrogate), surrogate)

    @field_validator("racing", mode="before")
    @classmethod
    def _off(cls, racing: object) -> object:
        return {"False": {"blocks": 1}, "off": {"blocks": 1}, "True": {}, "on": {}}.get(str(racing), racing)

    @field_validator("tracking", mode="before")
    @classmethod
    def _named(cls, tracking: object) -> object:
        if not isinstance(tracking, list | tuple):
            return tracking
        return [{"name": each} if isinstance(each, str) else each for each in tracking]

    @field_validator("tracking")
    @classmethod
    def _once(cls, tracking: tuple[TrackerSpec, ...]) -> tuple[TrackerSpec, ...]:
        if len({spec.name for spec in tracking}) < len(tracking):
            raise ValueError("each tracker once")
        return tracking

    @field_validator("space", mode="before")
    @classmethod
    def _written_out(cls, space: object) -> object:
        return parse_space(space, "space") if isinstance(space, Mapping) else space

    @classmethod
    def load(
        cls, path: Path, *, seed: int | None = None, out: str | None = None, **replaced: Any
    ) -> RunConfig:
        """Read a config file and resolve what it names; keyword arguments replace what it says.

        replaced: `workers` and `device` of the executor, and `scores_from`; the others are single limits of
        the budget, each replacing the file's, as in `running.budget.replaced`.
        The result does not depend on the file any more: paths are absolute and the search space is
        written out. A packaged suite keeps its name.
        """
        folder = path.resolve().parent
        return cls.of(load_yaml(path), folder=folder, where=str(path), seed=seed, out=out, **replaced)

    @classmethod
    def of(
        cls,
        data: Mapping[str, Any],
        *,
        folder: Path,
        where: str = "config",
        seed: int | None = None,
        out: str | None = None,
        workers: int | None = None,
        device: str | None = None,
        scores_from: str | PathLike[str] | None = None,
        **budget: Any,
    ) -> RunConfig:
        """Check a config as plain data and resolve what it names; otherwise like `load`.

        folder: where relative paths start. where: its name in messages. workers, device: of the executor.
        seed, out, scores_from: replace those of the config.
        Raises ConfigError.
        """
        _refuse_secrets(data, where)
        data = dict(data) if isinstance(data, Mapping) else data
        if seed is not None:
            data["seed"] = seed
        if out is not None:
            data["out"] = out
        if scores_from is not None:
            data["scores_from"] = str(scores_from)
        chosen = {k: v for k, v in (("workers", workers), ("device", device)) if v is not None}
        if chosen and isinstance(data.get("executor", {}), Mapping):
            data["executor"] = {**data.get("executor", {}), **chosen}
        if any(value is not None for value in budget.values()):
            stored = data.get("budget") or {}
            data["budget"] = replaced(stored, budget, time.time()) if isinstance(stored, dict) else stored
        config = parse(cls, data, where)
        return config.model_copy(
            update={
                "models": config.models.model_copy(
                    update={
                        "base": resolve_location(config.models.base, folder),
                        "sources": {n: resolve_location(s, folder) for n, s in config.models.sources.items()},
                        **{
                            kind: {n: str((folder / expanded(f)).resolve()) for n, f in files.items()}
                            for kind in FILES
                            for files in (getattr(config.models, kind),)
                        },
                    }
                ),
                "space": load_space(config.space, beside=folder),
                "suite": resolve_suite(config.suite, folder)
                if isinstance(config.suite, str)
                else {**config.suite, "folder": str((folder / config.suite.get("folder", ".")).resolve())},
                "chat_template": with_text(config.chat_template, folder, config.locations),
                "warm_start": _resolve_warm_start(config.warm_start, folder),
                "scores_from": config.scores_from and str(expanded(config.scores_from).absolute()),
                "out": str(expanded(config.out).absolute()),
            }
        )

    @property
    def permissions(self) -> Permissions:
        """Which code of the suite's tasks may run, and whether its judges may be asked."""
        return Permissions(**{name: getattr(self, name) for name in PERMISSIONS})

    def permitting(self, permissions: Permissions) -> RunConfig:
        """Return the config with more allowed."""
        allowed = {name: True for name, yes in dataclasses.asdict(permissions).items() if yes}
        return self.model_copy(update=allowed)

    @property
    def locations(self) -> dict[str, str]:
        """Name -> location of all models, the base first."""
        return {BASE: self.models.base, **self.models.sources}

    def identity(self) -> str:
        """Return a hash of everything that changes results: two configs with it share a run folder.

        Budget, verdict, `weak_specialists`, `scores_from`, workers, timeout, trackers, permissions and places
        on the disk don't count: they may change on resume.
        """
        data = self.model_dump(mode="json", exclude=set(PERMISSIONS))
        for name in (
            *("budget", "out", "suite", "tracking", "stored_text", "verdict"),
            *("weak_specialists", "scores_from"),
        ):
            del data[name]
        measured = [[kind, *sorted(files)] for kind in FILES if (files := data["models"][kind])]
        data["models"] = list(self.models.sources)  # in order, because genomes follow it
        if measured:
            data["measured"] = measured
        places = ("name", "workers", "threads", "timeout", "low_memory", "merge_on", "address", "resources")
        for name in places:
            del data["executor"][name]
        if self.executor.generation == "transformers":
            del data["executor"]["generation"]  # runs begun before this setting existed keep their identity
        if self.models.experts != "stored":
            data["experts"] = self.models.experts
        if not self.tokenizer:
            del data["tokenizer"]  # and before this one
        if not self.chat_template:
            del data["chat_template"]  # and before this one
        if self.baselines == "auto":
            del data["baselines"]  # and before this one; what it meant is stored with the run
        if self.warm_start == WarmStartSpec(gradients="off"):
            del data["warm_start"]  # and before this one
        if self.surrogate != "off" and not (self.surrogate.front and self.objective.several):
            del data["surrogate"]["front"]  # and before this one
        if self.objective.kind == "mean":
            del data["objective"]["kind"]  # and before this one
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _refuse_secrets(data: Any, where: str) -> None:
    """Raise ConfigError for passwords and tokens in addresses, because a config is stored with its run."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            _refuse_secrets(value, f"{where}: {key}")
    elif isinstance(data, list):
        for value in data:
            _refuse_secrets(value, where)
    elif isinstance(data, str) and holds_secret(data):
        raise ConfigError(
            f"{where}: holds a secret, and a config is stored with its run",
            expected="an address without user, password or token; in `tracking` it may hold ${NAME}",
            got=data,
            fix="put the secret into an environment variable, and write ${NAME} in its place",
        )


def _resolve_warm_start(spec: WarmStartSpec, folder: Path) -> WarmStartSpec:
    run = None if spec.run is None else str(expanded(spec.run).absolute())
    recipes = tuple(str((folder / expanded(recipe)).resolve()) for recipe in spec.recipes)
    return spec.model_copy(update={"run": run, "recipes": recipes})


def resolve_suite(name: str, folder: Path) -> str:
    """Return a packaged suite's name as it is, and of a file its absolute path."""
    path = find_preset("benchmarks/suites", name, beside=folder).resolve()
    return name if path.parent == preset_folder("benchmarks/suites").resolve() else str(path)


def load_suite(suite: str | Mapping[str, Any]) -> Suite:
    """Return the suite of a name, a path, or plain data, in which `folder` says where its files lie."""
    if isinstance(suite, str):
        return Suite.load(suite)
    data = dict(suite)
    return Suite.from_mapping(data, folder=Path(str(data.pop("folder", "."))), where="suite")


def load_space(space: str | AnySpec, *, beside: Path | None = None) -> AnySpec:
    """Return the search space of a preset name, a file, or as it is."""
    if not isinstance(space, str):
        return space
    path = find_preset("search_spaces", space, beside=beside)
    return parse_space(load_yaml(path), str(path))


def resolve_location(location: str, folder: Path) -> str:
    """Return a model location with its local parts absolute; hub ids stay as they are.

    A part counts as local if it, or the folder it should be in, exists beside the config file, or if it
    looks like a path.
    """
    return "+".join(_resolve_part(part, folder) for part in location.split("+"))


def _resolve_part(part: str, folder: Path) -> str:
    if not part:
        raise ConfigError("a model location is empty", expected="a folder, a hub id or path+adapter")
    path = expanded(part)
    beside = folder / path
    mistyped = len(path.parts) > 1 and beside.parent.is_dir()  # its folder is here, so it is not the hub's
    if (
        path.is_absolute()
        or beside.exists()
        or mistyped
        or part.startswith((".", "~"))
        or split_id(part) is None
    ):
        return str(beside.resolve())
    return part
