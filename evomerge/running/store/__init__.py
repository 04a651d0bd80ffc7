"""The run store: one SQLite file that holds everything a run ever learned."""

from evomerge.running.store.store import BASE, ID, Generation, RunStore, StoredFront, Timing

__all__ = ["BASE", "ID", "Generation", "RunStore", "StoredFront", "Timing"]
