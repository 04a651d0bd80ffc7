"""Tracking: a run's metrics in TensorBoard, Weights & Biases or MLflow, beside its own report.

After every generation the numbers are read from the store and sent to each tracker; nothing comes back. A
tracker that fails for any reason is dropped with one warning. A resumed run replays its old generations:
`tracking.json` in the run folder records the last generation that each tracker received, and the id of its
run there, so nothing is sent twice. The record is written before the numbers are sent, so a kill between the
two costs a tracker one generation.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from evomerge.config import TrackerSpec
from evomerge.delivery.summary import Summary
from evomerge.errors import UserError
from evomerge.running.observers import Observer
from evomerge.running.store import StoreReader, facts

STATE = "tracking.json"


class Tracker(Protocol):
    """One tracking service, open for one run."""

    def config(self, values: Mapping[str, Any]) -> None:
        """Send the run's settings, flat."""
        ...

    def step(self, generation: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a generation."""
        ...

    def result(self, generation: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Send the result of the run, after its last generation."""
        ...

    def close(self, *, finished: bool) -> None:
        """Let go of the service; `finished` says whether the run is over."""
        ...


Open = Callable[[TrackerSpec, Path, dict[str, Any]], Tracker]
"""Opens a tracker for a run folder. The dict is kept for the next session: ids go there."""


def require_packages(specs: Sequence[TrackerSpec]) -> None:
    """Raise UserError where a tracker's package is not installed, or would stop to ask for a key."""
    for spec in specs:
        if importlib.util.find_spec(spec.name) is None:
            raise UserError(
                f"tracking: the package of {spec.name!r} is not installed",
                fix=f"pip install 'evomerge[{spec.name}]', or leave it out of `tracking`",
            )
        if spec.name == "wandb" and spec.mode == "online":
            from evomerge.delivery.tracking.wandb import has_key

            if not has_key():
                raise UserError(
                    "tracking: Weights & Biases has no API key here",
                    fix="wandb login, or set WANDB_API_KEY, or mode: offline",
                )


def opened(spec: TrackerSpec, folder: Path, state: dict[str, Any]) -> Tracker:
    """Open the tracker that a config names."""
    if spec.name == "tensorboard":
        from evomerge.delivery.tracking.tensorboard import TensorBoard

        return TensorBoard(spec, folder, state)
    if spec.name == "wandb":
        from evomerge.delivery.tracking.wandb import WeightsAndBiases

        return WeightsAndBiases(spec, folder, state)
    from evomerge.delivery.tracking.mlflow import Mlflow

    return Mlflow(spec, folder, state)


class Tracked(Observer):
    """An observer that sends a run's numbers to trackers; a context manager that closes them.

    warn: shows one sentence to the user.
    """

    def __init__(
        self,
        specs: Sequence[TrackerSpec],
        folder: Path,
        *,
        warn: Callable[[str], None],
        open_: Open | None = None,
    ) -> None:
        self._folder = folder
        self._specs: dict[str, TrackerSpec] = {spec.name: spec for spec in specs}
        self._warn, self._open = warn, open_ or opened
        self._trackers: dict[str, Tracker] = {}
        self._states: dict[str, dict[str, Any]] | None = None
        self._finished = False

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """Send the numbers of a generation to every tracker that has not received them yet."""

        def tell(name: str, state: dict[str, Any]) -> None:
            if generation <= state.get("generation", -1):
                return
            self._mark(state, generation=generation)
            self._tracker(name).step(generation, self._numbers(generation, evaluations, best))

        self._each(tell)

    def finish(self, summary: Summary, report: Path) -> None:
        """Send the result: the winner's score on `test` with its interval, the verdict, the report."""
        if not self._specs:
            return
        values, texts = _ending(summary)
        texts["report"] = str(report)

        def tell(name: str, state: dict[str, Any]) -> None:
            if state.get("result") != values:
                self._mark(state, result=values)
                self._tracker(name).result(state.get("generation", 0), values, texts)

        self._each(tell)
        self._finished = True

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, *_: object) -> None:
        self._each(lambda name, _: self._close(name))

    def _each(self, tell: Callable[[str, dict[str, Any]], None]) -> None:
        for name in list(self._specs):
            try:
                tell(name, self._state(name))
            except Exception as error:
                del self._specs[name]
                self._trackers.pop(name, None)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
                self._warn(f"tracking with {name} failed and is left off, the run goes on: {reason}")

    def _tracker(self, name: str) -> Tracker:
        """Open a tracker when there is something to send: replaying a finished run leaves no trace."""
        if name not in self._trackers:
            state = self._state(name)
            begun = bool(state.get("begun"))
            tracker = self._trackers[name] = self._open(self._specs[name], self._folder, state)
            self._mark(state, begun=True)
            if not begun:
                with StoreReader.read(self._folder) as store:
                    tracker.config(flat(facts.CONFIG.require(store)))
        return self._trackers[name]

    def _close(self, name: str) -> None:
        if name in self._trackers:
            self._trackers.pop(name).close(finished=self._finished)

    def _numbers(self, generation: int, evaluations: float, best: float) -> dict[str, float]:
        with StoreReader.read(self._folder) as store:  # held no longer: who closes last tidies up
            return _numbers(store, generation, evaluations, best)

    def _state(self, name: str) -> dict[str, Any]:
        if self._states is None:
            path = self._folder / STATE
            self._states = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return self._states.setdefault(name, {})

    def _mark(self, state: dict[str, Any], **changes: Any) -> None:
        state |= changes
        draft = self._folder / f".{STATE}.new"
        draft.write_text(json.dumps(self._states, indent=2), encoding="utf-8")
        draft.replace(self._folder / STATE)


