"""The worker: one live model, one harness; a recipe comes in, its scores go out."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evomerge import heap, steps
from evomerge.errors import JudgeError, NonFiniteError, UserError
from evomerge.evaluation.distributions import Distributions
from evomerge.evaluation.permissions import NOTHING, Permissions
from evomerge.evaluation.scores import Failure, Question, Scores, Split, joined
from evomerge.evaluation.sharing import Sharing
from evomerge.evaluation.smooth_loss import Gradient, SmoothLoss
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import STORED, Recipe, TensorGroup, tokenizer_of
from evomerge.running import out_of_memory, retries
from evomerge.running.inputs import InputGuard, RunInputs
from evomerge.running.store import Timing

if TYPE_CHECKING:
    from evomerge.evaluation.engine import Engine
    from evomerge.evaluation.harness import Harness


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job: score a recipe on some item blocks of a split.

    batch_sizes: block -> requests per forward pass; other blocks take the worker's batch size.
    not_after: the latest start, in epoch seconds; None: any time. questions: return what is asked, too.
    """

    recipe: Recipe
    split: Split
    blocks: tuple[int, ...] = (0,)
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    not_after: float | None = None
    questions: bool = False

    def part(self, blocks: Sequence[int]) -> Job:
        """Return the job on some of its blocks."""
        return replace(self, blocks=tuple(blocks))


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientJob:
    """A job: differentiate a loss on items of a split with respect to a recipe's parameters.

    batch_size: None means the worker's own.
    """

    recipe: Recipe
    loss: SmoothLoss
    split: Split = "search"
    batch_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributionsJob:
    """A job: let a model answer all `search` items of some tasks, with what it expects at each token."""

    recipe: Recipe
    tasks: tuple[str, ...]
    split: Split = "search"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenAnswers:
    """The outcome of a DistributionsJob: task -> for each item what was written, with its distributions."""

    rows: Mapping[str, Sequence[Distributions]]


_AnyJob = Job | GradientJob | DistributionsJob


@dataclass(frozen=True, slots=True, kw_only=True)
class NotBegun:
    """The outcome of a job, or of the rest of one, that reached a worker after its `not_after`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a job; `timing` is None where there are no scores.

    outcome: the scores of all blocks together, or a failure. parts: the scores of each block, where there are
    several; with NotBegun, of the blocks scored before. faults: one line per earlier attempt that failed.
    block: the block on which scoring failed. weights: digest of the live weights that were scored on `test`.
    questions: block -> task -> what was asked, where the job wants it. seconds: that a gradient took.
    """

    job: _AnyJob
    outcome: Scores | Gradient | WrittenAnswers | Failure | NotBegun
    timing: Timing | None = None
    parts: tuple[Scores, ...] = ()
    faults: tuple[str, ...] = ()
    block: int | None = None
    weights: str | None = None
    questions: Mapping[int, Mapping[str, Sequence[Question]]] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """Everything a worker needs to know, picklable.

    models, base, tokenizer, chat_template: as in a Recipe. dtype: the type of the forward pass ("float32",
    "bfloat16"); weights are rounded to the recipe's own dtype before. batch_size: requests per forward
    pass, unless a job says otherwise; part of a run's identity because it changes the last bits of scores.
    merge_on: where candidates are merged, as in Workbench.
    max_length: in tokens; None takes the model's. threads: of each worker. blocks, block_seed: as in
    Harness. generation: what continues prompts, the live model ("transformers") or an engine beside it
    ("vllm"). permissions: which code of the tasks may run. inputs: what models and task files were when the
    run began, None where they are not compared. stored_text, answers,
    distributions, sharing: as in Harness; a run's first worker decides on `sharing`. judgements: the run
    folder, where verdicts of judges are kept; None keeps none.
    """

    models: Mapping[str, str]
    base: str
    suite: Suite
    batch_size: int
    dtype: str
    device: str
    threads: int
    max_length: int | None = None
    attention: str | None = None
    low_memory: bool = False
    merge_on: str = "cpu"
    tokenizer: str = ""
    experts: str = STORED
    chat_template: str = ""
    blocks: int = 1
    block_seed: int = 0
    generation: str = "transformers"
    permissions: Permissions = NOTHING
    inputs: RunInputs | None = None
    stored_text: int = 0
    answers: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    distributions: Mapping[str, Sequence[Distributions]] = field(default_factory=dict)
    sharing: Sharing | None = None
    judgements: Path | None = None

    def guard(self) -> InputGuard | None:
        """Return what compares models and task files with `inputs`, None without any."""
        if self.inputs is None:
            return None
        return InputGuard(
            self.inputs,
            models=self.models,
            base=self.base,
            tokenizer=self.tokenizer,
            experts=self.experts,
            suite=self.suite,
        )

    def base_alone(self) -> Recipe:
        """Return the recipe of the base, as it is."""
        return Recipe(
            models=self.models,
            base=self.base,
            groups=(TensorGroup(method="linear", sources=(self.base,), parameters={"weight": 1.0}),),
            dtype=self.dtype,
            tokenizer=tokenizer_of(self.tokenizer, self.base, self.models),
            experts=self.experts,
            chat_template=self.chat_template,
        )

    def blocks_of(self, split: Split) -> tuple[int, ...]:
        """Return the item blocks of a split."""
        return tuple(range(self.blocks if split == "search" else 1))


