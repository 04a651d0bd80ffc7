"""The Python interface: it does what the commands do, with the same bits and the same messages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import evomerge
from evomerge import compose
from evomerge.api.configs import place_of, plain
from evomerge.api.runs import Written
from evomerge.api.view import View
from evomerge.delivery import report_page
from evomerge.delivery.notes import stop_sentence
from evomerge.errors import ConfigError, StoreError
from evomerge.merging.recipe import Recipe
from evomerge.running.observers import Observer
from evomerge.running.store import RunStore
from tests.api.answer_scorer import closeness
from tests.conftest import SUITE, config_data, write_suite
from tests.running import quick


@pytest.fixture(scope="module")
def run(finished_run: Path) -> evomerge.Run:
    return evomerge.load(finished_run)


# One config, two forms ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_formula(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a YAML file whose models are a formula, as they are in the tests that use it."""
    folder = tmp_path_factory.mktemp("formula")
    write_suite(folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_data(tiny_zoo, folder), sort_keys=False))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compose.executors, "build", quick.build(0))
        return evomerge.optimize(path).folder


@pytest.mark.end_to_end
@pytest.mark.usefixtures("formula")
def test_a_dict_runs_like_its_yaml(tiny_zoo: Path, tmp_path: Path, of_formula: Path) -> None:
    write_suite(tmp_path)
    data = config_data(tiny_zoo, tmp_path)
    data["models"] = {"base": tiny_zoo / "base", "sources": data["models"]["sources"]}  # a Path is a text
    data["budget"] = {"generations": np.int64(1)}
    events: list[str] = []
    run = evomerge.optimize(data, generations=3, callbacks=[lambda event, values: events.append(event)])
    assert run.folder == tmp_path / "run"
    with RunStore.read(run.folder) as mine, RunStore.read(of_formula) as theirs:
        assert mine.digest() == theirs.digest()
    assert {"phase", "scored", "generation"} <= set(events)
    assert events.count("generation") == 3
    again = evomerge.resume(run.folder, generations=4)
    assert again.stopped is not None
    assert "4" in again.stopped


@pytest.mark.usefixtures("formula")
def test_a_suite_written_out_in_a_config_is_that_of_a_file(
    config: Callable[..., Path], of_formula: Path
) -> None:
    path = config()
    data = yaml.safe_load(path.read_text())
    data["suite"] = yaml.safe_load(Path(data["suite"]).read_text())
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    run = evomerge.optimize(path)
    with RunStore.read(run.folder) as mine, RunStore.read(of_formula) as theirs:
        assert mine.digest() == theirs.digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgett": {}}, "budgett"),
        ({"budget": {"evaluations": "many"}}, "evaluations"),
        ({"models": {"base": object(), "sources": {}}}, "not a value that a config can have"),
        ({"models": None}, "models"),
        ({"seed": -1}, "seed"),
        ({"suite": {"name": "x", "tasks": []}}, "suite"),
        ({"suite": {"name": "x", "tasks": [{"task": "no_such_task", "metric": "acc"}]}}, "splits"),
        ({"space": {"name": "x"}}, "space"),
        ({3: "x"}, "keys are texts"),
    ],
)
def test_mistakes_in_a_dict_are_messages(
    change: dict[Any, Any], message: str, tiny_zoo: Path, tmp_path: Path
) -> None:
    write_suite(tmp_path)
    with pytest.raises(ConfigError, match=message):
        evomerge.optimize(config_data(tiny_zoo, tmp_path) | change)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [None, 3, ["models"], "no/such.yaml"])
def test_what_is_no_config_is_a_message(config: Any) -> None:
    with pytest.raises((ConfigError, TypeError, FileNotFoundError)):
        evomerge.optimize(config)


def test_check_measures_and_stores_nothing(config: Callable[..., Path], tmp_path: Path) -> None:
    view = evomerge.check(config(), evaluations=5)
    assert "genes" in str(view)
    assert json.dumps(view.data)
    assert not (tmp_path / "run").exists()


# Scorers and callbacks ------------------------------------------------------------------------------


