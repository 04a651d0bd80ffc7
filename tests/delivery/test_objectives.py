"""Pareto runs and constraints as people see them: tables, page, JSON, status, card and picks say the same."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery import check, export, objectives, report, report_page, status
from evomerge.delivery.card import card
from evomerge.delivery.notes import notes
from evomerge.delivery.origins import origins
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.errors import ConfigError, StoreError
from evomerge.evaluation.scores import Scores
from evomerge.prepare import prepare
from evomerge.running.store import RunStore, facts
from evomerge.search import pareto
from evomerge.stored import StoredRun
from evomerge.trial import Probe
from tests.conftest import config_data, write_suite

SEVERAL = ["demo_reverse", "demo_upper"]

Opened = tuple[RunStore, Summary]


def start(zoo: Path, folder: Path, **objective: Any) -> Path:
    write_suite(folder, generate=False)
    path = folder / "config.yaml"
    changes = {"optimizer": {"name": "nsga2", "population": 6}, "budget": {"generations": 2}}
    data = config_data(zoo, folder, objective=objective, finalists=4, **changes)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    compose.start(RunConfig.load(path), Silent())
    return folder / "run"


@pytest.fixture(scope="module")
def opened(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """A finished run with two objectives and a constraint nothing can meet."""
    limits = {"tasks": {"demo_reverse": 5.0}}
    folder = start(
        tiny_zoo, tmp_path_factory.mktemp("pareto"), several=SEVERAL, smooth=0.5, constraints=limits
    )
    with RunStore.read(folder) as store:
        yield store, Summary(StoredRun(store))


@pytest.fixture(scope="module")
def plain(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """A finished run with two objectives."""
    folder = start(tiny_zoo, tmp_path_factory.mktemp("pareto"), several=SEVERAL, smooth=0.5)
    with RunStore.read(folder) as store:
        yield store, Summary(StoredRun(store))


def test_the_front_is_what_is_stored(plain: Opened) -> None:
    store, summary = plain
    front = objectives.front(summary)
    assert front is not None
    assert front.objectives == tuple(SEVERAL)
    assert [g.generation for g in front.generations] == [0, 1]
    told = np.concatenate([g.losses for g in store.generations() if g.losses is not None])
    last = front.generations[-1]
    assert last.hypervolume == pytest.approx(pareto.hypervolume(told, np.array(last.reference)))
    assert len(last.recipes) == len(pareto.front(told))
    searched = {p.recipe for p in front.searched}
    assert searched <= set(front.last)
    assert {p.role for p in front.points} >= {"base", "parent", "baseline", "winner"}
    values = np.array([p.values for p in front.searched])
    assert [i for i, p in enumerate(front.searched) if p.on_front] == pareto.front(-values)
    assert summary.winner is not None
    base = next(p for p in front.points if p.role == "base")
    assert base.values == pytest.approx((0, 0))


def test_only_the_winner_is_tested(plain: Opened) -> None:
    store, summary = plain
    assert summary.winner is not None
    tested = {n.recipe.hash for n in store.entries("finalist") if store.result(n.recipe.hash, "test")}
    assert tested == {summary.winner.recipe.hash}


def test_tables_json_and_status_show_the_front(plain: Opened) -> None:
    _store, summary = plain
    front = objectives.front(summary)
    assert front is not None
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.terminal(summary))
    text = console.export_text()
    assert "Pareto front on `select`" in text
    assert front.sentence in " ".join(text.split())
    for point in front.searched:
        assert point.recipe[:8] in text
    data = json.loads(json.dumps(report.as_data(summary), allow_nan=False))
    assert data["front"] == json.loads(json.dumps(front.as_data()))
    assert data["constraints"] is None
    assert any("several objectives" in note for note in data["notes"])
    state = status.as_data(summary)
    assert state["front"]["hypervolume"] == data["front"]["hypervolume"]
    assert front.sentence in status.text(state)


def test_picks(plain: Opened) -> None:
    store, summary = plain
    assert summary.winner is not None
    assert export.find(summary, "knee").recipe == summary.winner.recipe
    normaliser = summary.normaliser("select")
    assert normaliser is not None
    scores = {}
    for named in store.entries("finalist"):
        result = store.result(named.recipe.hash, "select")
        assert isinstance(result, Scores)
        scores[named.recipe.hash] = normaliser.task(result)
    for task in SEVERAL:
        best = export.find(summary, f"best:{task}").recipe.hash
        assert scores[best][task] == max(s[task] for s in scores.values())
        assert export.find(summary, f"weights:{task}=1").recipe.hash == best
    both = export.find(summary, "weights:demo_reverse=0.3, demo_upper=0.7").recipe.hash
    sums = {h: 0.3 * s["demo_reverse"] + 0.7 * s["demo_upper"] for h, s in scores.items()}
    assert sums[both] == max(sums.values())
    assert export.find(summary, "best:retention").recipe.hash in scores
    front = objectives.front(summary)
    assert front is not None
    other = front.searched[0].recipe
    assert export.find(summary, other[:8]).recipe.hash == other


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        ("best:demo_revers", "no task 'demo_revers'"),
        ("best:", "no task ''"),
        ("weights:demo_upper", "can't be read"),
        ("weights:demo_upper=x", "can't be read"),
        ("weights:demo_upper=-1", "can't be read"),
        ("weights:demo_upper=0", "can't be read"),
        ("weights:demo_upper=nan", "can't be read"),
        ("wieghts:demo_upper=1", "no recipe of this run is called"),
    ],
)
def test_a_pick_that_means_nothing_is_refused(plain: Opened, pick: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export.find(plain[1], pick)


def test_a_run_with_one_objective_has_finalists_but_no_knee(finished_run: Path) -> None:
    with RunStore.read(finished_run) as store:
        summary = Summary(StoredRun(store))
        assert objectives.front(summary) is None
        assert objectives.constraints(summary) is None
        assert status.as_data(summary)["front"] is None
        assert store.fronts() == []
        with pytest.raises(ConfigError, match="has no knee"):
            export.find(summary, "knee")
        finalists = {n.recipe.hash for n in store.entries("finalist")}
        assert export.find(summary, "best:demo_upper").recipe.hash in finalists


def test_nothing_to_pick_from_before_the_selection(plain: Opened, tmp_path: Path) -> None:
    shutil.copytree(plain[0].folder, tmp_path / "run")
    with RunStore.open(tmp_path / "run") as store:
        store._db.execute("DELETE FROM score WHERE split != 'search'")
        store._db.execute("DELETE FROM entry WHERE role IN ('winner', 'finalist')")
        store._db.commit()
        summary = Summary(StoredRun(store))
        with pytest.raises(StoreError, match="no finalists to pick from yet"):
            export.find(summary, "knee")
        front = objectives.front(summary)
        assert front is not None
        assert front.points == ()
        assert front.sentence in status.text(status.as_data(summary))
        report_page.write_html(summary, tmp_path / "report.html")


@pytest.mark.end_to_end
def test_an_unmet_constraint_is_in_every_output(opened: Opened) -> None:
    _store, summary = opened
    sentence = objectives.constraints(summary)
    assert sentence is not None
    assert sentence.startswith("no finalist meets the constraints on select; the winner violates them least")
    assert re.search(r"demo_reverse -?[\d.]+ of 500", sentence)
    assert sentence in notes(summary)
    assert sentence in status.text(status.as_data(summary))
    assert report.as_data(summary)["constraints"] == sentence
    assert summary.winner is not None
    assert f"Constraints: {sentence}." in card(summary, summary.winner, origins(summary.winner.recipe, {}))
    front = objectives.front(summary)
    assert front is not None
    assert front.generations[-1].hypervolume == 0  # nothing feasible, nothing covered


def test_a_resumed_run_finds_the_same_fronts(plain: Opened, tmp_path: Path) -> None:
    shutil.copytree(plain[0].folder, tmp_path / "run")
    compose.resume(tmp_path / "run", Silent())
    with RunStore.read(tmp_path / "run") as store:
        assert store.digest() == plain[0].digest()


def test_the_card_says_where_a_pick_stands(plain: Opened) -> None:
    _store, summary = plain
    pick = export.find(summary, "best:demo_upper")
    text = card(summary, pick, origins(pick.recipe, {}))
    assert re.search(
        r"From the run's Pareto front; on the `select` items: demo_reverse [\d.-]+, demo_upper", text
    )
    assert "Constraints" not in text


@pytest.mark.parametrize("count", [2, 3])
def test_the_page_shows_the_front(plain: Opened, tmp_path: Path, count: int) -> None:
    store, summary = plain
    folder = tmp_path / "run"
    shutil.copytree(store.folder, folder)
    with RunStore.open(folder) as copy:
        if count == 3:
            config = facts.CONFIG.get(copy)
            config["objective"]["several"].append("retention")
            facts.CONFIG.set(copy, config)
        summary = Summary(StoredRun(copy))
        page = report_page.write_html(summary, tmp_path / "report.html")
        front = objectives.front(summary)
    assert front is not None
    assert front.sentence in page.read_text()
    for figure in ("front" if count == 2 else "front-0-1", "hypervolume"):
        assert f'<figure id="{figure}">' in page.read_text()


def test_an_objective_the_suite_can_not_measure_is_refused(config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="coherence is part of it, but no task"):
        prepare(RunConfig.load(config(objective={"several": ["mean", "coherence"]})))
    with pytest.raises(ConfigError, match="tokens_of: no model is called 'uper'"):
        prepare(RunConfig.load(config(objective={"constraints": {"tokens": 1}, "tokens_of": "uper"})))
    with pytest.raises(ConfigError, match="has no task 'demo_revers', whose weight was set"):
        prepare(RunConfig.load(config(objective={"weights": {"demo_revers": 2}})))
    prepared = prepare(RunConfig.load(config(objective={"weights": {"demo_reverse": 2}})))
    assert prepared.suite["demo_reverse"].weight == 2
    assert prepared.layers == 2


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        ({"constraints": {"tokens": 1.1}}, "off (the objective limits tokens)"),
        ({"depth": 0.1, "constraints": {"tokens": 1.1}}, "off (the objective charges for depth)"),
        ({"constraints": {"tasks": 0.5}}, "on"),
        ({"kind": "balanced"}, "on"),
    ],
)
def test_check_says_why_there_is_no_surrogate(
    config: Callable[..., Path], objective: dict[str, Any], reason: str
) -> None:
    prepared = prepare(RunConfig.load(config(objective=objective)))
    probe = Probe(
        items={},
        test_items={"demo_reverse": 10, "demo_upper": 10},
        seconds={},
        workers=1,
        seconds_before=0,
        seconds_after=0,
        estimate=None,
        ends=None,
        cost=None,
        late=False,
    )
    found = check.text(prepared, probe, check.Questions(prompts=(), notes=()))
    goal = (
        "the mean of the tasks' logarithms"
        if "kind" in objective
        else "the mean of the tasks, none of them below"
    )
    assert f"goal:   {goal}" in found
    assert ("; within the constraints" in found) == ("constraints" in objective)
    assert f"surrogate {reason}; starts" in found


def test_check_refuses_tokens_where_nothing_is_generated(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(objective={"constraints": {"tokens": 1.1}})  # the task that generates has no weight
    with pytest.raises(ConfigError, match="tokens is part of it, but no task generates answers"):
        check.asked(prepare(RunConfig.load(path)))


@pytest.fixture(scope="module")
def written(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """A finished run whose only counted task generates, with the length of its answers as an objective."""
    folder = tmp_path_factory.mktemp("written")
    suite = yaml.safe_load(write_suite(folder).read_text())
    (task,) = (task for task in suite["tasks"] if task["metric"] == "exact_match")
    task |= {"weight": 1, "splits": {"search": 12, "select": 8, "test": 8}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite | {"tasks": [task]}))
    parent = next(iter(config_data(tiny_zoo, folder)["models"]["sources"]))
    objective = {"several": ["mean", "tokens"], "tokens_of": parent, "constraints": {"tokens": 0.01}}
    changes = {"optimizer": {"name": "nsga2", "population": 4}, "budget": {"generations": 1}}
    data = config_data(tiny_zoo, folder, objective=objective, **changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    compose.start(RunConfig.load(folder / "config.yaml"), Silent())
    with RunStore.read(folder / "run") as store:
        yield store, Summary(StoredRun(store))


@pytest.mark.end_to_end
def test_the_length_of_answers_is_shown(written: Opened, tmp_path: Path) -> None:
    _store, summary = written
    front = objectives.front(summary)
    assert front is not None
    name = summary.objective.tokens_of
    parent = next(p for p in front.points if p.name == name)
    assert parent.values[1] == pytest.approx(1)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report.terminal(summary))
    text = console.export_text()
    assert f"100 = specialists; tokens: % of {name}'s tokens" in " ".join(text.split())
    assert front.axes[1] == f"tokens, % of {name}'s tokens"
    page = report_page.write_html(summary, tmp_path / "page.html").read_text()
    assert f"in % of {name}&#39;s tokens." in page
    assert re.search(r"model .* retention .* tokens", text)
    rows = report.as_data(summary)["rows"]
    assert rows[1]["name"] == name
    assert rows[1]["tokens"] == pytest.approx(1)
    assert summary.winner is not None
    model_card = card(summary, summary.winner, origins(summary.winner.recipe, {}))
    assert "| mean | retention | tokens |\n|---|" in model_card
    assert f"Tokens: mean length of generated answers, in % of {name}'s tokens.\n" in model_card
    line = next(line for line in model_card.splitlines() if line.startswith(f"| {name} |") and "[" in line)
    assert line.endswith(" | 100.0 |")
    sentence = objectives.constraints(summary)
    assert sentence is not None
    assert re.search(rf"tokens \d+(\.\d)? of at most 1 % of {name}'s tokens", sentence)


def test_the_notes_name_the_companions(written: Opened) -> None:
    _store, summary = written
    (companion,) = summary.companions()
    assert companion.exists
    assert companion.sentence in notes(summary)
    base = summary.scores(summary.parents[0].recipe.hash, "search")
    assert base is not None
    (task,) = base.tasks
    assert task.margin is not None
    assert companion.models == len({named.recipe.hash for named in summary.parents}) + len(summary.baselines)
