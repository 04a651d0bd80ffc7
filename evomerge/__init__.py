"""evomerge: evolve the configuration of a model merge, honestly."""

__version__ = "0.1.0"
