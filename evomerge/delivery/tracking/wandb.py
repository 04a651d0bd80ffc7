"""Weights & Biases: one run of a project; offline it is a folder that `wandb sync` uploads."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from evomerge.config import TrackerSpec

_PATIENCE = 30.0
"""Seconds to wait for the service at the start."""


def has_key() -> bool:
    """Say whether W&B knows who logs; without, it would ask on the terminal, in the middle of a run."""
    try:
        return bool(wandb.login(prompt=False))
    except wandb.errors.Error:  # there is one, which could not be verified now: no reason not to run
        return True


class WeightsAndBiases:
    """Logs to a run whose id is kept, so that a resumed run goes on in it.

    Offline every session has a folder of its own under RUN/wandb, with the same id: `wandb sync` joins them.
    """

    def __init__(self, spec: TrackerSpec, folder: Path, state: dict[str, Any]) -> None:
        again = "id" in state
        state.setdefault("id", secrets.token_hex(4))
        self._run = wandb.init(
            project=spec.project,
            name=folder.name,
            id=state["id"],
            resume="allow" if again and spec.mode == "online" else None,
            dir=str(folder),
            mode=spec.mode,
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,
                init_timeout=_PATIENCE,
                login_timeout=_PATIENCE,
                x_disable_stats=True,
            ),
        )

    def config(self, values: Mapping[str, Any]) -> None:
        """Set the run's config."""
        self._run.config.update(dict(values), allow_val_change=True)

    def step(self, generation: int, values: Mapping[str, float]) -> None:
        """Log one step."""
        self._run.log(dict(values), step=generation)

    def result(self, generation: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Set the run's summary."""
        self._run.summary.update({**values, **texts})

    def close(self, *, finished: bool) -> None:
        """Finish the run, and end the process that wandb started for it."""
        self._run.finish(exit_code=0 if finished else 1)
        wandb.teardown()
