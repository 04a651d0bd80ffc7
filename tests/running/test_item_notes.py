"""A run says in its log and report which items were left out as near duplicates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery import check
from evomerge.delivery.notes import notes
from evomerge.delivery.progress import Silent
from evomerge.delivery.summary import Summary
from evomerge.prepare import prepare
from evomerge.running import looks
from evomerge.running.worker import item_notes
from evomerge.stored import StoredRun


@pytest.mark.end_to_end
def test_log_and_report_name_the_number(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(generate=False, budget={"generations": 1}, racing={"blocks": 1})
    suite = yaml.safe_load((tmp_path / "suite.yaml").read_text())
    words = [" ".join(str(n + k) for k in range(30)) for n in range(0, 1200, 30)]
    rows = [{"q": f"{text}{end}", "o": ["a", "b"], "a": "a"} for text in words for end in ("", " x")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"data": "own.jsonl", "prompt": "q", "answer": "a", "choices": "o"}
    suite["tasks"] = [*suite["tasks"][:2], own]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    compose.start(RunConfig.load(path), Silent())
    with StoredRun.read(tmp_path / "run") as run:
        (sentence,) = [
            note for note in notes(Summary(run)) if note.startswith("own: ") and "search items" in note
        ]
    assert "search items are near duplicates of items in a later split" in sentence
    logs = "".join(file.read_text() for file in (tmp_path / "run").glob("*log*") if file.is_file())
    assert sentence in logs
    assert looks.runs_on_the_test_of(tmp_path / "run") == 1
    harness_notes = item_notes(prepare(RunConfig.load(path)).worker)
    assert sentence in harness_notes
    assert sentence in check.asked(prepare(RunConfig.load(path))).notes
