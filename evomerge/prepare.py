"""Prepare: a run config, checked against the models' headers; every refusal before the first weight is read.

Everything that headers and YAML can show is checked in `prepare`, before a weight is read or a file is
written; what needs the models (tasks, metrics) shows when the executor builds its first worker, still before
the run folder exists.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.config import PERMISSIONS, ModelsSpec, RunConfig, load_suite
from evomerge.errors import ConfigError, StoreError
from evomerge.evaluation import sandbox
from evomerge.evaluation.gains import ERRORS
from evomerge.evaluation.normalise import check_specialists
from evomerge.evaluation.sharing import Sharing
from evomerge.evaluation.suite import Suite
from evomerge.merging import methods, modules
from evomerge.merging.recipe import OUTSIDE, Recipe, TensorGroup
from evomerge.merging.sources.source import Source
from evomerge.merging.tensors import kernels
from evomerge.running import earlier_scores, executors, forward, warm_start
from evomerge.running.clock import moment, shown
from evomerge.running.inputs import RunInputs, facts_of
from evomerge.running.store import BASE, StoreReader, facts
from evomerge.running.worker import WorkerSpec, counted
from evomerge.search import baselines, optimizers, stacks
from evomerge.search.objective import ObjectiveSpec
from evomerge.search.racing import RacingSpec, automatic_blocks
from evomerge.search.spaces import kinds
from evomerge.search.spaces.kinds import AnySpec, gene_table
from evomerge.search.spaces.layer_path import LayerPathSpec
from evomerge.search.spaces.preset import SpaceSpec
from evomerge.search.spaces.space import Space
from evomerge.search.warm_start import WarmStart
from evomerge.stored import StoredRun
from evomerge.text import in_texts, redacted


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run config that passed all checks, with everything it names opened (headers only).

    inputs: what models and task files are now, to be compared while the run goes on. parameters: number of
    the base model's weights. layers: number of the base model's layers. optimizer: its name and the reason
    for it. notes: remarks on the models that are no errors. baselines: the hand-made merges to score.
    weighting: the rule that weights tasks in the mean, None in a run that was begun before there was one.
    stacks: evaluations that hand-made stacks may cost before a search of layer paths, 0 in other searches.
    judges: task -> what its judge's server serves, once it was asked.
    """

    config: RunConfig
    suite: Suite
    space: kinds.AnySpace
    template: Recipe
    worker: WorkerSpec
    inputs: RunInputs
    executor: executors.ExecutorSpec
    models: executors.ModelSizes
    layers: int
    optimizer: str
    notes: tuple[str, ...]
    warm: WarmStart = field(default_factory=WarmStart)
    baselines: baselines.Choice = field(default_factory=baselines.Choice)
    weighting: str | None = ERRORS
    stacks: int = 0
    judges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """The number of parameters of each model."""
        return self.models.parameters

    @property
    def model_facts(self) -> dict[facts.Fact[Any], Any]:
        """The facts by which a stored run recognises its models."""
        return {facts.FINGERPRINTS: self.inputs.fingerprints, facts.MODEL_FILES: self.inputs.files}

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out)


