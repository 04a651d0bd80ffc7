"""The report: what it says is what is stored; the page needs no network and shows its plots."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from evomerge import compose
from evomerge.delivery import report
from evomerge.delivery.summary import Summary
from evomerge.evaluation.scores import Scores
from evomerge.running.store import RunStore

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def opened(finished_run: Path) -> tuple[RunStore, Summary]:
    store = RunStore.read(finished_run)
    return store, Summary(store, compose.stored_suite(store))


@pytest.fixture(scope="module")
def page(opened: tuple[RunStore, Summary], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write_html(*opened, tmp_path_factory.mktemp("page") / "report.html")


def test_rows_are_base_parents_baselines_winner(opened: tuple[RunStore, Summary]) -> None:
    rows = opened[1].rows()
    roles = [row.role for row in rows]
    assert roles[:3] == ["base", "parent", "parent"]
    assert set(roles[3:-1]) == {"baseline"}
    assert roles[-1] == "winner"
    names = {row.name for row in rows}
    assert {"uniform average", "TIES", "DARE-TIES", "SLERP", "Model Stock", "greedy soup"} <= names


def test_numbers_are_those_of_the_stored_items(opened: tuple[RunStore, Summary]) -> None:
    store, summary = opened
    for row in summary.rows():
        scores = store.result(row.recipe, "test")
        assert isinstance(scores, Scores)
        for task, interval in row.tasks.items():
            assert interval.estimate == pytest.approx(scores[task].metric.mean())
            assert interval.low <= interval.estimate <= interval.high
    base = summary.rows()[0]
    assert base.mean.estimate == pytest.approx(0)
    assert base.retention == pytest.approx(1)


def test_the_verdict_is_against_the_best_row_that_was_not_searched(opened: tuple[RunStore, Summary]) -> None:
    summary = opened[1]
    rows = summary.rows()
    verdict = summary.verdict(rows)
    assert verdict is not None
    rivals = [row for row in rows if row.role != "winner"]
    best = max(rivals, key=lambda row: row.mean.estimate)
    assert verdict.rival == best.name
    assert verdict.test.estimate == pytest.approx(rows[-1].mean.estimate - best.mean.estimate)
    assert verdict.items == 80
    number = r"-?[\d.]+"
    points = rf"[+-][\d.]+ points \[{number}, {number}\]"
    pattern = rf"search (helped|did not help): {points} over the best baseline \(.+\)"
    assert re.fullmatch(pattern, verdict.sentence)
    assert verdict.sentence.startswith("search helped") == (verdict.test.low > 0)


def test_progress_and_finalists(opened: tuple[RunStore, Summary]) -> None:
    progress = opened[1].progress()
    assert progress.generations == (0, 1, 2)
    assert list(progress.best_so_far) == sorted(progress.best_so_far)
    assert progress.best_baseline is not None
    finalists = opened[1].finalists()
    assert len(finalists) == 3
    assert finalists[-1].name == "mean of the search"
    assert all(f.select is not None for f in finalists)


def test_cost_adds_up(opened: tuple[RunStore, Summary]) -> None:
    cost = opened[1].cost()
    assert cost.candidates == 12
    assert min(cost.forward, cost.merge, cost.scoring, cost.search) > 0
    assert 0 < cost.overhead < 1


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_table_fits_and_ends_with_the_verdict(opened: tuple[RunStore, Summary], width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.terminal(*opened, width=width))
    text = console.export_text()
    assert "winner" in text
    assert "retention" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert "over the best baseline" in " ".join(text.split())


def test_as_data_is_json(opened: tuple[RunStore, Summary]) -> None:
    data = json.loads(json.dumps(report.as_data(*opened)))
    assert len(data["rows"][0]["mean"]) == 3
    assert data["verdict"]["low"] <= data["verdict"]["points"] <= data["verdict"]["high"]


def test_an_unfinished_run_reports_what_there_is(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    with RunStore.open(tmp_path / "run") as store:
        store._db.execute("DELETE FROM score WHERE split = 'test'")
        store._db.execute("DELETE FROM entry WHERE role = 'winner'")
        store._db.commit()
        summary = Summary(store, compose.stored_suite(store))
        assert summary.rows() == []
        assert summary.verdict([]) is None
        text = report.write_html(store, summary, tmp_path / "report.html").read_text()
    assert "no verdict yet" in text


def test_the_page_is_self_contained(page: Path, opened: tuple[RunStore, Summary]) -> None:
    text = page.read_text()
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"'](?!data:)", outside)
    assert text.count("<script>") == 2
    verdict = opened[1].verdict(opened[1].rows())
    assert verdict is not None
    assert verdict.sentence in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_chromium_draws_the_page_without_a_network(page: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--proxy-server=127.0.0.1:9"]
    flags += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    done = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count('class="main-svg"') >= 3
    for figure in ("tasks", "progress", "genome"):
        assert re.search(rf'id="{figure}"[^>]*class="[^"]*js-plotly-plot', done.stdout) or re.search(
            rf'class="[^"]*js-plotly-plot[^"]*"[^>]*id="{figure}"', done.stdout
        )