def build_harness(spec: WorkerSpec) -> Harness:
    """Build a worker's harness and all items, from the models' headers, configs and tokenizers alone.

    Raises UserError where the suite can't be used with these models, or their tokenizer is not the one that
    their tokenizer.json holds.
    """
    import torch

    from evomerge.merging.live.stacked_models import build
    from evomerge.merging.sources.tokenizer_check import check_tokenizer

    tokenizer, source = _tokenizer(spec)
    harness = _harness(spec, tokenizer)
    with torch.device("meta"):  # a model without weights
        config = build(source, source.config, spec.dtype, spec.attention).config
    harness.prepare(config)
    check_tokenizer(tokenizer, source, harness.prompts())
    return harness


def _harness(spec: WorkerSpec, tokenizer: Any) -> Harness:
    from evomerge.evaluation.harness import Harness

    return Harness(
        spec.suite,
        tokenizer=tokenizer,
        batch_size=spec.batch_size,
        max_length=spec.max_length,
        blocks=spec.blocks,
        block_seed=spec.block_seed,
        permissions=spec.permissions,
        stored_text=spec.stored_text,
        answers=spec.answers,
        distributions=spec.distributions,
        sharing=spec.sharing,
    )


def item_notes(spec: WorkerSpec) -> list[str]:
    """Return what a reader should know about the items; only configs and tokenizers are read for it."""
    return _harness(spec, _tokenizer(spec)[0]).notes


def counted(spec: WorkerSpec) -> tuple[int, int]:
    """Return how many answers models write on `search`, and the number of items of its smallest task.

    Only configs and tokenizers of the models are read for it.
    """
    harness = _harness(replace(spec, blocks=1), _tokenizer(spec)[0])
    return harness.written("search"), harness.fewest


def _tokenizer(spec: WorkerSpec) -> tuple[Any, Any]:
    """Return the tokenizer that the models share, and the source that it is from."""
    from evomerge.merging.sources import chat
    from evomerge.merging.sources.opening import open_sources

    sources = open_sources(spec.models, spec.base, tokenizer=spec.tokenizer, experts=spec.experts)
    recipe = spec.base_alone()
    return chat.open_tokenizer(recipe.chat_template, recipe.pattern, sources), sources[recipe.pattern]