def prepare(config: RunConfig) -> Prepared:
    """Check a config against the models' headers; raise UserError at the first thing that can't work."""
    from evomerge.merging.compatibility import check
    from evomerge.merging.sources import chat
    from evomerge.merging.sources.opening import open_sources

    suite = _suite(config).weighted(config.objective.weights)
    config.objective.check(suite, config.models.sources)
    sources = open_sources(config.locations, BASE, tokenizer=config.tokenizer, experts=config.models.experts)
    headers = sources[BASE].headers
    template = _template(config, tuple(headers))
    assert not isinstance(config.space, str)
    notes = (*check(template, sources), *_module_notes(config.models, headers), *kernels.notes())
    if config.scores_from is not None:
        notes += (f"scores that {config.scores_from} has are copied, which an estimate leaves out",)
    notes += (*chat.notes(template, sources), *sandbox.notes(config.permissions))
    check_specialists(suite, config.models.sources)
    space = kinds.apply(
        config.space,
        template=template,
        sources=tuple(config.models.sources),
        tensors={name: tuple(source.headers) for name, source in sources.items()},
    )
    optimizer_of(config, space)
    measured = config.models.measured
    inputs = RunInputs(
        fingerprints={name: source.fingerprint for name, source in sources.items()},
        files=facts_of(sources, measured),
        measured=measured,
        suite=suite.digest(),
        task_files=suite.file_hashes(),
    )
    warm = warm_start.resolve(
        config.warm_start, space=space, template=template, folder=Path(config.out), inputs=inputs
    )
    for recipe in (*(start.recipe for start in warm.recipes), *_particular(template, config.space)):
        check(recipe, sources)
    warm = _with_gradients(warm, space, config.objective)
    _check_engine(config)
    models = _sizes(config, sources, gradients=warm.gradients is not None)
    executor, worker = _worker(config, suite, inputs, models)
    racing = _racing(config, worker)
    return Prepared(
        config=config.model_copy(update={"racing": racing}),
        suite=suite,
        space=space,
        template=template,
        worker=replace(worker, blocks=racing.count, sharing=_sharing(config)),
        inputs=inputs,
        executor=executor,
        models=models,
        optimizer=optimizers.choose(config.optimizer, space.coordinates, config.objective.count)[1],
        layers=sources[BASE].num_layers,
        notes=notes,
        warm=warm,
        baselines=_baselines(config, template, models.parameters),
        weighting=_weighting(config),
        stacks=_stacks(config),
    )


def with_judges(prepared: Prepared) -> Prepared:
    """Ask the servers of the suite's judges what they serve; raise UserError where one can't judge."""
    specs = {task.task: task.judge for task in prepared.suite.tasks if task.judge is not None}
    if not specs:
        return prepared
    from evomerge.evaluation.judge import serving

    if prepared.config.executor.name == "ray":
        raise ConfigError(
            "judges keep their verdicts in the run folder, which workers on a Ray cluster don't share",
            expected="executor: {name: local}, or inline",
        )
    permissions = prepared.config.permissions
    return replace(prepared, judges={name: serving(name, spec, permissions) for name, spec in specs.items()})


def _sizes(config: RunConfig, sources: Mapping[str, Source], *, gradients: bool) -> executors.ModelSizes:
    """Return what of the models matters to a machine; adapters count as their bases' files."""
    folders = {source.folder for source in sources.values()}
    return executors.ModelSizes(
        parameters=sum(header.count for header in sources[BASE].headers.values()),
        dtype=config.dtype,
        files=sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors")),
        cached=_cached(sources[BASE].config),
        batch=config.executor.batch_size,
        engine=config.executor.generation != "transformers",
        gradients=gradients,
    )


def _cached(config: Mapping[str, Any]) -> int:
    """Return how many numbers a model keeps per token (keys and values of all layers), 0 where unknown."""
    layers, hidden, heads = (
        value if isinstance(value := config.get(name), int) else 0
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if heads <= 0:
        return 0
    size = config.get("head_dim") or hidden // heads
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * size)


def _template(config: RunConfig, tensors: tuple[str, ...]) -> Recipe:
    """Return the recipe of which all others have models, dtype, tokenizer, template and seed."""
    return Recipe(
        models=config.locations,
        groups=(TensorGroup(method="linear", sources=tuple(config.models.sources)),),
        base=BASE,
        dtype=config.dtype,
        tokenizer=config.tokenizer,
        experts=config.models.experts,
        chat_template=config.chat_template,
        seed=config.seed,
        kept=_kept(config.models, tensors),
        fisher=config.models.fisher,
        gram=config.models.gram,
    )


