"""Models and task files that change while a run goes on: no score of others is stored, no winner declared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery.progress import Silent
from evomerge.errors import ConfigError, ModelError, StoreError
from evomerge.prepare import prepare
from evomerge.running.executors import LocalProcesses
from evomerge.running.store import RunStore, facts
from evomerge.running.worker import Job, Worker


@pytest.fixture
def own(config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path) -> Path:
    """A run config whose models and task files are copies that may be changed."""
    shutil.copytree(tiny_zoo, tmp_path / "zoo")
    data = yaml.safe_load(config(generate=False, baselines=[], budget={"generations": 2}).read_text())
    data["models"] = {
        "base": str(tmp_path / "zoo" / "base"),
        "sources": {name: str(tmp_path / "zoo" / name) for name in ("upper", "reverse")},
    }
    suite = yaml.safe_load((tmp_path / "suite.yaml").read_text())
    shutil.copytree(suite["tasks_dir"], tmp_path / "tasks")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite | {"tasks_dir": str(tmp_path / "tasks")}))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def weights(zoo: Path, name: str) -> Path:
    return zoo / name / "model.safetensors"


def overwrite(zoo: Path) -> None:
    """Write other weights into a source's file, which stays the same file."""
    shutil.copyfile(weights(zoo, "base"), weights(zoo, "upper"))


def rename_over(zoo: Path) -> None:
    """Put another file in the place of a source's."""
    shutil.copyfile(weights(zoo, "base"), zoo / "new")
    (zoo / "new").replace(weights(zoo, "upper"))


def truncate(zoo: Path) -> None:
    """Replace a source's file by a piece of it, as an interrupted download leaves it."""
    (zoo / "new").write_bytes(weights(zoo, "upper").read_bytes()[:1000])
    (zoo / "new").replace(weights(zoo, "upper"))


def keep_times(zoo: Path) -> None:
    """Overwrite with the old times and the old size, as `cp -p` and backup tools can."""
    before = weights(zoo, "upper").stat()
    overwrite(zoo)
    os.utime(weights(zoo, "upper"), ns=(before.st_atime_ns, before.st_mtime_ns))


def new_config(zoo: Path) -> None:
    """Change a source's config."""
    path = zoo / "upper" / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))


def new_ends(zoo: Path) -> None:
    """Change where a source's answers end."""
    path = zoo / "upper" / "generation_config.json"
    path.write_text(path.read_text().replace("{", '{"max_length": 7,', 1))


CHANGES = [overwrite, rename_over, truncate, keep_times, new_config, new_ends]


@pytest.mark.parametrize("change", CHANGES)
def test_a_worker_scores_nothing_of_changed_models(
    change: Callable[[Path], None], own: Path, tmp_path: Path
) -> None:
    prepared = prepare(RunConfig.load(own))
    worker = Worker(prepared.worker)
    job = Job(recipe=prepared.template, split="search", blocks=(0,))
    scores = worker.run(job).outcome
    shutil.copytree(tmp_path / "zoo", tmp_path / "copy")
    for file in (tmp_path / "copy" / "upper").iterdir():  # the same contents in other files: nothing to say
        file.replace(tmp_path / "zoo" / "upper" / file.name)
    assert worker.run(job).outcome.same_as(scores)  # type: ignore[union-attr, arg-type]
    change(tmp_path / "zoo")
    with pytest.raises(ModelError, match=r"upper|model\.safetensors"):
        worker.run(job)
    with pytest.raises(ModelError, match=r"upper|model\.safetensors"):
        Worker(prepared.worker)


