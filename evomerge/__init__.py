"""evomerge: evolve the configuration of a model merge, honestly.

    import evomerge

    run = evomerge.optimize("run.yaml", hours=8)
    print(run.report())
    run.export("merged")

The functions are those of the commands of the same names; what they return prints what the commands print.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from evomerge.version import __version__

if TYPE_CHECKING:
    from evomerge.api.models import analyze, evaluate, merge, predict
    from evomerge.api.runs import Run, compare, load
    from evomerge.api.search import check, optimize, resume
    from evomerge.api.setup import convert, doctor, init
    from evomerge.errors import UserError
    from evomerge.evaluation.permissions import Permissions

__all__ = [
    "Permissions",
    "Run",
    "UserError",
    "__version__",
    "analyze",
    "check",
    "compare",
    "convert",
    "doctor",
    "evaluate",
    "init",
    "load",
    "merge",
    "optimize",
    "predict",
    "resume",
]

_PLACES = {
    **dict.fromkeys(("analyze", "evaluate", "merge", "predict"), "evomerge.api.models"),
    **dict.fromkeys(("Run", "compare", "load"), "evomerge.api.runs"),
    **dict.fromkeys(("check", "optimize", "resume"), "evomerge.api.search"),
    **dict.fromkeys(("convert", "doctor", "init"), "evomerge.api.setup"),
    "Permissions": "evomerge.evaluation.permissions",
    "UserError": "evomerge.errors",
}
"""Where each name is defined; it is imported when it is used, because torch and lm-eval take seconds."""

_SILENT = {
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # `datasets` and `evaluate` count loads of local files too
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Settings of libraries, so that the network is asked only for models and data that the user names."""

for _name, _value in _SILENT.items():
    os.environ.setdefault(_name, _value)  # before any of them is imported


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'evomerge' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
