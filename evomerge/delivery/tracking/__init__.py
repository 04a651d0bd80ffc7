"""Tracking: a run's metrics in TensorBoard, Weights & Biases or MLflow, in addition to its own report.

After every generation its numbers are read from the store and sent to each tracker; nothing is read back. A
tracker that fails for any reason is dropped with one warning. A resumed run replays its old generations:
`tracking.json` in the run folder records the last generation sent to each tracker and the id of its run
there, so nothing is sent twice. The record is written before the numbers are sent, so a kill between the two
costs a tracker one generation.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from evomerge.config import TrackerSpec
from evomerge.delivery.summary import Summary
from evomerge.errors import UserError
from evomerge.running.observers import Observer
from evomerge.running.store import StoreReader, facts
from evomerge.text import HIDDEN, REFERENCE, redacted

STATE = "tracking.json"


class Tracker(Protocol):
    """An experiment tracker that receives the metrics of one run.

    The methods are called in this order: `config` once per run, `step` once per generation, `result` at the
    end of the search, `close` at the end of every session. Any of them may raise: the tracker is then
    dropped, and the run continues.
    """

    def config(self, values: Mapping[str, Any]) -> None:
        """Record the run's settings.

        Args:
            values: dotted name -> string, number, boolean or None.
        """
        ...

    def step(self, generation: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a generation.

        Args:
            generation: its number, from 0, ascending.
            values: name, as in `score/best` -> finite number.
        """
        ...

    def result(self, generation: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Record the result of the run.

        Args:
            generation: the number of the last generation.
            values: name, as in `test/mean` -> normalised score.
            texts: winner (a recipe hash), verdict, report (a path), as far as they exist.
        """
        ...

    def close(self, *, finished: bool) -> None:
        """Flush and close the connection.

        Args:
            finished: whether the run is over; else a later session continues it.
        """
        ...


OpenTracker = Callable[[TrackerSpec, Path, dict[str, Any]], Tracker]
"""Opens a tracker for a run folder. The dict is stored for the next session: run ids belong there."""


def require_packages(specs: Sequence[TrackerSpec]) -> None:
    """Check that every tracker can be opened without asking the user anything.

    Raises:
        UserError: the package of a tracker is not installed, its API key is missing, or an environment
            variable that its settings name is not set.
    """
    for spec in specs:
        if missing := [name for name in _references(spec) if name not in os.environ]:
            raise UserError(
                f"tracking: {spec.name} needs the environment variable {missing[0]}, which is not set",
                fix=f"export {missing[0]}=...",
            )
        if importlib.util.find_spec(spec.name) is None:
            raise UserError(
                f"tracking: the package of {spec.name!r} is not installed",
                fix=f"pip install 'evomerge[{spec.name}]', or remove it from `tracking`",
            )
        if spec.name == "wandb" and spec.mode == "online":
            from evomerge.delivery.tracking.wandb import has_key

            if not has_key():
                raise UserError(
                    "tracking: no API key for Weights & Biases on this machine",
                    fix="wandb login, or set WANDB_API_KEY, or mode: offline",
                )


def open_tracker(spec: TrackerSpec, folder: Path, state: dict[str, Any]) -> Tracker:
    """Open the tracker that a config names.

    Args:
        spec: its name and settings; references to environment variables get their values here.
        folder: the run folder.
        state: what earlier sessions stored for it, to be changed in place.
    """
    spec = _resolved(spec)
    if spec.name == "tensorboard":
        from evomerge.delivery.tracking.tensorboard import TensorBoard

        return TensorBoard(spec, folder, state)
    if spec.name == "wandb":
        from evomerge.delivery.tracking.wandb import WeightsAndBiases

        return WeightsAndBiases(spec, folder, state)
    from evomerge.delivery.tracking.mlflow import Mlflow

    return Mlflow(spec, folder, state)


def _references(spec: TrackerSpec) -> list[str]:
    """Return the names of the environment variables in a tracker's settings."""
    texts = (value for value in spec.model_dump().values() if isinstance(value, str))
    return [name for text in texts for name in REFERENCE.findall(text)]


def _resolved(spec: TrackerSpec) -> TrackerSpec:
    """Return settings with the values of the environment variables that they name."""
    changes = {
        name: REFERENCE.sub(lambda match: os.environ[match[1]], value)
        for name, value in spec.model_dump().items()
        if isinstance(value, str)
    }
    return spec.model_copy(update=changes)


def _without_secrets(message: str, spec: TrackerSpec) -> str:
    for secret in filter(None, map(os.environ.get, _references(spec))):
        message = message.replace(secret, HIDDEN)
    return redacted(message)


class Tracked(Observer):
    """An observer that sends a run's metrics to trackers; a context manager that closes them.

    Args:
        specs: the trackers.
        folder: the run folder.
        warn: shows one sentence to the user.
        open_: opens a tracker; None takes `open_tracker`.
    """

    def __init__(
        self,
        specs: Sequence[TrackerSpec],
        folder: Path,
        *,
        warn: Callable[[str], None],
        open_: OpenTracker | None = None,
    ) -> None:
        self._folder = folder
        self._specs: dict[str, TrackerSpec] = {spec.name: spec for spec in specs}
        self._warn, self._open = warn, open_ or open_tracker
        self._trackers: dict[str, Tracker] = {}
        self._states: dict[str, dict[str, Any]] | None = None
        self._finished = False

    def generation_done(self, generation: int, evaluations: float, best: float) -> None:
        """Send the metrics of a generation to every tracker that has not received them yet."""

        def send(name: str, state: dict[str, Any]) -> None:
            if generation <= state.get("generation", -1):
                return
            self._record(state, generation=generation)
            self._tracker(name).step(generation, self._metrics(generation, evaluations, best))

        self._for_each_tracker(send)

    def finish(self, summary: Summary, report: Path) -> None:
        """Send the result of a run that has stopped: the winner's score on `test`, the verdict, the report.

        Args:
            summary: of the run.
            report: path of its HTML page.
        """
        if not self._specs:
            return
        values, texts = _result(summary)
        texts["report"] = str(report)

        def send(name: str, state: dict[str, Any]) -> None:
            if state.get("result") != values:
                self._record(state, result=values)
                self._tracker(name).result(state.get("generation", 0), values, texts)

        self._for_each_tracker(send)
        self._finished = True

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, *_: object) -> None:
        self._for_each_tracker(lambda name, _: self._close(name))

    def _for_each_tracker(self, send: Callable[[str, dict[str, Any]], None]) -> None:
        """Call `send` with name and state of every tracker; drop those that fail."""
        for name in list(self._specs):
            try:
                send(name, self._state(name))
            except Exception as error:
                spec = self._specs.pop(name)
                self._trackers.pop(name, None)
                reason = _without_secrets(str(error).strip() or type(error).__name__, spec)
                self._warn(
                    f"tracking with {name} failed and is switched off, the run continues: "
                    f"{reason.splitlines()[0][:300]}"
                )

    def _tracker(self, name: str) -> Tracker:
        """Open a tracker when there is something to send, so that replaying a finished run opens none."""
        if name not in self._trackers:
            state = self._state(name)
            begun = bool(state.get("begun"))
            tracker = self._trackers[name] = self._open(self._specs[name], self._folder, state)
            self._record(state, begun=True)
            if not begun:
                with StoreReader.read(self._folder) as store:
                    tracker.config(flat(facts.CONFIG.require(store)))
        return self._trackers[name]

    def _close(self, name: str) -> None:
        if name in self._trackers:
            self._trackers.pop(name).close(finished=self._finished)

    def _metrics(self, generation: int, evaluations: float, best: float) -> dict[str, float]:
        with StoreReader.read(self._folder) as store:  # closed at once: the last to close a store cleans up
            return _metrics(store, generation, evaluations, best)

    def _state(self, name: str) -> dict[str, Any]:
        if self._states is None:
            path = self._folder / STATE
            self._states = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return self._states.setdefault(name, {})

    def _record(self, state: dict[str, Any], **changes: Any) -> None:
        """Change the state of a tracker and write all states to the run folder."""
        state |= changes
        draft = self._folder / f".{STATE}.new"
        draft.write_text(json.dumps(self._states, indent=2), encoding="utf-8")
        draft.replace(self._folder / STATE)


