"""Names of models, tasks and runs that mean something to Markdown, YAML, HTML or a terminal."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge import compose
from evomerge.cli.terminal import SafeConsole
from evomerge.config import RunConfig
from evomerge.delivery import report, report_page
from evomerge.delivery.card import card, code
from evomerge.delivery.origins import origins
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.running.log import TEXT
from evomerge.stored import StoredRun
from tests.conftest import config_data, write_suite

UPPER = "up|per`</script><b>x</b>*[red]\x1b[31m\u202e"
REVERSE = "re: - {verse}\n| # a [x](http://y) :warning: \x07&lt;"


@pytest.fixture(scope="module")
def opened(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run whose sources, suite and folder have such names."""
    folder = tmp_path_factory.mktemp("names") / "ru|n`<i>\x1b[2J"
    folder.mkdir()
    write_suite(folder, generate=False, name="su|ite`<img src=x>\x1b[31m", about="\x9b")
    data = config_data(tiny_zoo, folder, budget={"generations": 1})
    data["models"]["sources"] = {UPPER: str(tiny_zoo / "upper"), REVERSE: str(tiny_zoo / "reverse")}
    data["racing"] = "off"
    data["suite"], data["out"] = "suite.yaml", "run"
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    for task in suite["tasks"]:
        task["specialist"] = {"upper": UPPER, "reverse": REVERSE}.get(task.get("specialist", ""))
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    (folder / "config.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    config = RunConfig.load(folder / "config.yaml", out=str(folder / "run"))
    compose.start(config, Silent())
    with StoredRun.read(folder / "run") as stored:
        yield Summary(stored)


def test_the_model_card(opened: Summary) -> None:
    assert opened.winner is not None
    text = card(opened, opened.winner, origins(opened.winner.recipe, {}))
    text.encode()
    _, header, body = text.split("---\n", 2)
    front = yaml.safe_load(header)
    assert list(front) == ["library_name", "pipeline_tag", "tags", "model-index"]  # no hub ids, so no base
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)
    assert "``su|ite`<img src=x>" in body
    outside_code = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", body)
    assert not re.search(r"(?<!\\)<|(?<!\\)\]\(", outside_code)
    for line in body.splitlines():
        if line.startswith("| "):  # a table's row: its columns are those of the head
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4 + len(opened.shown_tasks))


@pytest.mark.parametrize("text", ["a", "a`b", "``", "`a", "a|b", "a\nb", "\x1b"])
def test_code_spans_cannot_be_left(text: str) -> None:
    span = code(text, cell=True)
    fence = re.match("`+", span)
    assert fence is not None
    inside = span[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inside)
    assert "\n" not in span
    assert not re.search(r"(?<!\\)\|", span)


def test_the_report_page(opened: Summary, tmp_path: Path) -> None:
    page = report_page.write_html(opened, tmp_path / "report.html").read_text(encoding="utf-8")
    content, _, script = page.rpartition("<script>")
    for harmful in ("<b>x", "<img", "<i>", "\x1b", "\x07", "\u202e"):
        assert harmful not in content
    assert page.count("</script>") == 2
    assert "\\u200b" not in content  # nothing of our own is written out
    assert "&lt;b&gt;x" in content
    assert "innerHTML" not in script


def test_the_terminal(opened: Summary) -> None:
    file = io.StringIO()
    SafeConsole(file=file, width=400).print(report.terminal(opened, width=400))
    text = file.getvalue()
    text.encode()
    assert "[red]" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)


def test_json(opened: Summary) -> None:
    text = json.dumps(report.as_data(opened))
    assert json.dumps(UPPER)[1:-1] in text
    text.encode()


def test_the_log(opened: Summary) -> None:
    text = (opened.run.folder / TEXT).read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert all(re.match(r"\d{4}-", line) for line in text.splitlines())
