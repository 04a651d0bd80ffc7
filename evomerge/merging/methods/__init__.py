"""The merge methods, declared in one module per family; look them up with `get` and `names`.

Importing this package does not import torch (the functions do, when called), so that search spaces can
be checked against the declarations without it.
"""

from evomerge.merging.methods import (  # noqa: F401  (importing registers them)
    averaging,
    core_space,
    fisher,
    regression,
    reinforced,
    selective,
    sparse,
    spectral,
    spherical,
    task_vectors,
)
from evomerge.merging.methods.declaration import Method, Parameter, get, names

__all__ = ["Method", "Parameter", "get", "names"]