def _metrics(store: StoreReader, number: int, evaluations: float, best: float) -> dict[str, float]:
    """Return the metrics of a generation; those that are not finite are left out."""
    generation = store.generations()[number]
    failed = {recipe for recipe, split, _ in store.failures() if split == "search"}
    values = {
        "score/best": best,
        "cost/evaluations": evaluations,
        "cost/seconds": 3600 * store.hours(),
        "cost/failures": float(len(failed)),
    }
    scored = [row for row, recipe in enumerate(generation.recipes) if recipe not in failed]
    if generation.losses is not None and scored and generation.losses.shape[1] == 1:
        losses = generation.losses[scored, 0]
        values |= {"objective/best": -float(losses.min()), "objective/mean": -float(losses.mean())}
    guide, fronts = store.guide()[number:], store.fronts()[number:]
    if guide and guide[0].correlation is not None:
        values["surrogate/correlation"] = guide[0].correlation
    if fronts:
        values["front/hypervolume"] = fronts[0].hypervolume
    return {name: value for name, value in values.items() if np.isfinite(value)}


def _result(summary: Summary) -> tuple[dict[str, float], dict[str, str]]:
    """Return the metrics and the texts of a run that has stopped."""
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
        texts |= {"verdict": verdict.sentence, "level": verdict.level}
    return values, texts


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with dotted names, lists as JSON.

    >>> flat({"budget": {"hours": 2}, "tracking": ["wandb"], "seed": 0})
    {'budget.hours': 2, 'tracking': '["wandb"]', 'seed': 0}
    """
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{prefix}{name}.")
        else:
            settings[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return settings