def _particular(template: Recipe, space: AnySpec) -> Iterator[Recipe]:
    """Yield recipes of the methods that need files or adapters, to check that the sources have them."""
    chosen = space.method.choices if isinstance(space, SpaceSpec) else ()
    for name in methods.names():
        method = methods.get(name)
        if method.file is not None and (files := template.files(method.file)):
            yield template.with_groups([TensorGroup(method=name, sources=tuple(files))])
        if method.factored and name in chosen:
            yield template.with_groups([TensorGroup(method=name, sources=template.groups[0].sources)])


def _kept(models: ModelsSpec, tensors: tuple[str, ...]) -> tuple[TensorGroup, ...]:
    """Return the groups of the modules beside the text decoder that are not searched."""
    if models.other_modules == "search":
        return ()
    copied = models.other_modules == "copy"
    return tuple(
        TensorGroup(
            method="linear",
            sources=(BASE,) if copied else tuple(models.sources),
            layers=OUTSIDE,
            match=modules.prefixes(tensors, module),
        )
        for module in modules.beside_text(tensors)
    )


def _module_notes(models: ModelsSpec, tensors: Iterable[str]) -> Iterator[str]:
    """Say what becomes of the modules beside the text decoder."""
    counts = modules.counts(tensors)
    words = {"copy": "copied from the base", "merge": "averaged over the sources", "search": "searched"}
    others = [f"{name} ({n} tensors)" for name, n in counts.items() if name != modules.TEXT]
    if others:
        yield (
            f"{', '.join(others)}: {words[models.other_modules]} in every merge (models.other_modules); "
            "layers are those of the text decoder"
        )


def _baselines(config: RunConfig, template: Recipe, weights: int) -> baselines.Choice:
    """Return the baselines of a run: those it was begun with, or those its config asks for."""
    folder = Path(config.out)
    if StoreReader.exists(folder):
        with StoreReader.read(folder) as store:
            return baselines.Choice.from_data(facts.BASELINES.get(store))
    sources = tuple(config.models.sources)
    rows = baselines.hand_made(template, sources, dict.fromkeys(sources, 1.0))
    available = [*(row.name for row in rows), baselines.SOUP]
    return baselines.choose(config.baselines, available=available, weights=weights)


def _suite(config: RunConfig) -> Suite:
    """Return the config's suite; a run that was stored before goes on asking models as it began."""
    suite = load_suite(config.suite)
    folder = Path(config.out)
    if StoreReader.exists(folder):
        with (
            contextlib.suppress(StoreError),  # opening the run for work raises the same error with its reason
            StoreReader.read(folder) as store,
        ):
            suite = suite.as_stored(facts.SUITE.get(store) or suite.model_dump())
    return suite


def _racing(config: RunConfig, worker: WorkerSpec) -> RacingSpec:
    """Return the config's racing with a number of blocks: a run keeps the one it was begun with."""
    if config.racing.blocks != "auto":
        return config.racing
    if StoreReader.exists(Path(config.out)):
        with (
            contextlib.suppress(StoreError),  # opening the run for work raises the same error with its reason
            StoreReader.read(Path(config.out)) as store,
        ):
            return config.racing.decided(facts.BLOCKS.get(store) or 1)
    answers, items = counted(worker)
    blocks = automatic_blocks(answers=answers, items=items, batch_size=worker.batch_size)
    return config.racing.decided(blocks)


def _weighting(config: RunConfig) -> str | None:
    """Return the rule that weights tasks in the mean: a run keeps the one it was begun with."""
    if StoreReader.exists(Path(config.out)):
        with (
            contextlib.suppress(StoreError),  # as above
            StoreReader.read(Path(config.out)) as store,
        ):
            return facts.WEIGHTING.get(store)
    return ERRORS


def _stacks(config: RunConfig) -> int:
    """Return what hand-made stacks may cost: nothing where a run was begun without them."""
    if not isinstance(config.space, LayerPathSpec) or config.objective.several:
        return 0
    if StoreReader.exists(Path(config.out)):
        with (
            contextlib.suppress(StoreError),  # as above
            StoreReader.read(Path(config.out)) as store,
        ):
            return facts.STACKS.get(store) or 0
    return stacks.COST


