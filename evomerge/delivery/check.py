"""What `evomerge check` shows: everything that is known before a run starts."""

from __future__ import annotations

from typing import Any

from evomerge.compose import Prepared, Probe


def as_data(prepared: Prepared, probe: Probe) -> dict[str, Any]:
    """Return the findings as plain data (`check --json`)."""
    return {
        "models": prepared.config.locations,
        "parameters": prepared.parameters,
        "space": prepared.space.spec.name,
        "dimension": prepared.space.dimension,
        "optimizer": prepared.optimizer,
        "suite": prepared.suite.name,
        "items": probe.items,
        "seconds_per_candidate": probe.seconds,
        "workers": probe.workers,
        "estimated_minutes": None if probe.estimate is None else probe.estimate / 60,
        "out": str(prepared.folder),
        "notes": list(prepared.notes),
    }


def text(prepared: Prepared, probe: Probe) -> str:
    """Return the findings for people."""
    per_split = ", ".join(f"{probe.items[s]} items in {probe.seconds[s]:.2f} s on {s}" for s in probe.items)
    count, worker = len(prepared.config.models.sources), prepared.worker
    lines = [
        f"models: base and {count} sources of {prepared.parameters / 1e6:.1f} M parameters; "
        "architecture, shapes and vocabulary fit",
        f"space:  {prepared.space.describe()}",
        f"search: {prepared.optimizer}",
        f"suite:  {prepared.suite.name}; one candidate takes {per_split}",
        f"device: {worker.device}, forward passes in {worker.dtype}, {probe.workers} workers",
        f"out:    {prepared.folder}",
    ]
    if probe.estimate is None:
        lines.append("cost:   as long as the budget says")
    else:
        lines.append(f"cost:   about {probe.estimate / 60:.1f} minutes for the whole run")
    return "\n".join([*lines, *(f"note:   {note}" for note in prepared.notes), "ready to run"])
