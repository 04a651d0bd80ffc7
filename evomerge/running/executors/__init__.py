"""Executors: where jobs run. Submit them, take results as they complete; failures are values.

`inline` runs them in this process; `local` in worker processes that may crash or hang without taking the
run with them; `ray` in the same workers as actors of a Ray cluster. Building an executor builds its first
worker, so that a mistake in models or suite shows before anything is stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evomerge.running.executors import memory
from evomerge.running.executors.contract import Executor, Runs, Streaming, key_of
from evomerge.running.executors.devices import (
    automatic,
    check_device,
    cores,
    gpus,
    multiplies_bfloat16,
    threads_each,
)
from evomerge.running.executors.inline import Inline
from evomerge.running.executors.local import LocalProcesses
from evomerge.running.executors.memory import ModelSizes
from evomerge.running.worker import Result, WorkerSpec
from evomerge.schema import Strict

__all__ = [
    "Executor",
    "ExecutorSpec",
    "Inline",
    "LocalProcesses",
    "ModelSizes",
    "Result",
    "Runs",
    "Streaming",
    "at_once",
    "build",
    "fitted",
    "key_of",
    "resolve",
    "trial",
    "worker_count",
]


WORTH_PROCESSES = 50_000_000
"""Parameters from which a trial starts the run's worker processes."""

WORTH_BFLOAT16 = 10_000_000
"""Parameters from which a forward pass in bfloat16 is faster on processors that multiply in it."""


class ExecutorSpec(Strict):
    """The `executor` part of a run config."""

    name: Literal["local", "inline", "ray"] = "local"
    """Worker processes on this machine, the search's own process (for debugging), or actors of a Ray
    cluster."""
    workers: int | None = Field(default=None, ge=1, le=1024)
    """Number of workers. Default: one per GPU, else one per core, or as many as fit into memory; on Ray as
    many as fit into the cluster."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of each worker. Default: the cores divided among the workers, or OMP_NUM_THREADS; on Ray its
    CPUs."""
    timeout: float = Field(default=3600.0, gt=0, le=30 * 86_400)
    """Seconds a candidate may take for the items of one job."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N` or `mps`. `auto` is every GPU where there is one, else the CPU. More workers
    than GPUs share them in turn."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the forward pass. `auto` is bfloat16 on a GPU. On a CPU it is float32, or bfloat16 where the
    processor multiplies in it and the merged model has it and at least 10 million parameters."""
    batch_size: int = Field(default=64, ge=1, le=65_536)
    """Requests per forward pass."""
    max_length: int | None = Field(default=None, ge=8, le=2**24)
    """Context length in tokens. Default: the model's own."""
    attention: str | None = None
    """Attention implementation of transformers: `sdpa`, `eager`, `flash_attention_2` ... Default: its own
    choice."""
    low_memory: bool = False
    """Keep no statistics of trimmed task vectors: less memory, slower TIES, the same weights."""
    merge_on: Literal["auto", "cpu", "device"] = "auto"
    """Where candidates are merged: on the processor, or on the GPU of the live model, to the same weights.
    `auto` is the GPU where there is one and Triton is installed."""
    generation: Literal["transformers", "vllm"] = "transformers"
    """What generates text in `generate_until` tasks: the live model, or vLLM beside it."""
    address: str = "auto"
    """Ray only. `auto`: the cluster this machine belongs to; `local`: a new one on this machine; or
    HOST:PORT."""
    resources: dict[str, Annotated[float, Field(gt=0, le=2**60)]] = Field(default_factory=dict)
    """Ray only: what Ray reserves for each worker: `CPU`, `GPU`, `memory`, or your own resources."""

    @model_validator(mode="after")
    def _fitting(self) -> ExecutorSpec:
        if self.name != "ray" and (self.address != "auto" or self.resources):
            raise ValueError("address and resources are of `name: ray`")
        return self

    @property
    def needs(self) -> dict[str, float]:
        """What one worker takes of a Ray cluster: its threads as CPUs, and a GPU if that is its device."""
        on_gpu = self.device.startswith("cuda") or (self.device == "auto" and gpus() > 0)
        return {"CPU": float(self.threads or 1)} | ({"GPU": 1.0} if on_gpu else {}) | self.resources


