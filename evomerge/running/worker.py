"""The worker: one live model, one harness; a recipe comes in, its scores go out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evomerge.errors import NonFiniteError, UserError
from evomerge.evaluation.scores import Failure, Scores, Split, joined
from evomerge.evaluation.smooth_loss import Gradient, SmoothLoss
from evomerge.evaluation.suite import Suite
from evomerge.merging.recipe import Recipe
from evomerge.running.store import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One thing to do: score a recipe on some item blocks of a split."""

    recipe: Recipe
    split: Split
    blocks: tuple[int, ...] = (0,)

    def part(self, blocks: Sequence[int]) -> Job:
        """Return the job on some of its blocks."""
        return replace(self, blocks=tuple(blocks))


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientJob:
    """Another thing to do: differentiate a loss on items of a split by a recipe's parameters."""

    recipe: Recipe
    loss: SmoothLoss
    split: Split = "search"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a job; `timing` is None where there are no scores.

    outcome: the scores of all its blocks together. parts: of each block, where there are several.
    """

    job: Job | GradientJob
    outcome: Scores | Gradient | Failure
    timing: Timing | None = None
    parts: tuple[Scores, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """Everything a worker needs to know, picklable.

    models, base, tokenizer: as in a Recipe. dtype: the type of the forward pass ("float32", "bfloat16");
    weights are rounded to the recipe's own dtype before. batch_size: requests per forward pass, part of a
    run's identity because it changes the last bits of scores. max_length: in tokens; None takes the
    model's. threads: of each worker. blocks, block_seed: as in Harness.
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
    tokenizer: str = ""
    blocks: int = 1
    block_seed: int = 0

    def blocks_of(self, split: Split) -> tuple[int, ...]:
        """Return the item blocks of a split."""
        return tuple(range(self.blocks if split == "search" else 1))


class Worker:
    """Scores recipes one after the other. Building one loads the models and prepares all items.

    Raises UserError where models or suite can't be used.
    """

    def __init__(self, spec: WorkerSpec, name: str = "0") -> None:
        import torch

        from evomerge.evaluation.harness import Harness
        from evomerge.merging.workbench import Workbench

        torch.set_num_threads(spec.threads)
        self.name = name
        self._bench = Workbench(
            spec.models,
            spec.base,
            tokenizer=spec.tokenizer,
            device=spec.device,
            compute_dtype=spec.dtype,
            attn_implementation=spec.attention,
            low_memory=spec.low_memory,
        )
        self._harness = Harness(
            spec.suite,
            tokenizer=self._bench.tokenizer,
            batch_size=spec.batch_size,
            max_length=spec.max_length,
            blocks=spec.blocks,
            block_seed=spec.block_seed,
        )
        self._harness.prepare(self._bench.model)

    def run(self, job: Job | GradientJob) -> Result:
        """Score or differentiate one recipe; whatever goes wrong with it is a Failure, never an exception."""
        if isinstance(job, GradientJob):
            return Result(job=job, outcome=self._gradient(job))
        started, forward, parts = time.perf_counter(), 0.0, []
        try:
            self._bench.load(job.recipe)
            merged = time.perf_counter()
            for block in job.blocks:
                parts.append(self._harness.evaluate(self._bench.model, self._harness.items(job.split, block)))
                forward += self._harness.forward_seconds
        except Exception as error:
            return Result(job=job, outcome=failure_of(error))
        timing = Timing(
            total=time.perf_counter() - started,
            merge=merged - started,
            forward=forward,
            worker=self.name,
        )
        return Result(job=job, outcome=joined(parts), timing=timing, parts=tuple(parts))

    def _gradient(self, job: GradientJob) -> Gradient | Failure:
        from evomerge.evaluation.gradient import differentiable

        try:
            self._bench.load(job.recipe)
            with differentiable(self._bench.model):
                loss = self._harness.backward(self._bench.model, job.split, job.loss)
                groups = self._bench.derivatives(job.recipe)
        except Exception as error:
            return failure_of(error)
        if not all(math.isfinite(value) for group in groups for values in group.values() for value in values):
            return Failure(kind="non_finite", reason="a gradient that is not finite")
        return Gradient(loss=loss, groups=tuple(groups))


def failure_of(error: Exception) -> Failure:
    """Return the Failure that stands for an exception in the store and in messages."""
    reason = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failure(kind="out_of_memory", reason="out of memory")
    lines = reason.strip().splitlines() or [type(error).__name__]
    kind: Literal["non_finite", "error"] = "non_finite" if isinstance(error, NonFiniteError) else "error"
    return Failure(kind=kind, reason=lines[0][:500])
