"""The report: what it says is what is stored; the page needs no network and shows its plots."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from evomerge.delivery import report, report_page
from evomerge.delivery.course import Course
from evomerge.delivery.summary import Summary
from evomerge.evaluation import statistics
from evomerge.evaluation.scores import Scores
from evomerge.running.store import RunStore
from evomerge.search.ports import Named
from evomerge.stored import StoredRun


@pytest.fixture(scope="module")
def opened(finished_run: Path) -> Summary:
    store = RunStore.read(finished_run)
    return Summary(StoredRun(store))


@pytest.fixture(scope="module")
def page(opened: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_page.write_html(opened, tmp_path_factory.mktemp("page") / "report.html")


def test_rows_are_base_parents_baselines_winner(opened: Summary) -> None:
    rows = opened.rows()
    roles = [row.role for row in rows]
    assert roles[:3] == ["base", "parent", "parent"]
    assert set(roles[3:-1]) == {"baseline"}
    assert roles[-1] == "winner"
    names = {row.name for row in rows}
    assert {"uniform average", "TIES", "DARE-TIES", "SLERP", "Model Stock", "greedy soup"} <= names


def test_numbers_are_those_of_the_stored_items(opened: Summary) -> None:
    summary, store = opened, opened.store
    for row in summary.rows():
        scores = store.result(row.recipe, "test")
        assert isinstance(scores, Scores)
        for task, interval in row.tasks.items():
            assert interval.estimate == pytest.approx(scores[task].metric.mean())
            assert interval.low <= interval.estimate <= interval.high
    base = summary.rows()[0]
    assert base.mean.estimate == pytest.approx(0)
    assert base.retention == pytest.approx(1)


def test_the_verdict_is_against_the_best_row_that_was_not_searched(opened: Summary) -> None:
    summary = opened
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
    pattern = (
        rf"search (helped|did not help): {points} over the best baseline \(.+\); better on .+, worse on .+"
    )
    assert re.fullmatch(pattern, verdict.sentence)
    assert verdict.sentence.startswith("search helped") == (verdict.test.low > 0)


def test_convergence_and_finalists(opened: Summary) -> None:
    course = Course(opened)
    convergence = course.convergence()
    assert convergence.generations == (0, 1, 2)
    course_so_far = list(zip(convergence.blocks, convergence.best_so_far, strict=True))
    for (blocks, before), (more, after) in itertools.pairwise(course_so_far):
        assert more != blocks or after >= before  # on the same items it never falls
    assert convergence.best_baseline is not None
    finalists = course.finalists()
    assert 3 <= len(finalists) <= 4  # with their soup, where it was no worse than the first
    assert finalists[-1].name == "mean of the search"
    assert all(f.search is not None and f.select is not None for f in finalists)
    assert {f.name for f in finalists[2:-1]} <= {"soup of the finalists"}


def test_claims_are_paired_tests_of_the_winner_read_together(opened: Summary) -> None:
    summary, store = opened, opened.store
    rows = summary.rows()
    verdict, claims = summary.verdict(rows), summary.claims(rows)
    assert verdict is not None
    assert (claims[0].task, claims[0].rival, claims[0].test) == (None, verdict.rival, verdict.test)
    shown = [t.task for t in summary.shown_tasks]
    assert list(dict.fromkeys(c.task for c in claims)) == [None, *shown]
    assert {c.rival for c in claims if c.role == "specialist"} <= {"upper", "reverse"}
    winner = store.result(rows[-1].recipe, "test")
    assert isinstance(winner, Scores)
    for claim in claims[1:]:
        rival = store.result(next(r.recipe for r in rows if r.name == claim.rival), "test")
        assert isinstance(rival, Scores)
        if claim.task is not None:
            a, b = winner[claim.task].metric, rival[claim.task].metric
            assert claim.test.estimate == pytest.approx(a.mean() - b.mean())
            assert claim.test.p == statistics.mcnemar(a, b)
    assert [c.adjusted for c in claims] == statistics.holm([c.test.p for c in claims])


def test_shares_are_of_the_specialists_raw_scores(opened: Summary) -> None:
    summary = opened
    rows = summary.rows()
    shares = {share.task: share for share in summary.shares(rows)}
    assert shares["demo_reverse"].specialist == "reverse"
    assert shares["demo_upper"].specialist == "upper"
    for task, share in shares.items():
        top = next(r for r in rows if r.name == share.specialist).tasks[task].estimate
        assert share.score == top
        if top > 0:
            assert share.winner == pytest.approx(rows[-1].tasks[task].estimate / top)
        else:
            assert share.winner is None


def test_optimism_says_how_far_the_winner_falls_from_the_items_it_was_chosen_on(opened: Summary) -> None:
    course = Course(opened)
    found = course.optimism()
    assert found is not None
    assert opened.winner is not None
    assert found.test == pytest.approx(opened.rows()[-1].mean.estimate)
    assert found.select is not None
    assert 0 < found.blocks < found.of
    assert found.unused is not None  # the winner is scored on all of `search`
    whole = course.score(opened.winner.recipe.hash)
    assert whole is not None
    assert whole.blocks == found.of
    low, high = sorted((found.chosen, found.unused))
    assert low - 0.05 < whole.mean < high + 0.05
    assert "on the other search items" in found.sentence
    assert set(found.leads) >= {"chosen", "unused", "test"}
    assert opened.standard is not None
    rival = next(row for row in opened.rows() if row.name == opened.standard.name)
    assert found.leads["test"] == pytest.approx(found.test - rival.mean.estimate)


def test_a_warm_start_is_shown_but_neither_rival_nor_winner(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    with RunStore.open(tmp_path / "run") as store:
        before = Summary(StoredRun(store))
        best = before.best_baseline(before.rows())
        assert best is not None
        store.record_entry("start", 0, Named(name="gradient", recipe=before.winner.recipe))  # type: ignore[union-attr]
        summary = Summary(StoredRun(store))
        rows = summary.rows()
        assert [row.role for row in rows[-2:]] == ["start", "winner"]
        after = summary.best_baseline(rows)
    assert after is not None
    assert after.name == best.name


def test_cost_adds_up(opened: Summary) -> None:
    cost = Course(opened).cost()
    assert cost.candidates == 12
    assert min(cost.forward, cost.merge, cost.scoring, cost.search) > 0
    assert 0 < cost.overhead < 1


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_table_fits_and_ends_with_the_verdict(opened: Summary, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.terminal(opened, width=width))
    text = console.export_text()
    assert "winner" in text
    assert "retention" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    said = " ".join(text.split())
    for phrase in (
        "over the best baseline",
        "optimism: the winner has",
        "share of the specialist's score kept (mean over tasks): winner",
    ):
        assert phrase in said


def test_as_data_is_json(opened: Summary) -> None:
    data = json.loads(json.dumps(report.as_data(opened)))
    assert len(data["rows"][0]["mean"]) == 3
    assert data["claims"][0]["p_holm"] >= data["claims"][0]["p"] == data["verdict"]["p"]
    assert {share["task"] for share in data["kept"]} >= {"demo_reverse", "demo_upper"}
    assert {"chosen", "unused", "select", "test", "leads"} < set(data["optimism"])
    assert data["verdict"]["low"] <= data["verdict"]["points"] <= data["verdict"]["high"]


def test_an_unfinished_run_reports_what_there_is(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    with RunStore.open(tmp_path / "run") as store:
        store._db.execute("DELETE FROM score WHERE split = 'test'")
        store._db.execute("DELETE FROM entry WHERE role = 'winner'")
        store._db.commit()
        summary = Summary(StoredRun(store))
        assert summary.rows() == []
        assert summary.verdict([]) is None
        text = report_page.write_html(summary, tmp_path / "report.html").read_text()
    assert "no verdict yet" in text


def test_the_page_is_self_contained(page: Path, opened: Summary) -> None:
    text = page.read_text()
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"'](?!data:)", outside)
    assert text.count("<script>") == 1
    verdict = opened.verdict(opened.rows())
    assert verdict is not None
    assert verdict.sentence in text
    for heading in ("Paired comparisons of the winner", "Share of each specialist's score that is kept"):
        assert f"<h2>{heading}</h2>" in text
