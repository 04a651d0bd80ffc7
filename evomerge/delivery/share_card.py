"""A picture of 1200 x 630 pixels that says how a run ended: for a message or a post."""

from __future__ import annotations

from evomerge.delivery.charts.canvas import Canvas, Scale, shortened
from evomerge.delivery.charts.chart import standalone
from evomerge.delivery.style import bounds, difference, percent, short_task
from evomerge.delivery.summary import Summary

WIDTH, HEIGHT, MARGIN = 1200, 630, 60
TASKS = 6
"""Most tasks on the card; the ones with the largest differences."""

_COLOURS = {"green": "green", "amber": "orange", "red": "red"}


def svg(summary: Summary) -> str | None:
    """Return the card as an SVG file, or None where the run has no verdict yet."""
    rows = summary.rows()
    verdict, best = summary.verdict(rows), summary.best_baseline(rows)
    winner = next((row for row in rows if row.role == "winner"), None)
    if verdict is None or best is None or winner is None:
        return None
    canvas = Canvas(WIDTH)
    canvas.rectangle(0, 0, 18, HEIGHT, _COLOURS[verdict.level])
    canvas.text(MARGIN, 84, shortened(summary.store.folder.name, 700, 40), size=40, bold=True)
    sources = ", ".join(parent.name for parent in summary.parents[1:])
    canvas.text(MARGIN, 126, shortened(f"merge of {sources}", 1080, 24), size=24, colour="muted")
    head = f"{difference(verdict.test.estimate)} points {bounds(verdict.test.low, verdict.test.high)}"
    canvas.text(MARGIN, 206, head, size=52, bold=True, colour=_COLOURS[verdict.level])
    beside = f"over the best baseline ({verdict.rival}) on {verdict.items} test items; 95 % interval"
    canvas.text(MARGIN, 244, shortened(beside, 1080, 22), size=22, colour="muted")
    _bars(canvas, summary, verdict.tasks)
    legend = (("winner", "accent"), (f"best baseline: {best.name}", "orange"))
    x = MARGIN
    for text, colour in legend:
        canvas.rectangle(x, HEIGHT - 52, 20, 20, colour)
        canvas.text(x + 30, HEIGHT - 35, shortened(text, 420, 20), size=20, colour="muted")
        x += 60 + 11 * min(len(text), 40)
    canvas.text(WIDTH - MARGIN, HEIGHT - 35, "evomerge", size=22, bold=True, anchor="end", colour="muted")
    return standalone(canvas.drawing(HEIGHT), f"{summary.store.folder.name}: {verdict.sentence}")


def _bars(canvas: Canvas, summary: Summary, results: object) -> None:
    """Draw two bars per task: the winner's raw score and the best baseline's."""
    assert isinstance(results, tuple)
    shown = sorted(results, key=lambda r: -abs(r.test.estimate))[:TASKS]
    shown = [result for result in results if result in shown]
    top, bottom = 276, HEIGHT - 78
    pitch = min(62.0, (bottom - top) / max(len(shown), 1))
    across = Scale(low=0.0, high=1.0, start=330, end=WIDTH - MARGIN - 80)
    for number, result in enumerate(shown):
        y, height = top + pitch * number, pitch * 0.36
        name = short_task(result.task, summary.suite.name)
        canvas.text(310, y + height + 7, shortened(name, 240, 22), size=22, anchor="end")
        for row, (score, colour) in enumerate(((result.winner, "accent"), (result.rival, "orange"))):
            share = min(max(score, 0.0), 1.0)
            line = y + row * height
            canvas.rectangle(across.start, line, max(across.at(share) - across.start, 2), height - 2, colour)
            canvas.text(
                across.at(share) + 8, line + height - 4, f"{percent(score, 0)} %", size=16, colour="muted"
            )