def _numbers(store: StoreReader, generation: int, evaluations: float, best: float) -> dict[str, float]:
    """Return the numbers of a generation."""
    own = store.generations()[generation]
    failed = {recipe for recipe, split, _ in store.failures() if split == "search"}
    values = {
        "score/best": best,
        "cost/evaluations": evaluations,
        "cost/seconds": 3600 * store.hours(),
        "cost/failures": float(len(failed)),
    }
    kept = [row for row, recipe in enumerate(own.recipes) if recipe not in failed]
    if own.losses is not None and kept and own.losses.shape[1] == 1:
        losses = own.losses[kept, 0]
        values |= {"objective/best": -float(losses.min()), "objective/mean": -float(losses.mean())}
    guide, fronts = store.guide()[generation:], store.fronts()[generation:]
    if guide and guide[0].correlation is not None:
        values["surrogate/correlation"] = guide[0].correlation
    if fronts:
        values["front/hypervolume"] = fronts[0].hypervolume
    return {name: value for name, value in values.items() if np.isfinite(value)}


def _ending(summary: Summary) -> tuple[dict[str, float], dict[str, str]]:
    """Return numbers and texts of the end of a run."""
    rows = summary.rows()
    winner = next((row for row in rows if row.role == "winner"), None)
    verdict = summary.verdict(rows)
    values: dict[str, float] = {}
    texts: dict[str, str] = {}
    if winner is not None:
        mean = winner.mean
        values |= {"test/mean": mean.estimate, "test/low": mean.low, "test/high": mean.high}
        texts["winner"] = winner.recipe
    if verdict is not None:
        test = verdict.test
        values |= {"test/gain": test.estimate, "test/gain_low": test.low, "test/gain_high": test.high}
        texts["verdict"] = verdict.sentence
    return values, texts


def flat(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Return nested settings with dotted names, lists as JSON.

    >>> flat({"budget": {"hours": 2}, "tracking": ["wandb"], "seed": 0})
    {'budget.hours': 2, 'tracking': '["wandb"]', 'seed': 0}
    """
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{place}{name}.")
        else:
            flattened[f"{place}{name}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flattened
