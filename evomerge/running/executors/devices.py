"""Which device and how many threads each worker gets."""

from __future__ import annotations

import dataclasses
import os
import re

from evomerge.errors import ConfigError
from evomerge.running.worker import WorkerSpec

EVERY_GPU = "cuda"
"""The device of workers that are dealt out over all GPUs of the machine; `cuda:N` is one of them."""


def gpus() -> int:
    """Return how many GPUs torch can use here."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def placed(spec: WorkerSpec, seat: int) -> WorkerSpec:
    """Return a worker's own spec: the GPU of its seat, in turn, where all GPUs are used.

    seat: from 0; a worker's successor takes its seat, and so its GPU.
    """
    if spec.device != EVERY_GPU:
        return spec
    return dataclasses.replace(spec, device=f"cuda:{seat % max(1, gpus())}")


def automatic() -> str:
    """Return the device `auto` means here."""
    return EVERY_GPU if gpus() else "cpu"


def check_device(device: str) -> None:
    """Raise ConfigError for a device that torch does not know or does not have here."""
    import torch

    try:
        if not re.fullmatch(r"cpu(:0)?|mps|cuda(:\d{1,4})?", device):
            raise RuntimeError("no such device")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"executor.device: {device!r} can't be used here",
            expected="auto, cpu, cuda, cuda:N or mps, where torch has it",
            got=str(error).splitlines()[0],
        ) from None


def multiplies_bfloat16() -> bool:
    """Say whether this machine's processor has instructions for products of bfloat16 matrices."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(workers: int) -> int:
    """Return the threads of each of `workers`: OMP_NUM_THREADS if set, else the cores divided among them."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return int(limit) if limit.isdecimal() and int(limit) else max(1, cores() // workers)
