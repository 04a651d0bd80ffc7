"""Forward passes: device, dtype and settings of a run's forward passes, fixed when the run starts.

Scores of two candidates are comparable in every bit only where the same arithmetic made them. Device type,
dtype, attention, context length and batch size change their last bits, and on a CPU so does the number of
threads: torch's float32 matrix products differ between one thread and two, in some shapes of most sizes
tried (docs/devices.md; bfloat16 ones did not).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from evomerge.errors import StoreError
from evomerge.evaluation import vllm_engine
from evomerge.running.store import StoreReader, differences, facts
from evomerge.running.worker import WorkerSpec
from evomerge.version import __version__

_LIBRARIES = (
    *("torch", "transformers", "safetensors", "lm_eval", "datasets", "numpy", "scipy"),
    *("cma", "cmaes", "pymoo", "optuna"),
)
"""Libraries that can change the bits of a run."""
_CONTEXT = ("n_positions", "max_position_embeddings", "n_ctx")
"""Where configs say how many tokens a model reads, in the order in which lm-eval asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """How forward passes are computed.

    device: its type. attention: the implementation in use, also where transformers chose it. max_length: in
    tokens, None where neither run nor model says. threads: of each worker; None where they change nothing.
    generation: what continues prompts.
    """

    device: str
    dtype: str
    attention: str
    max_length: int | None
    batch_size: int
    threads: int | None
    generation: str = "transformers"

    @property
    def sentence(self) -> str:
        """One line for people.

        >>> Forward(
        ...     device="cpu", dtype="float32", attention="sdpa", max_length=64, batch_size=32, threads=1
        ... ).sentence
        'forward passes: cpu, float32, sdpa attention, up to 64 tokens, batches of 32, threads: 1'
        """
        parts = [self.device, self.dtype, f"{self.attention} attention"]
        parts += [f"up to {self.max_length} tokens"] if self.max_length else []
        parts += [f"batches of {self.batch_size}"]
        parts += [f"threads: {self.threads}"] if self.threads else []
        parts += [f"generation by {self.generation}"] if self.generation != "transformers" else []
        return f"forward passes: {', '.join(parts)}"


def find(worker: WorkerSpec) -> Forward:
    """Determine the forward settings of a worker from headers and configs alone; raise ModelError."""
    import torch

    from evomerge.merging.live.stacked_models import build
    from evomerge.merging.recipe import tokenizer_of
    from evomerge.merging.sources.opening import open_source

    tokenizer = tokenizer_of(worker.tokenizer, worker.base, worker.models)
    source = open_source(worker.models[tokenizer if tokenizer in worker.models else worker.base])
    with torch.device("meta"):  # a model without weights
        config = build(source, source.config, worker.dtype, worker.attention).config
    length_of_model = next((length for name in _CONTEXT if (length := getattr(config, name, None))), None)
    device = worker.device.partition(":")[0]
    return Forward(
        device=device,
        dtype=worker.dtype,
        attention=str(config._attn_implementation),
        max_length=worker.max_length or length_of_model,
        batch_size=worker.batch_size,
        threads=worker.threads if device == "cpu" else None,
        generation=worker.generation,
    )


def stored(store: StoreReader) -> Forward | None:
    """Return a run's forward settings; None for a run stored by a version without them."""
    data = facts.FORWARD.get(store)
    return None if data is None else Forward(**data)


def kept(folder: Path) -> Forward | None:
    """Return the forward settings of the run in a folder, None without one."""
    if not StoreReader.exists(folder):
        return None
    with (
        contextlib.suppress(StoreError),
        StoreReader.read(folder) as store,
    ):  # opening the run for work raises the same error with its reason
        return stored(store)
    return None


def check_same(store: StoreReader, passes: Forward) -> None:
    """Raise StoreError where the forward settings differ from those stored with the run."""
    before = stored(store)
    if before is None:
        return
    names = {"attention": "the attention implementation", "threads": "the number of threads of each worker"}
    for name, what in names.items():
        mine, theirs = getattr(passes, name), getattr(before, name)
        if mine != theirs:
            raise StoreError(
                f"{store.folder}: {what} changed since the run began, so scores would not be comparable",
                expected=str(theirs),
                got=str(mine),
                fix=f"set executor.{name}: {theirs}, or start a new run in another folder",
            )


def processor() -> str:
    """Return what this process computes on: the CPU with the instructions torch uses, and any GPUs."""
    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    processors = [f"{name} ({torch.backends.cpu.get_cpu_capability()})"]
    if torch.cuda.is_available():
        processors += sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    return ", ".join(processors)


def blas() -> str:
    """Return the BLAS libraries loaded here (numpy's, scipy's), with the kernels they chose.

    Another kernel rounds the sums of a matrix product in another order, so CMA-ES asks for other bits.
    """
    kernels = {
        f"{library['internal_api']} {library.get('architecture') or 'unknown'}"
        for library in threadpool_info()
        if library["user_api"] == "blas"
    }
    return ", ".join(sorted(kernels)) or "unknown"


def simd() -> str:
    """Return the instructions beyond its baseline that numpy uses: its exp and log differ between them."""
    extensions = np.show_config(mode="dicts").get("SIMD Extensions", {})
    return " ".join(extensions.get("found", ())) or "baseline"


def versions() -> dict[str, str]:
    """Return the versions of everything that can change the bits of a run."""
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    if (vllm := vllm_engine.version()) is not None:
        libraries["vllm"] = vllm
    software = {"evomerge": __version__, "python": platform.python_version(), **libraries}
    return software | {"processor": processor(), "blas": blas(), "simd": simd()}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return one line that names the changed libraries, processor and kernels; None without a change.

    >>> changes({"torch": "2.12", "numpy": "2.4"}, {"torch": "2.13", "numpy": "2.4", "processor": "new"})
    'torch 2.12 before, 2.13 now'
    """
    return "; ".join(differences(before, now)) or None


def warning(what: str) -> str:
    """Return the note about a run resumed in another environment."""
    return (
        f"this run was started in another environment ({what}): new scores may differ from stored ones in "
        "their last digits; a search that can't be replayed exactly stops with a message"
    )


def as_data(passes: Forward) -> dict[str, Any]:
    """Return it as a fact for the store and for JSON."""
    return asdict(passes)
