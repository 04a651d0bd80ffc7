"""The merge methods: one declaration each, in the family's module; `get` and `names` find them.

Importing this package does not import torch (the functions do, when called), so that search spaces can
be checked against the declarations without it.
"""

from evomerge.merging.methods import (  # noqa: F401  (importing registers them)
    averaging,
    fisher,
    selective,
    sparse,
    spherical,
    task_vectors,
)
from evomerge.merging.methods.declaration import Method, Parameter, get, names

__all__ = ["Method", "Parameter", "get", "names"]