def build(spec: ExecutorSpec, worker: WorkerSpec) -> Executor:
    """Build the executor a run config names."""
    if spec.name == "inline":
        return Inline(worker)
    if spec.name == "ray":
        from evomerge.running.executors.ray_actors import RayActors

        return RayActors(
            worker,
            address=spec.address,
            needs=spec.needs,
            workers=spec.workers,
            timeout=spec.timeout,
            anywhere=spec.device == "auto",
        )
    return LocalProcesses(worker, workers=worker_count(spec), timeout=spec.timeout)


@contextlib.contextmanager
def trial(spec: ExecutorSpec, worker: WorkerSpec, *, parameters: int = 0) -> Iterator[Executor]:
    """Provide an executor for a trial: a single worker, in this process or on the run's Ray cluster.

    parameters: of the models. Large ones are tried by the run's own workers together, which takes less time
    than starting them, and is how fast each is in the run.
    """
    if spec.name == "ray":
        executor = build(spec.model_copy(update={"workers": 1}), worker)
    else:
        executor = build(spec, worker) if parameters >= WORTH_PROCESSES else Inline(worker)
    try:
        yield executor
    finally:
        executor.close()


def worker_count(spec: ExecutorSpec) -> int:
    """Return the number of workers of a config: by default one per GPU it uses, else one per core.

    On Ray without a configured number: 1, because it depends on the cluster.
    """
    if spec.name == "inline":
        return 1
    if spec.workers is not None:
        return spec.workers
    if spec.name == "ray":
        return 1
    device = automatic() if spec.device == "auto" else spec.device
    if device == "cpu":
        return cores()
    return max(1, gpus()) if device == "cuda" else 1


def at_once(spec: ExecutorSpec) -> int:
    """Return how many workers compute at the same time: those of one machine's processor share its cores."""
    workers = worker_count(spec)
    if spec.name != "local":
        return workers
    device, _, threads = resolve(spec)
    return min(workers, max(1, cores() // threads)) if device == "cpu" else workers


def fitted(spec: ExecutorSpec, models: ModelSizes, dtype: str) -> ExecutorSpec:
    """Return a config's executor with fewer workers than cores, where no more fit into this machine's memory.

    A number of workers in the config stays as it is. dtype: of the forward pass.
    """
    if spec.name != "local" or spec.workers is not None or resolve(spec, models)[0] != "cpu":
        return spec
    most = models.fitting(memory.free(), dtype)
    if most is None or most >= cores():
        return spec
    return spec.model_copy(update={"workers": most})


def resolve(spec: ExecutorSpec, models: ModelSizes | None = None) -> tuple[str, str, int]:
    """Return (device, dtype of the forward pass, threads per worker) of a config on this machine.

    On Ray the device is one of its nodes': a worker that asks for a GPU computes on it. models: what the
    forward passes are of; None for what has none.
    """
    device = spec.device
    if spec.name == "ray":
        if device == "auto" or device.startswith("cuda"):  # Ray shows a worker only the GPUs it got
            device = "cuda" if "GPU" in spec.needs else "cpu"
        threads = spec.threads or max(1, int(spec.needs["CPU"]))
    else:
        device = automatic() if device == "auto" else device
        check_device(device)
        threads = spec.threads or threads_each(worker_count(spec))
    dtype = spec.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
        large = models is not None and models.dtype == "bfloat16" and models.parameters >= WORTH_BFLOAT16
        if large and spec.name != "ray" and multiplies_bfloat16():  # nodes of a cluster can be of any kind
            dtype = "bfloat16"
    return device, dtype, threads
