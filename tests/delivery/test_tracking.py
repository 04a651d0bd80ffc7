"""Trackers: they get every metric once and can't stop a run; the three services for real, offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.config import RunConfig, TrackerSpec
from evomerge.delivery.summary import Summary
from evomerge.delivery.tracking import STATE, Tracked, flat, open_tracker, require_packages
from evomerge.errors import ConfigError
from evomerge.running.store import RunStore, facts
from evomerge.search.ports import GuideState
from evomerge.stored import StoredRun
from tests.running.fakes import recipe
from tests.test_cli import invoke, refuse

TENSORBOARD = TrackerSpec(name="tensorboard")


class Notebook:
    """A tracker that records its calls; `fail` names a method that raises."""

    def __init__(self, fail: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fail, self.opened = fail, 0

    def open(self, spec: TrackerSpec, folder: Path, state: dict[str, Any]) -> Notebook:
        self.opened += 1
        self._call("open", spec.name)
        return self

    def _call(self, method: str, arguments: Any) -> None:
        if method == self.fail:
            raise ConnectionError("the network is down\nand more")
        self.calls.append((method, arguments))

    def config(self, values: Mapping[str, Any]) -> None:
        self._call("config", dict(values))

    def step(self, generation: int, values: Mapping[str, float]) -> None:
        self._call("step", (generation, dict(values)))

    def result(self, generation: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        self._call("result", (generation, dict(values), dict(texts)))

    def close(self, *, finished: bool) -> None:
        self._call("close", finished)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run of three generations, a copy of its own."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def session(
    run: Path,
    notebook: Notebook,
    generations: int = 3,
    *,
    finish: bool = True,
    specs: tuple[TrackerSpec, ...] = (TENSORBOARD,),
    open_: Any = None,
) -> list[str]:
    """Replay a stored run to a tracker as a session does; return the warnings."""
    warnings: list[str] = []
    tracked = Tracked(specs, run, warn=warnings.append, open_=open_ or notebook.open)
    with tracked, RunStore.read(run) as store:
        for generation in range(generations):
            tracked.generation_done(generation, 4.0 * generation, 0.25 + generation)
        if finish:
            tracked.finish(Summary(StoredRun(store)), run / "report.html")
    return warnings


def test_calls_and_metrics_of_a_run(run: Path) -> None:
    notebook = Notebook()
    assert session(run, notebook) == []
    kinds = [what for what, _ in notebook.calls]
    assert kinds == ["open", "config", "step", "step", "step", "result", "close"]
    settings = notebook.calls[1][1]
    assert settings["optimizer.name"] == "cma_es"
    assert settings["budget.generations"] == 3
    generation, values = notebook.calls[4][1]
    assert (generation, values["score/best"], values["cost/evaluations"]) == (2, 2.25, 8.0)
    with RunStore.read(run) as store:
        losses = store.generations()[2].losses
        guide = store.guide()[2]
        winner = store.entries("winner")[0].recipe.hash
        summary = Summary(StoredRun(store))
        row = next(row for row in summary.rows() if row.role == "winner")
    assert losses is not None
    assert values["objective/best"] == -losses.min()
    assert values["objective/mean"] == pytest.approx(-losses.mean())
    assert values["objective/best"] >= values["objective/mean"]
    assert values["cost/seconds"] > 0
    assert values.get("surrogate/correlation") == guide.correlation
    generation, values, texts = notebook.calls[5][1]
    assert generation == 2
    assert (values["test/mean"], values["test/low"]) == (row.mean.estimate, row.mean.low)
    assert "test/gain_low" in values
    assert texts["winner"] == winner
    assert texts["report"] == str(run / "report.html")
    assert notebook.calls[-1] == ("close", True)


def test_nothing_is_sent_twice_and_a_replayed_run_opens_no_tracker(run: Path) -> None:
    first, second, third = Notebook(), Notebook(), Notebook()
    session(run, first, 2, finish=False)
    assert first.calls[-1] == ("close", False)
    session(run, second)
    assert [what for what, _ in second.calls] == ["open", "step", "result", "close"]
    assert second.calls[1][1][0] == 2
    session(run, third)
    assert third.opened == 0
    assert json.loads((run / STATE).read_text())["tensorboard"]["generation"] == 2
    assert not list(run.glob(f".{STATE}*"))


@pytest.mark.parametrize("method", ["open", "config", "step", "result", "close"])
def test_a_tracker_that_fails_is_one_warning(method: str, run: Path) -> None:
    notebook = Notebook(fail=method)
    (warning,) = session(run, notebook)
    assert warning == (
        "tracking with tensorboard failed and is switched off, the run continues: the network is down"
    )


def test_a_failing_tracker_does_not_affect_another(run: Path) -> None:
    good, bad = Notebook(), Notebook(fail="step")
    specs = (TENSORBOARD, TrackerSpec(name="mlflow"))

    def open_(spec: TrackerSpec, folder: Path, state: dict[str, Any]) -> Notebook:
        return {"tensorboard": bad, "mlflow": good}[spec.name].open(spec, folder, state)

    assert len(session(run, good, specs=specs, open_=open_)) == 1
    assert [what for what, _ in good.calls].count("step") == 3


def test_a_config_names_trackers_shortly_or_in_full(config: Callable[..., Path]) -> None:
    plain = RunConfig.load(config())
    tracked = RunConfig.load(
        config(tracking=["tensorboard", {"name": "wandb", "mode": "offline", "project": "p"}])
    )
    assert [spec.name for spec in tracked.tracking] == ["tensorboard", "wandb"]
    assert tracked.tracking[1].mode == "offline"
    assert tracked.identity() == plain.identity()
    for wrong, said in (
        (["tensorbord"], "tracking.0.name"),
        ([{"name": "mlflow", "mode": "offline"}], "mode is a setting of wandb, not of mlflow"),
        (["mlflow", {"name": "mlflow"}], "each tracker once"),
    ):
        with pytest.raises(ConfigError, match=said):
            RunConfig.load(config(tracking=wrong))


def test_a_missing_package_is_a_message_before_the_run(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(tracking=["wandb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refuse("run", path, folder=tmp_path)
    assert "the package of 'wandb' is not installed" in said
    assert "pip install 'evomerge[wandb]'" in said


@pytest.mark.filterwarnings("ignore")
def test_wandb_never_asks_for_a_key_in_the_middle_of_a_run(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.delivery.tracking.wandb.has_key", lambda: False)
    for command in ("check", "run"):
        said = refuse(command, config(tracking=["wandb"]), folder=tmp_path)
        assert "no API key for Weights & Biases on this machine" in said
        assert "mode: offline" in said
    require_packages([TrackerSpec(name="wandb", mode="offline")])


def test_the_hypervolume_and_the_correlation_of_a_generation_are_sent(tmp_path: Path) -> None:
    recipes = [recipe(1), recipe(2)]
    with RunStore.create(
        tmp_path, {facts.CONFIG: {"models": {"base": "base", "sources": {"a": "a"}}}}
    ) as store:
        store.begin_session({})
        for generation in range(2):
            store.record_ask(generation, np.full((2, 1), 0.5 * generation), recipes)
            store.record_tell(generation, np.array([[-1.0, -2.0], [-3.0, 0.5]]), 0.1)
            store.record_front(generation, 0.25 + generation, np.ones(2), recipes[:1])
            state = GuideState(correlation=0.5 * generation or None, proposed=1, blocks=2, radius=0.1)
            store.record_guide(generation, state)
        notebook, warnings = Notebook(), list[str]()
        with Tracked([TENSORBOARD], tmp_path, warn=warnings.append, open_=notebook.open) as tracked:
            for generation in range(2):
                tracked.generation_done(generation, 1.0, -np.inf)
    steps = [of[1] for what, of in notebook.calls if what == "step"]
    assert warnings == []
    assert [values["front/hypervolume"] for values in steps] == [0.25, 1.25]
    assert [values.get("surrogate/correlation") for values in steps] == [None, 0.5]
    assert not any(name.startswith("objective") or name == "score/best" for name in steps[0])


@pytest.mark.filterwarnings("ignore")  # the services' own
def test_tensorboard_files_hold_the_run(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert session(run, Notebook(), 2, finish=False, open_=open_tracker) == []
    assert session(run, Notebook(), open_=open_tracker) == []
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("score/best")] == [0, 1, 2]
    assert [event.value for event in events.Scalars("score/best")] == [0.25, 1.25, 2.25]
    assert len(events.Scalars("test/mean")) == 1
    assert {"config/text_summary", "winner/text_summary"} <= set(events.Tags()["tensors"])


@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", ["", "file"])
def test_mlflow_keeps_one_run_over_sessions(
    store: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns-file").as_uri() if store else None
    spec = TrackerSpec(name="mlflow", uri=uri) if uri else TrackerSpec(name="mlflow")
    before = {p.name for p in tmp_path.iterdir()}
    assert session(run, Notebook(), 2, finish=False, open_=open_tracker, specs=(spec,)) == []
    assert session(run, Notebook(), open_=open_tracker, specs=(spec,)) == []
    client = MlflowClient(tracking_uri=uri or f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("evomerge")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == "run"
    assert logged.data.params["optimizer.name"] == "cma_es"
    history = client.get_metric_history(logged.info.run_id, "score/best")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.25), (1, 1.25), (2, 2.25)]
    assert "test/mean" in logged.data.metrics
    assert len(logged.data.tags["winner"]) == 64
    assert {p.name for p in tmp_path.iterdir()} - before <= {"mlruns-file"}


def test_a_server_that_is_not_there_is_a_warning(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    spec = TrackerSpec(name="mlflow", uri="http://127.0.0.1:9")
    (warning,) = session(run, Notebook(), open_=open_tracker, specs=(spec,))
    assert warning.startswith("tracking with mlflow failed and is switched off, the run continues: ")


WANDB = """
import sys
from pathlib import Path
from evomerge.config import TrackerSpec
from tests.delivery.test_tracking import Notebook, open_tracker, session
spec = TrackerSpec(name="wandb", mode="offline", project="merges")
run = Path(sys.argv[1])
assert session(run, Notebook(), 2, finish=False, open_=open_tracker, specs=(spec,)) == []
assert session(run, Notebook(), open_=open_tracker, specs=(spec,)) == []
"""


@pytest.mark.slow
def test_wandb_offline_leaves_its_files_in_the_run_and_no_process(run: Path, tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    mark = f"tracking-test-{os.getpid()}"
    environment = {
        **os.environ,
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "EVOMERGE_TEST_MARK": mark,
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WANDB, str(run)],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(here.iterdir()) == []
    sessions = sorted((run / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2
    identity = json.loads((run / STATE).read_text())["wandb"]["id"]
    assert all(identity in folder.name for folder in sessions)  # a second one within a second gets a suffix
    assert [_steps(next(folder.glob("*.wandb"))) for folder in sessions] == [[0, 1], [2]]
    assert _with_mark(mark) == []


def _steps(file: Path) -> list[int]:
    """The steps that a W&B file (records as in LevelDB's log format) holds numbers of."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, steps = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for another head in this block
            at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, part = Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
    return steps


def _with_mark(mark: str) -> list[str]:
    """The processes that inherited an environment variable."""
    commands = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                commands.append((process / "cmdline").read_text())
        except OSError:
            continue
    return commands


@pytest.mark.end_to_end
@pytest.mark.usefixtures("formula")
def test_the_command_feeds_a_tracker_and_the_scores_are_the_same(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = Notebook()
    monkeypatch.setattr("evomerge.delivery.tracking.open_tracker", notebook.open)
    budget = {"generations": 1}
    for out, tracking in (("tracked", ["tensorboard"]), ("plain", [])):
        path = config(generate=False, budget=budget, tracking=tracking, out=str(tmp_path / out))
        assert invoke("run", path, "--quiet").exit_code == 0
    assert [what for what, _ in notebook.calls] == ["open", "config", "step", "result", "close"]
    digests = []
    for out in ("tracked", "plain"):
        assert [p.name for p in (tmp_path / out).glob("run.sqlite*")] == ["run.sqlite"]
        with RunStore.read(tmp_path / out) as store:
            digests.append(store.digest())
    assert digests[0] == digests[1]


def test_flat_settings() -> None:
    assert flat({"a": {"b": [1, 2], "c": None}}) == {"a.b": "[1, 2]", "a.c": None}
