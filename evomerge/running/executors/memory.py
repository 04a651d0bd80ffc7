"""How much memory a worker takes, and how many fit on this machine."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

PROGRAM = 0.6e9
"""Bytes of a process beside its model: torch, transformers, lm-eval, items, and a batch's intermediate values
(a small model's; see `Size.worker`)."""

ENGINE = 1.5e9
"""Bytes of vLLM beside the live model on a CPU, without its weights: its program, and its keys and values."""

SPARE = 0.9
"""The part of the free memory that workers may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of a run's models. parameters: of each. forward: bytes that one takes in the forward pass.
    files: bytes of all mapped files, which the workers of a machine share. engine: whether vLLM stands beside
    the live model."""

    parameters: int
    forward: int
    files: int
    engine: bool = False

    @property
    def worker(self) -> int:
        """Bytes of a worker: its live model, as much again for what is computed with it, and the program.

        Beside the weights stand a gradient of each, or keys, values and intermediate values of a batch, or
        the statistics of trimmed task vectors; never all of them at once (docs/performance.md).
        """
        weights = self.parameters * self.forward
        return int(PROGRAM + 2 * weights + self.engine * (ENGINE + weights))

    def fitting(self, free: int | None) -> int | None:
        """Return how many workers fit into free bytes, at least one; None where they are not known.

        The files are not counted beyond half of the memory: what does not fit of them is read again.

        >>> Size(parameters=7_000_000_000, forward=4, files=42_000_000_000).fitting(256_000_000_000)
        3
        """
        if free is None:
            return None
        left = SPARE * max(free - self.files, free / 2)
        return max(1, int(left // self.worker))


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
