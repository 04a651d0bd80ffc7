"""A stored run is opened once: its folder, store, suite and config."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.config import RunConfig
from evomerge.errors import ConfigError, StoreError
from evomerge.evaluation.sharing import Sharing
from evomerge.prepare import check_folder, prepare, run_facts
from evomerge.running.store import RunStore, facts
from evomerge.stored import StoredRun, config_to_resume, environment_note
from tests.conftest import write_suite


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


def test_a_run_of_another_lm_eval_is_not_continued(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.4.99" if name == "lm_eval" else version(name)
    )
    with StoredRun.read(finished_run) as run:
        prepared = prepare(run.config())
    with pytest.raises(StoreError, match="lm-eval changed since the run began") as caught:
        check_folder(prepared)
    assert caught.value.fix is not None
    assert f"pip install lm_eval=={version('lm_eval')}" in caught.value.fix


def test_a_run_from_before_chat_templates_goes_on_without_one(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = facts.Fact.get

    def without(fact: facts.Fact[Any], store: Any) -> Any:
        value = read(fact, store)
        if fact is facts.SUITE:
            return {key: value[key] for key in value if key not in ("chat_template", "long_prompts")}
        return value

    with StoredRun.read(finished_run) as run:
        assert prepare(run.config()).suite.chat_template == "auto"
        monkeypatch.setattr(facts.Fact, "get", without)
        assert run.suite.chat_template == "off"
        prepared = prepare(run.config())
    assert (prepared.suite.chat_template, prepared.suite.long_prompts) == ("off", "cut")
    assert prepared.worker.suite.chat_template == "off"


def test_a_run_keeps_the_blocks_it_was_begun_with(finished_run: Path) -> None:
    """`blocks: auto` in the config file of a stored run means that run's own number."""
    with StoredRun.read(finished_run) as run:
        stored = run.config()
    racing = stored.racing.model_copy(update={"blocks": "auto"})
    again = prepare(stored.model_copy(update={"racing": racing}))
    assert (again.config.racing.blocks, again.worker.blocks) == (3, 3)
    check_folder(again)


@pytest.mark.parametrize(
    ("answers", "items", "racing", "blocks"),
    [
        (0, 24, {"error": 0.5}, 8),
        (0, 5, {"error": 0.5}, 5),
        (20, 24, {"error": 0.5}, 1),
        (20, 24, {"blocks_min": 2}, 2),
        (20, 24, {"blocks": 6}, 6),
        (40, 24, "on", 2),
    ],
)
def test_a_run_without_a_number_of_blocks_has_as_many_as_give_full_batches(
    config: Callable[..., Path],
    tmp_path: Path,
    answers: int,
    items: int,
    racing: Any,
    blocks: int,
) -> None:
    path = config(racing=racing)
    few = {"select": 2, "test": 2}
    tasks = [{"task": "demo_upper", "metric": "acc", "splits": {**few, "search": items}}]
    if answers:
        splits = {**few, "search": answers}
        tasks.append({"task": "demo_upper_generate", "metric": "exact_match", "splits": splits})
    write_suite(tmp_path, tasks=tasks)
    prepared = prepare(RunConfig.load(path))
    assert prepared.config.racing.blocks == prepared.worker.blocks == run_facts(prepared)[facts.BLOCKS]
    assert prepared.worker.blocks == blocks


def test_a_run_shares_rows_as_it_began(config: Callable[..., Path]) -> None:
    """Runs from before shared rows have no such fact, and go on without them."""
    from evomerge import compose
    from evomerge.delivery.progress import Silent

    loaded = RunConfig.load(config(baselines=[], budget={"generations": 1}, racing="off"))
    assert prepare(loaded).worker.sharing is None
    compose.start(loaded, Silent())
    with RunStore.open(Path(loaded.out)) as store:
        sharing = Sharing.of_run(facts.SHARING.require(store))
        assert sharing.generated
        digest = store.digest()
    assert prepare(loaded).worker.sharing == sharing
    with RunStore.open(Path(loaded.out)) as store:
        facts.SHARING.set(store, None)
        assert store.digest() == digest
    assert prepare(loaded).worker.sharing == Sharing(scored=False, generated=False)
