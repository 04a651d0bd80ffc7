"""Threads that merge one tensor each, as many as torch has."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor


def pool() -> ThreadPoolExecutor:
    """Return as many threads as torch has or would have, to merge one tensor on each."""
    return ThreadPoolExecutor(threads(), initializer=_one_thread_each)


def threads() -> int:
    """Return torch's number of threads; where it is not imported, OMP_NUM_THREADS or the cores given."""
    if "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()  # type: ignore[no-any-return]
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread_each() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
