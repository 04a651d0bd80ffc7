"""How much memory a worker takes, and how many fit on this machine."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from evomerge.evaluation.smooth_loss import ACTIVATIONS

PROGRAM = 0.6e9
"""Bytes of a process beside its model: torch, transformers, lm-eval, items, and a batch's intermediate values
(a small model's; see `Size.worker`)."""

TOKENS = 512
"""Tokens of a request for which memory is planned; longer ones take more."""

ENGINE = 1.5e9
"""Bytes of vLLM beside the live model on a CPU, without its weights: its program, and its keys and values."""

SPARE = 0.9
"""The part of the free memory that workers may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What of a run's models matters to a machine. parameters: of each. dtype: of the merged model.
    files: bytes of all mapped files, which the workers of a machine share. cached: numbers that a model keeps
    per token while it reads (keys and values). batch: requests per forward pass. engine: whether vLLM stands
    beside the live model. gradients: whether workers differentiate, too."""

    parameters: int
    dtype: str
    files: int
    cached: int = 0
    batch: int = 1
    engine: bool = False
    gradients: bool = False

    def live(self, dtype: str) -> int:
        """Return the bytes of a live model with forward passes in a dtype."""
        return self.parameters * _bytes(dtype)

    def worker(self, dtype: str) -> int:
        """Return the bytes of a worker at its peak: the program, its live model, as much again, and a batch.

        Beside the weights stand a gradient of each or the statistics of trimmed task vectors, which are kept
        up to that size. Of a batch of `TOKENS` each, keys and values stand twice while they grow, and what
        they leave is reused in part (2.4 times their bytes seen); a gradient step has activations instead.
        """
        weights = self.live(dtype)
        batch = 2.5 * self.cached * self.batch * TOKENS * _bytes(dtype)
        activations = self.gradients * max(ACTIVATIONS, weights // 2)
        return int(PROGRAM + 2 * weights + max(batch, activations) + self.engine * (ENGINE + weights))

    def fitting(self, free: int | None, dtype: str) -> int | None:
        """Return how many workers fit into free bytes, at least one; None where they are not known.

        The files are not counted beyond half of the memory: what does not fit of them is read again.

        >>> models = ModelSizes(parameters=7_000_000_000, dtype="bfloat16", files=42_000_000_000)
        >>> models.fitting(256_000_000_000, "float32")
        3
        """
        if free is None:
            return None
        left = SPARE * max(free - self.files, free / 2)
        return max(1, int(left // self.worker(dtype)))


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def free() -> int | None:
    """Return the bytes that new processes can take, None where the system does not say it.

    What the kernel would give back counts as free; a limit of the control group (a container's) counts too.
    """
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):  # version 2; "max" is no number
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        rows = (line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        kept = {name: int(value) for name, value in rows}
        used = kept.get("anon", 0) + kept.get("shmem", 0) + kept.get("kernel", 0)
        found.append(max(0, limit - used))
    return min(found, default=None)
