"""A pool of threads, each of which merges one tensor at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")
WORTH_THREADS = 1_000_000
"""Number of parameters from which several threads merge faster than one."""


def pool() -> ThreadPoolExecutor:
    """Return a pool with as many threads as torch uses, each single-threaded itself."""
    return ThreadPoolExecutor(threads(), initializer=_one_thread_each)


def threads() -> int:
    """Return torch's number of threads; before torch is imported, OMP_NUM_THREADS or the usable cores."""
    if "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()  # type: ignore[no-any-return]
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(work: Callable[[Item], Made], items: Sequence[Item], *, total: int) -> list[Made]:
    """Return the results of some work on each item, in order; total: the number of parameters in all."""
    if threads() == 1 or total < WORTH_THREADS:
        return [work(item) for item in items]
    with pool() as workers:
        return list(workers.map(work, items))


def _one_thread_each() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
