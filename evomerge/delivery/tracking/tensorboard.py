"""TensorBoard: event files in the run folder; every session adds one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from evomerge.config import TrackerSpec


class TensorBoard:
    """Writes event files to RUN/tensorboard, or to the setting `folder` under the run's name."""

    def __init__(self, spec: TrackerSpec, folder: Path, state: dict[str, Any]) -> None:
        logs = folder / "tensorboard" if spec.folder is None else Path(spec.folder) / folder.name
        self._writer: Any = SummaryWriter(str(logs))

    def config(self, values: Mapping[str, Any]) -> None:
        """Write the settings as a text table."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        self._writer.add_text("config", f"| setting | value |\n|---|---|\n{rows}")
        self._writer.flush()

    def step(self, generation: int, values: Mapping[str, float]) -> None:
        """Write the metrics as scalars and flush them to the disk."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, generation)
        self._writer.flush()

    def result(self, generation: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Write the metrics as scalars at the last generation, and the texts."""
        self.step(generation, values)
        for name, text in texts.items():
            self._writer.add_text(name, text, generation)
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        """Close the file."""
        self._writer.close()