def _sharing(config: RunConfig) -> Sharing | None:
    """Return whether requests share rows in a stored run; None in a new one, whose first worker decides."""
    if StoreReader.exists(Path(config.out)):
        with (
            contextlib.suppress(StoreError),  # as above
            StoreReader.read(Path(config.out)) as store,
        ):
            return Sharing.of_run(facts.SHARING.get(store))
    return None


def _worker(
    config: RunConfig, suite: Suite, inputs: RunInputs, models: executors.ModelSizes
) -> tuple[executors.ExecutorSpec, WorkerSpec]:
    """Return where workers run, and what they need to score candidates, with all items in one block.

    A run keeps the dtype and the number of threads that it was begun with, and begins with those of a run
    whose scores it copies.
    """
    from evomerge.merging.tensors.on_device import merges_there

    kept = forward.kept(Path(config.out)) or (
        None if config.scores_from is None else forward.kept(Path(config.scores_from))
    )
    spec = config.executor
    device, dtype, _ = executors.resolve(spec, models)
    if kept is not None and spec.dtype == "auto":
        dtype = kept.dtype
    spec = executors.fitted(spec, models, dtype)
    if spec.name != "ray":  # whose workers look on their own machines
        merges_there(spec.merge_on, device)
    threads = executors.resolve(spec, models)[2]
    if kept is not None and spec.threads is None:
        threads = kept.threads or threads
    return spec, WorkerSpec(
        models=config.locations,
        base=BASE,
        tokenizer=config.tokenizer,
        experts=config.models.experts,
        chat_template=config.chat_template,
        suite=suite,
        batch_size=config.executor.batch_size,
        dtype=dtype,
        device=device,
        threads=threads,
        max_length=config.executor.max_length,
        attention=config.executor.attention,
        low_memory=config.executor.low_memory,
        merge_on=config.executor.merge_on,
        block_seed=config.seed,
        generation=config.executor.generation,
        permissions=config.permissions,
        inputs=inputs,
        stored_text=config.stored_text,
        judgements=Path(config.out),
    )


def _with_gradients(warm: WarmStart, space: Space, objective: ObjectiveSpec) -> WarmStart:
    """Return a warm start without automatic gradients where there can be none; refuse those asked for."""
    from evomerge.merging.tensors.derivatives import supports

    if warm.gradients is None:
        return warm
    used = {group.method for group in space.decode(np.full(space.dimension, 0.5)).groups}
    fixed = all(coordinate.levels is not None for coordinate in space.coordinates)
    if not fixed and any(map(supports, used)):
        return replace(warm, gradients=None) if warm.automatic and objective.several else warm
    if warm.automatic:
        return replace(warm, gradients=None)
    raise ConfigError(
        "warm_start.gradients: the search space has no continuous gene to follow a slope in"
        if fixed
        else f"warm_start.gradients: {', '.join(sorted(used))} can't be differentiated",
        expected=None if fixed else "a space over a method such as linear, task_arithmetic, ties or slerp",
        fix="set warm_start.gradients: off",
    )


def _check_engine(config: RunConfig) -> None:
    """Refuse a generation engine that is not installed or too old, or that can't hold this run's models."""
    if config.executor.generation == "transformers":
        return
    from evomerge.evaluation.vllm_engine import check_installed

    check_installed()
    if config.chat_template not in ("", BASE):
        raise ConfigError(
            "executor.generation: vllm ends answers as the base does",
            got="another chat_template",
            fix="set executor.generation: transformers",
        )
    if isinstance(config.space, LayerPathSpec) or config.tokenizer not in ("", BASE):
        raise ConfigError(
            "executor.generation: vllm holds one model of the base's layers and vocabulary",
            got="a search space of layer paths" if not config.tokenizer else f"tokenizer: {config.tokenizer}",
            fix="set executor.generation: transformers",
        )


