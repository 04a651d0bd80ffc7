"""mergekit's YAML, read into recipes and written from them."""

from evomerge.merging.mergekit.reader import read
from evomerge.merging.mergekit.writer import write

__all__ = ["read", "write"]