def test_a_change_during_a_job_discards_its_result(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(RunConfig.load(own))
    worker = Worker(prepared.worker)
    attempt = worker._attempt

    def interrupted(job: Job) -> object:
        overwrite(tmp_path / "zoo")
        return attempt(job)

    monkeypatch.setattr(worker, "_attempt", interrupted)
    with pytest.raises(ModelError, match=r"model files changed since the run began\n.*upper: model\.safe"):
        worker.run(Job(recipe=prepared.template, split="search", blocks=(0,)))


def test_a_worker_that_starts_later_refuses_changed_task_files(own: Path, tmp_path: Path) -> None:
    prepared = prepare(RunConfig.load(own))
    path = next((tmp_path / "tasks").rglob("*.jsonl"))
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(ConfigError, match="the suite or its task files changed since the run began"):
        Worker(prepared.worker)


@pytest.mark.end_to_end
def test_worker_processes_report_the_change_to_the_run(own: Path, tmp_path: Path) -> None:
    prepared = prepare(RunConfig.load(own))
    pool = LocalProcesses(prepared.worker, workers=1, timeout=100)
    try:
        job = Job(recipe=prepared.template, split="search", blocks=(0,))
        list(pool.run([job]))
        rename_over(tmp_path / "zoo")
        with pytest.raises(ModelError, match="model files changed since the run began"):
            list(pool.run([job]))
    finally:
        pool.close()


class Meddler(Silent):
    """Changes something when a phase of the run begins."""

    def __init__(self, phase: str, change: Callable[[], None]) -> None:
        self._phase, self._change = phase, change

    def phase(self, name: str, jobs: int, known: int) -> None:
        if name == self._phase:
            self._change()


@pytest.mark.end_to_end
def test_the_run_stops_and_goes_on_when_the_old_files_are_back(own: Path, tmp_path: Path) -> None:
    whole = RunConfig.load(own, out=str(tmp_path / "whole"))
    compose.start(whole, Silent())
    kept = weights(tmp_path / "zoo", "upper").read_bytes()
    for phase in ("generation 1", "selection", "test"):
        with pytest.raises(ModelError, match="model files changed since the run began"):
            compose.start(RunConfig.load(own), Meddler(phase, lambda: overwrite(tmp_path / "zoo")))
        with RunStore.read(tmp_path / "run") as store:
            assert facts.STOPPED.get(store) is None
            assert bool(store.entries("winner")) == (phase == "test")
        weights(tmp_path / "zoo", "upper").write_bytes(kept)
    compose.start(RunConfig.load(own), Silent())
    digests = [RunStore.read(tmp_path / name).digest() for name in ("whole", "run")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("phase", ["generation 1", "selection", "test"])
@pytest.mark.usefixtures("formula")
def test_no_winner_is_declared_over_changed_tasks(phase: str, own: Path, tmp_path: Path) -> None:
    def change() -> None:
        path = next((tmp_path / "tasks").rglob("*.jsonl"))
        path.write_text(path.read_text().replace("a", "b"))

    with pytest.raises(ConfigError, match="task files changed since the run began"):
        compose.start(RunConfig.load(own), Meddler(phase, change))
    with RunStore.read(tmp_path / "run") as store:
        assert facts.STOPPED.get(store) is None
        assert bool(store.entries("winner")) == (phase == "test")


@pytest.mark.usefixtures("formula")
def test_a_new_file_beside_the_tasks_does_not_lock_a_run_and_a_changed_one_is_named(
    own: Path, tmp_path: Path
) -> None:
    compose.start(RunConfig.load(own), Silent())
    (tmp_path / "tasks" / "new.yaml").write_text("task: new\n")
    compose.start(RunConfig.load(own), Silent())
    path = next((tmp_path / "tasks").rglob("demo_reverse.test.jsonl"))
    path.write_text(path.read_text() + path.read_text().splitlines()[0].replace("a", "b") + "\n")
    with pytest.raises(StoreError) as caught:
        compose.start(RunConfig.load(own), Silent())
    assert "the suite or its task files changed since the run began" in caught.value.what
    assert caught.value.got == "data/demo_reverse.test.jsonl (other contents)"


@pytest.mark.usefixtures("formula")
def test_a_run_stored_with_a_digest_of_all_files_goes_on(own: Path, tmp_path: Path) -> None:
    compose.start(RunConfig.load(own), Silent())
    suite = prepare(RunConfig.load(own)).suite
    with RunStore.open(tmp_path / "run") as store:
        facts.SUITE_DIGEST.set(store, suite.digest(like=""))
        facts.TASK_FILES.set(store, None)
    compose.start(RunConfig.load(own), Silent())
    (tmp_path / "tasks" / "new.yaml").write_text("task: new\n")
    with pytest.raises(StoreError, match="task files changed since the run began"):
        compose.start(RunConfig.load(own), Silent())
