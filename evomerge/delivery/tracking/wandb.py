"""Weights & Biases: one run of a project; offline it is a folder that `wandb sync` uploads."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from evomerge.config import TrackerSpec

_TIMEOUT = 30.0
"""Seconds to wait for the service when a run starts."""


def has_key() -> bool:
    """Return whether W&B has an API key; without one it would ask for it in the middle of a run."""
    try:
        return bool(wandb.login(prompt=False))
    except wandb.errors.Error:  # there is a key that could not be verified now, which must not stop a run
        return True


class WeightsAndBiases:
    """Logs to a W&B run; its id is stored, so that a resumed run continues it.

    Offline every session writes its own folder under RUN/wandb with the same id; `wandb sync` joins them.
    """

    def __init__(self, spec: TrackerSpec, folder: Path, state: dict[str, Any]) -> None:
        resumed = "id" in state
        state.setdefault("id", secrets.token_hex(4))
        self._run = wandb.init(
            project=spec.project,
            name=folder.name,
            id=state["id"],
            resume="allow" if resumed and spec.mode == "online" else None,
            dir=str(folder),
            mode=spec.mode,
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,
                init_timeout=_TIMEOUT,
                login_timeout=_TIMEOUT,
                x_disable_stats=True,
            ),
        )

    def config(self, values: Mapping[str, Any]) -> None:
        """Set the config of the W&B run."""
        self._run.config.update(dict(values), allow_val_change=True)

    def step(self, generation: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a generation as one step."""
        self._run.log(dict(values), step=generation)

    def result(self, generation: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Set the summary of the W&B run."""
        self._run.summary.update({**values, **texts})

    def close(self, *, finished: bool) -> None:
        """Finish the W&B run and stop the process that wandb started for it."""
        self._run.finish(exit_code=0 if finished else 1)
        wandb.teardown()
