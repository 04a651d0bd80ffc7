"""The pages as their readers have them: in Chromium, at three widths, light and dark, on paper, by ear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from evomerge.config import RunConfig
from evomerge.delivery import report_page
from evomerge.delivery.analyze.page import write_html
from evomerge.delivery.candidates import CandidateRow, Candidates, GeneOfRun
from evomerge.delivery.summary import Summary
from evomerge.merging.analysis.advice import advise
from evomerge.merging.analysis.interference import measure
from evomerge.running.store import BASE, RunStore
from evomerge.stored import StoredRun

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = (1280, 768, 390)


@pytest.fixture(scope="module")
def summary(finished_run: Path) -> Summary:
    return Summary(StoredRun(RunStore.read(finished_run)))


@pytest.fixture(scope="module")
def report(summary: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_page.write_html(summary, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def large(summary: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 1,000 candidates of 50 genes."""
    rng = np.random.default_rng(0)
    tasks = [task.task for task in summary.shown_tasks]
    table = Candidates(
        genes=tuple(
            GeneOfRun(name=f"weight {number}", facts={"kind": "real", "low": -0.5, "high": 1.5})
            for number in range(50)
        ),
        rows=tuple(
            CandidateRow(
                recipe=f"{number:064x}",
                generation=number // 16,
                position=number % 16,
                names=(),
                genome=rng.random(50),
                losses=(0.0,),
                mean=float(rng.normal()),
                tasks={task: float(rng.normal()) for task in tasks},
                blocks=1,
                failure=None,
            )
            for number in range(1000)
        ),
        blocks=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "candidates", lambda *_: table)
        return report_page.write_html(summary, tmp_path_factory.mktemp("large") / "report.html")


@pytest.fixture(scope="module")
def analysis(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with StoredRun.read(finished_run) as run:
        config: RunConfig = run.config()
    interference = measure(config.locations, BASE)
    return write_html(interference, advise(interference), tmp_path_factory.mktemp("page") / "page.html")


def test_a_thousand_candidates_weigh_at_most_400_kilobytes(large: Path) -> None:
    assert large.stat().st_size <= 400_000


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ["report", "large", "analysis"])
def test_no_width_makes_the_page_itself_scroll_sideways(
    name: str, opened_page: Callable[..., Page], request: pytest.FixtureRequest
) -> None:
    page = opened_page(request.getfixturevalue(name))
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("figure svg:visible").count() >= 4


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ["report", "analysis"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(
    name: str, scheme: str, opened_page: Callable[..., Page], request: pytest.FixtureRequest
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(opened_page(request.getfixturevalue(name), scheme=scheme))
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.end_to_end
def test_the_dark_page_is_dark(report: Path, opened_page: Callable[..., Page]) -> None:
    script = "getComputedStyle(document.body).backgroundColor"
    colours = [opened_page(report, scheme=scheme).evaluate(script) for scheme in ("light", "dark")]
    light, dark = (sum(map(int, colour.strip("rgb()").split(","))) for colour in colours)
    assert light > 650
    assert dark < 120


def test_the_table_sorts_below_winner_and_best_baseline(
    report: Path, opened_page: Callable[..., Page]
) -> None:
    page = opened_page(report)
    first = "table.scores tbody tr td:first-child"
    before = page.locator(first).all_inner_texts()
    assert before[0].startswith("winner: ")
    assert "(best baseline)" in before[1]
    page.get_by_role("button", name="mean", exact=True).click()
    after = page.locator(first).all_inner_texts()
    assert after[:2] == before[:2]
    means = [
        float(text.split()[0])
        for text in page.locator("table.scores tbody tr:not([data-pinned]) td.mean").all_inner_texts()
    ]
    assert means == sorted(means, reverse=True)
    page.get_by_role("button", name="mean", exact=True).click()
    assert page.locator("table.scores th[aria-sort=ascending]").count() == 1


def test_a_telephone_shows_names_and_scores_side_by_side(
    report: Path, opened_page: Callable[..., Page]
) -> None:
    page = opened_page(report, width=390)
    cells = page.locator("table.scores tbody tr").first.locator("td")
    name, mean, retention = (cells.nth(n).bounding_box() for n in range(3))
    assert name is not None
    assert mean is not None
    assert retention is not None
    assert retention["x"] + retention["width"] <= 390
    page.locator("div.scroll:has(table.scores)").evaluate("box => { box.scrollLeft = 200 }")
    moved = cells.nth(0).bounding_box()
    assert moved is not None
    assert moved["x"] == pytest.approx(name["x"], abs=1)


def test_a_candidate_opens_with_its_genes_and_how_to_export_it(
    report: Path, summary: Summary, opened_page: Callable[..., Page]
) -> None:
    page = opened_page(report)
    mark = page.locator("#candidates .wide [data-i]").last
    mark.hover()
    assert "points on" in page.locator(".tip").inner_text()
    mark.click(force=True)
    shown = page.locator("dialog").inner_text()
    assert "evomerge export" in shown
    identity = shown.split("Candidate ")[1].split()[0]
    asked = {recipe for generation in summary.store.generations() for recipe in generation.recipes}
    assert any(recipe.startswith(identity) for recipe in asked)
    assert all(task in shown for task in ("demo_reverse", "demo_upper", "weight upper"))
    page.get_by_role("button", name="close").click()
    assert not page.locator("dialog").is_visible()


@pytest.mark.parametrize("name", ["report", "large", "analysis"])
def test_paper_cuts_no_chart(
    name: str, opened_page: Callable[..., Page], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = opened_page(request.getfixturevalue(name), width=718)  # A4 between margins, at 96 dots per inch
    page.emulate_media(media="print")
    ends = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect())"
        ".filter(b => b.width).map(b => [b.left, b.right])"
    )
    assert ends
    assert all(0 <= left < right <= 719 for left, right in ends)
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_figures_are_files(summary: Summary, tmp_path: Path) -> None:
    written = {path.name for path in report_page.write_figures(summary, tmp_path / "figures")}
    for name in ("tasks", "candidates", "convergence", "genome", "spending"):
        assert {f"{name}.svg", f"{name}.png", f"{name}.csv"} <= written
    picture = (tmp_path / "figures" / "card.png").read_bytes()
    size = int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")
    assert size == (1200, 630)
    drawn = (tmp_path / "figures" / "tasks.svg").read_text()
    assert "var(" not in drawn
    lines = (tmp_path / "figures" / "tasks.csv").read_text().splitlines()
    assert lines[0] == 'category,series,"score on test, %",low,high'
    assert len(lines) == 1 + 4 * len(summary.shown_tasks)
