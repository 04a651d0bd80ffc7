"""The run store: one SQLite file that holds everything a run ever learned."""

from evomerge.running.store import facts
from evomerge.running.store.queries import StoreReader, differences
from evomerge.running.store.schema import BASE, ID, Generation, StoredFront, Timing
from evomerge.running.store.store import RunStore

__all__ = [
    "BASE",
    "ID",
    "Generation",
    "RunStore",
    "StoreReader",
    "StoredFront",
    "Timing",
    "differences",
    "facts",
]