def optimizer_of(config: RunConfig, space: Space) -> optimizers.Optimizer:
    """Return the run's optimizer as it would begin in the middle of the space; ConfigError if it can't."""
    return optimizers.create(
        config.optimizer,
        coordinates=space.coordinates,
        objectives=config.objective.count,
        starts=[np.full(space.dimension, 0.5)],
        seed=np.random.SeedSequence(0),
    )


def run_facts(prepared: Prepared) -> dict[facts.Fact[Any], Any]:
    """Return the facts that are stored when a run is begun, and compared when it goes on."""
    config = prepared.config
    start: dict[facts.Fact[Any], Any] = (
        {} if prepared.weighting is None else {facts.WEIGHTING: prepared.weighting}
    )
    start |= {facts.STACKS: prepared.stacks} if prepared.stacks else {}
    if prepared.judges:
        start[facts.JUDGES] = {name: dict(judge) for name, judge in prepared.judges.items()}
    start |= {facts.WARM_START: warm_start.to_data(prepared.warm)} if prepared.warm.recipes else {}
    return (
        start
        | prepared.model_facts
        | {
            # A run folder may be moved, and may come from another person.
            facts.CONFIG: in_texts(redacted, config.model_dump(mode="json", exclude={"out", *PERMISSIONS})),
            facts.IDENTITY: config.identity(),
            facts.BLOCKS: prepared.worker.blocks,
            facts.SUITE: prepared.suite.model_dump(mode="json", exclude={"tasks_dir"}),
            facts.SUITE_DIGEST: prepared.inputs.suite,
            facts.TASK_FILES: dict(prepared.inputs.task_files),
            facts.OPTIMIZER: prepared.optimizer,
            facts.GENES: gene_table(prepared.space),
            facts.BASELINES: prepared.baselines.as_data(),
            facts.LAYERS: prepared.layers,
            facts.FORWARD: forward.as_data(forward.find(prepared.worker)),
            facts.ARITHMETIC: f"{prepared.worker.device.split(':')[0]} {prepared.worker.dtype}",
        }
    )


def check_folder(prepared: Prepared) -> None:
    """Refuse a run folder that can't be made, holds something else, or this run on changed inputs.

    And another run whose scores can't be this one's, unless this run was begun with it.
    """
    folder, place = prepared.folder, prepared.config.scores_from
    StoreReader.refuse_held(folder)
    begun_with = None
    if exists := StoreReader.exists(folder):
        with StoreReader.read(folder) as store:
            StoredRun(store).check_same(run_facts(prepared), prepared.suite)
            begun_with = facts.CONFIG.require(store).get("scores_from")
    if place is not None and place != begun_with:
        earlier_scores.refuse_other(Path(place), folder, run_facts(prepared), forward.versions())
    if exists:
        return
    if folder.is_dir():
        others = [p for p in folder.iterdir() if p.name != ".lock" and not p.name.startswith(".run.sqlite")]
        if others:
            raise StoreError(
                f"{folder}: exists and is not a run folder", fix="choose another `out`, or empty the folder"
            )
    above = next(p for p in (folder, *folder.parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StoreError(
            f"{folder}: the run folder can't be made",
            got=f"{above} is not a writable folder",
            fix="choose another `out`",
        )


def check_time(prepared: Prepared) -> None:
    """Refuse to start a run whose time limit has passed."""
    until, now = prepared.config.budget.until, time.time()
    if until is not None and not StoreReader.exists(prepared.folder) and moment(until, now) <= now:
        raise ConfigError(
            f"budget.until: {shown(moment(until, now))} has passed",
            fix='give a later moment, or a time of day ("08:00")',
        )


def full_hashes(config: RunConfig) -> dict[str, dict[str, str]]:
    """Return model -> file -> hash of all its bytes."""
    from evomerge.merging.sources import model_files
    from evomerge.merging.sources.opening import open_sources

    sources = open_sources(config.locations, BASE, tokenizer=config.tokenizer, experts=config.models.experts)
    return {name: model_files.full_hashes(source) for name, source in sources.items()}