def own_data(tiny_zoo: Path, folder: Path, **task: Any) -> dict[str, Any]:
    lines = [{"ask": f"reverse {a}{b}{a} >", "reply": f"{a}{b}{a}"} for a in "abcdefgh" for b in "ijklmnop"]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry: dict[str, Any] = {"task": "mine", "data": str(folder / "mine.jsonl"), "prompt": "ask"}
    entry |= {"answer": "reply", "gen_kwargs": {"max_gen_toks": 4}}
    suite = {"name": "own", "tasks": [entry | task]}
    return config_data(tiny_zoo, folder, suite=suite, budget={"generations": 1})


@pytest.mark.end_to_end
def test_a_function_scores_answers(tiny_zoo: Path, tmp_path: Path) -> None:
    run = evomerge.optimize(own_data(tiny_zoo, tmp_path), scorer=closeness)
    (values,) = run.scores("winner", "test").values()
    assert ((values >= 0) & (values <= 1)).all()
    sample = run.samples("winner", "mine", limit=0).data["samples"][0]
    text = sample["answers"][0]["texts"][0]
    right = sample["prompt"].split()[1]
    assert sample["answers"][0]["metric"] == pytest.approx(closeness(text, {"reply": right}))


@pytest.mark.parametrize(
    ("scorer", "task", "message"),
    [
        (lambda answer, row: 1.0, {}, "could not import"),
        (closeness, {"choices": "options"}, "no task for the scorer"),
    ],
)
def test_scorers_that_can_not_be_used_are_messages(
    scorer: Any, task: dict[str, Any], message: str, tiny_zoo: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        evomerge.optimize(own_data(tiny_zoo, tmp_path, **task), scorer=scorer)


def test_a_scorer_needs_a_suite_in_the_config(config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="written out"):
        evomerge.optimize(config(), scorer=closeness)


def test_a_scorer_of_a_script_is_found_by_its_file(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from evomerge.api.configs import place_of\n\n"
        "def mine(answer, row):\n    return 1.0\n\nprint(place_of(mine))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{script.resolve()}:mine"
    assert place_of(closeness) == "tests.api.answer_scorer:closeness"


@pytest.mark.usefixtures("formula")
def test_a_callback_that_raises_loses_nothing(config: Callable[..., Path], of_formula: Path) -> None:
    class Enough(Exception):
        pass

    def stop(event: str, values: Any) -> None:
        if event == "generation" and values["generation"] == 1:
            raise Enough

    path = config()
    with pytest.raises(Enough):
        evomerge.optimize(path, callbacks=[stop, Observer()])
    run = evomerge.optimize(path)
    with RunStore.read(run.folder) as mine, RunStore.read(of_formula) as theirs:
        assert mine.digest() == theirs.digest()


# A stored run ---------------------------------------------------------------------------------------


def test_the_winner_is_that_of_the_report(run: evomerge.Run) -> None:
    winner = run.winner
    assert winner is not None
    (row,) = [row for row in run.report().data["rows"] if row["role"] == "winner"]
    assert winner.recipe.hash == row["recipe"]
    assert winner.id == row["recipe"][: len(winner.id)]
    assert [winner.mean, winner.low, winner.high] == row["mean"]
    assert winner.tasks == {task: values[0] for task, values in row["tasks"].items()}


def test_candidates_are_a_frame(run: evomerge.Run) -> None:
    frame = run.candidates()
    assert list(frame.columns[:4]) == ["id", "recipe", "generation", "names"]  # type: ignore[union-attr]
    assert {"mean", "blocks", "losses", "task demo_upper", "weight upper"} <= set(frame.columns)  # type: ignore[union-attr]
    assert frame["recipe"].is_unique  # type: ignore[call-overload]


def test_without_pandas_candidates_are_dicts(run: evomerge.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = run.candidates()
    assert isinstance(rows, list)
    assert rows[0]["generation"] == 0


def test_scores_are_the_stored_items(run: evomerge.Run) -> None:
    scores = run.scores()
    assert run.winner is not None
    assert {
        task: values.mean() for task, values in scores.items() if task in run.winner.tasks
    } == pytest.approx(run.winner.tasks)
    scores["demo_upper"][:] = 7.0
    assert run.scores()["demo_upper"].max() <= 1
    assert set(run.scores("best-baseline", "test")) == set(scores)
    with pytest.raises(ConfigError, match="no recipe of this run"):
        run.scores("no such candidate")


def test_a_run_with_one_objective_has_no_front(run: evomerge.Run) -> None:
    with pytest.raises(ConfigError, match="one objective"):
        run.front()


def test_the_report_is_a_view_a_page_and_files(run: evomerge.Run, tmp_path: Path) -> None:
    report = run.report()
    assert "over the best baseline" in str(report)
    assert "<pre" in report._repr_html_()
    page = report.save(tmp_path / "page.html")
    assert page.read_text() == report.page()
    assert (tmp_path / "figures" / "card.png") in report.figures(tmp_path / "figures")
    with run.opened() as summary:
        assert report_page.page(summary) == report.page()


def test_views_print_what_commands_print(run: evomerge.Run) -> None:
    for view in (
        run.status(),
        run.show("winner"),
        run.samples("winner", "demo_upper"),
        evomerge.compare([run.folder]),
    ):
        assert isinstance(view, View)
        assert str(view).strip()
        json.dumps(view.data)


def test_exports_are_what_was_scored(run: evomerge.Run, tmp_path: Path) -> None:
    done = run.export(tmp_path / "model")
    assert done.equal is True
    text = run.export(tmp_path / "recipe.yaml", form="recipe")
    assert text.recipe == done.recipe
    merged = evomerge.merge(tmp_path / "recipe.yaml", tmp_path / "again")
    assert merged.recipe == done.recipe
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "model/model.safetensors"
    ).read_bytes()
    winner = run.winner
    assert winner is not None
    assert isinstance(winner.recipe, Recipe)
    evomerge.merge(winner.recipe, tmp_path / "third")
    assert (tmp_path / "third/model.safetensors").read_bytes() == (
        tmp_path / "model/model.safetensors"
    ).read_bytes()
    scored = evomerge.evaluate(tmp_path / "model", run=run)
    raw = {row["task"]: row["score"] for row in scored.data["tasks"] if row["task"] in winner.tasks}
    assert raw == pytest.approx(winner.tasks)


@pytest.mark.parametrize("form", ["gguf", "models"])
def test_unknown_forms_are_messages(form: str, run: evomerge.Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such form"):
        run.export(tmp_path / "x", form=form)
    with pytest.raises(ConfigError, match="no such form"):
        evomerge.merge(tmp_path / "recipe.yaml", tmp_path / "x", form=form)


def test_analyze_and_predict(run: evomerge.Run, config: Callable[..., Path], tmp_path: Path) -> None:
    analysis = evomerge.analyze(config())
    assert "start from" in str(analysis)
    assert analysis.save(tmp_path / "page.html").is_file()
    with pytest.raises(ConfigError, match="unknown map"):
        evomerge.analyze(config(), shown="maps")


def test_no_run_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        evomerge.load(tmp_path)


# The front ------------------------------------------------------------------------------------------


def test_names_are_imported_when_they_are_used() -> None:
    script = (
        "import sys, evomerge\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert set(evomerge.__all__) <= set(dir(evomerge))\n"
        "for name in evomerge.__all__: getattr(evomerge, name)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        evomerge.optimise  # type: ignore[attr-defined]  # noqa: B018


def test_plain_data_stays_plain() -> None:
    data = {"a": [1, 2.5, True, None], "b": {"c": "x"}}
    assert plain(data, "config") == data
    assert plain({"a": (np.float64(0.5), Path("x"))}, "config") == {"a": [0.5, "x"]}
    assert SUITE["tasks"]


def test_what_an_adapter_loses_is_a_sentence() -> None:
    written = Written(place=Path("x"), name="n", recipe="r", scores=(("a", 0.95, 0.2), ("b", 0.5, 0.5)))
    assert written.loss is not None
    assert "a 20 instead of 95" in written.loss
    assert Written(place=Path("x"), name="n", recipe="r", scores=(("a", 0.5, 0.49),)).loss is None


def test_a_budget_that_fits_no_generation_says_so(finished_run: Path) -> None:
    class Stored:
        folder = finished_run

        def read_value(self, key: str) -> str:
            return "budget of 20 evaluations used (14 in whole generations)"

        def generations(self) -> list[Any]:
            with RunStore.read(finished_run) as store:
                return store.generations()

    assert stop_sentence(Stored()).endswith(  # type: ignore[arg-type, union-attr]
        "a further generation of 4 candidates would have gone beyond it"
    )