class Worker:
    """Scores recipes one after the other. Building one loads the models and prepares all items.

    sharing: whether requests share rows. Raises UserError where models or suite can't be used, or are not
    those the run began with.
    """

    _guard: InputGuard | None = None

    def __init__(self, spec: WorkerSpec, name: str = "0") -> None:
        import torch

        from evomerge.merging.live.workbench import Workbench

        heap.bound_kernels()
        torch.set_num_threads(spec.threads)
        self.name = name
        self._device, self._batch_size = spec.device, spec.batch_size
        steps.say("reading tasks")
        self._harness = build_harness(spec)  # before the models are loaded, because it refuses suites
        if spec.judgements is not None:
            self._harness.judged_in(spec.judgements)
        steps.say("loading models")
        self._bench = Workbench(
            spec.models,
            spec.base,
            tokenizer=spec.tokenizer,
            experts=spec.experts,
            chat_template=spec.chat_template,
            device=spec.device,
            compute_dtype=spec.dtype,
            attn_implementation=spec.attention,
            low_memory=spec.low_memory,
            merge_on=spec.merge_on,
        )
        if spec.generation != "transformers":
            from evomerge.evaluation.engine import TOLERANCE

            bench = self._bench
            self._harness.mirror(
                _engine(spec), tolerance=TOLERANCE[spec.dtype], weights=lambda _: bench.tensors()
            )
        self._base = spec.base_alone()
        with contextlib.suppress(NonFiniteError):  # then every candidate says so
            self._load(self._base)
        heap.give_back(self._bench.model)
        steps.say("trying the model out")
        self._harness.try_out(self._bench.model)
        self.sharing: Sharing | None = self._harness.sharing
        self._guard = spec.guard()
        if self._guard is not None:
            self._guard.compare()

    def run(self, job: _AnyJob) -> Result:
        """Run one job. An exception becomes a Failure; after transient faults the job is tried again.

        Args:
            job: A recipe to score on item blocks, a loss to differentiate, or answers to write.

        Returns:
            The outcome (scores, gradient, answers or failure) with its times in seconds.

        Raises:
            UserError: the models changed since the run began, or a judge can't be asked, so that nothing can
                be scored.
        """
        if self._guard is not None:
            self._guard.check()
        result = self._run(job)
        heap.give_back(self._bench.model)
        if self._guard is not None:
            self._guard.check()  # again, because the files are mapped: a change reaches the merge
        return result

    def _run(self, job: _AnyJob) -> Result:
        if isinstance(job, Job) and job.not_after is not None and time.time() >= job.not_after:
            return Result(job=job, outcome=NotBegun())
        faults: list[str] = []
        try:
            found = retries.insist(lambda: self._attempt(job), faults)
            if _lacks_memory(found.outcome) and self._bench.give_way():
                self._make_room(found.outcome)  # which the sources took, that merging can do without
                found = retries.insist(lambda: self._attempt(job), faults)
        except JudgeError:
            raise
        except Exception as error:
            found = Result(job=job, outcome=failure_of(error, attempts=len(faults) + 1))
        return replace(found, faults=tuple(faults))

    def _attempt(self, job: _AnyJob) -> Result:
        """Run one job once; raise transient faults only."""
        if isinstance(job, DistributionsJob):
            return Result(job=job, outcome=self._distributions(job))
        if isinstance(job, GradientJob):
            begun = time.perf_counter()
            outcome = self._gradient(job)
            self._make_room(outcome)
            return Result(job=job, outcome=outcome, seconds=time.perf_counter() - begun)
        started, forward, parts = time.perf_counter(), 0.0, []
        failure: Failure | None = None
        at: int | None = None
        size = self._batch_size
        try:
            self._load(job.recipe)
            merged = time.perf_counter()
            for at in job.blocks:
                size = job.batch_sizes.get(at, self._batch_size)
                items = self._harness.items(job.split, at)
                parts.append(self._harness.evaluate(self._bench.model, items, batch_size=size))
                forward += self._harness.forward_seconds
        except Exception as error:
            if retries.transient(error) or isinstance(error, JudgeError):
                raise
            failure = failure_of(error, f"at batch size {size}" if at is not None else "while merging")
        if failure is not None:
            self._make_room(failure)
            return Result(job=job, outcome=failure, block=at)
        kept = job.split == "test" and self._guard is not None  # a run's, which may be exported later
        weights = self._bench.digest(job.recipe) if kept else None
        timing = Timing(
            total=time.perf_counter() - started,
            merge=merged - started,
            forward=forward,
            worker=self.name,
        )
        return Result(
            job=job,
            outcome=joined(parts),
            timing=timing,
            parts=tuple(parts),
            weights=weights,
            questions=self._questions(job),
        )

    def _questions(self, job: Job) -> dict[int, dict[str, list[Question]]]:
        if not job.questions:
            return {}
        return {block: self._harness.questions(job.split, block) for block in job.blocks}

    def _distributions(self, job: DistributionsJob) -> WrittenAnswers | Failure:
        try:
            self._load(job.recipe)
            return WrittenAnswers(rows=self._harness.distributions(self._bench.model, job.tasks))
        except Exception as error:
            if retries.transient(error):
                raise
            return failure_of(error, "while writing answers")

    def _gradient(self, job: GradientJob) -> Gradient | Failure:
        from evomerge.evaluation.gradient import differentiable

        try:
            if not self._harness.measured:
                self._load(self._base)
                with differentiable(self._bench.model):
                    self._harness.measure(self._bench.model)
                heap.give_back(self._bench.model)
            self._load(job.recipe)
            with differentiable(self._bench.model):
                model, size = self._bench.model, job.batch_size or self._batch_size
                loss, values = self._harness.backward(model, job.split, job.loss, batch_size=size)
                groups = self._bench.derivatives(job.recipe)
        except Exception as error:
            if retries.transient(error):
                raise
            return failure_of(error, "in a gradient")
        if not all(math.isfinite(value) for group in groups for values in group.values() for value in values):
            return Failure(kind="non_finite", reason="a gradient that is not finite")
        return Gradient(loss=loss, groups=tuple(groups), values=values)

    def _load(self, recipe: Recipe) -> None:
        self._harness.weights_changed()
        self._bench.load(recipe)

    def _make_room(self, outcome: object) -> None:
        """Free the memory of an attempt that ran out of it; call it after its exception was handled."""
        if _lacks_memory(outcome):
            out_of_memory.release(self._device)


def _lacks_memory(outcome: object) -> bool:
    return isinstance(outcome, Failure) and outcome.kind == "out_of_memory"


def _engine(spec: WorkerSpec) -> Engine:
    from evomerge.evaluation.vllm_engine import VllmEngine
    from evomerge.merging.sources.opening import open_source

    folder = open_source(spec.models[spec.base]).folder
    return VllmEngine(folder, dtype=spec.dtype, max_length=spec.max_length, device=spec.device)


def failure_of(error: Exception, where: str = "", *, attempts: int = 1) -> Failure:
    """Return the Failure of an exception, for the store and for messages.

    where: names the device where memory ran out; its own message holds amounts that differ every time.
    """
    if out_of_memory.is_out_of_memory(error):
        return Failure(kind="out_of_memory", reason=f"out of memory {where}".strip())
    reason = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    lines = reason.strip().splitlines() or [type(error).__name__]
    if attempts > 1:
        lines[0] = f"{lines[0]} (in {attempts} attempts)"
    kind: Literal["non_finite", "error"] = "non_finite" if isinstance(error, NonFiniteError) else "error"
    return Failure(kind=kind, reason=lines[0][:500])
