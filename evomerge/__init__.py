"""evomerge: evolve the configuration of a model merge, honestly."""

import os

__version__ = "0.1.0"

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
