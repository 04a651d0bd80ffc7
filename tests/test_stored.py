"""A stored run is opened once: its folder, store, suite and config."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import ConfigError, StoreError
from evomerge.running.store import RunStore, facts
from evomerge.stored import StoredRun, config_to_resume, environment_note


def test_config_and_suite_come_from_the_store_alone(finished_run: Path) -> None:
    with StoredRun.read(finished_run) as run:
        config = run.config()
        assert config.out == str(run.folder.absolute())
        assert config.identity() == facts.IDENTITY.require(run.store)
        assert run.suite is run.suite
        assert [task.task for task in run.suite.tasks]


def test_single_limits_and_places_are_replaced(finished_run: Path) -> None:
    with StoredRun.read(finished_run) as run:
        before = run.config()
        config = run.config(models={"base": "elsewhere/base"}, generations=50)
        assert config.budget.generations == 50
        assert config.models.base.endswith("elsewhere/base")
        assert config.models.sources == before.models.sources
        assert run.config() == before  # nothing was written
        with pytest.raises(ConfigError, match="no such model"):
            run.config(models={"bsae": "x"})


def test_a_run_that_a_process_works_on_is_not_resumed(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, {}), pytest.raises(StoreError, match="another process is working"):
        config_to_resume(tmp_path)


def test_where_no_run_is_there_is_nothing_to_open(tmp_path: Path) -> None:
    assert environment_note(tmp_path) is None
    with pytest.raises(StoreError, match="no run here"):
        StoredRun.read(tmp_path)


def test_a_store_without_a_suite_says_so(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, {}) as store, pytest.raises(StoreError, match="no fact `suite`"):
        assert StoredRun(store).suite
