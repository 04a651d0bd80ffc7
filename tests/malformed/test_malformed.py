"""Malformed inputs are one message with exit code 2: a part of the corpus here, all of it in `make fuzz`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.malformed import fuzz, runner
from tests.malformed.workspace import write_valid

PART = 300
"""One in so many commands is run here."""


@pytest.mark.end_to_end
def test_malformed_inputs_are_one_message_and_exit_code_2() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.malformed.runner", "--every", str(PART)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    lines = run.stdout.strip().splitlines()
    assert lines, run.stderr
    assert json.loads(lines[-1])["problems"] == []
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("parser", fuzz.PARSERS)
def test_nothing_but_messages_escapes_a_parser(parser: str, tmp_path: Path) -> None:
    write_valid(tmp_path)
    count, accepted, _ = fuzz.fuzz(parser, tmp_path, 12, reproducible=True)
    assert count >= 10
    assert accepted < count


def test_the_corpus_is_large_and_its_names_are_different() -> None:
    names = Counter((case.kind, case.name) for case in runner.cases())
    assert [name for name, count in names.items() if count > 1] == []
    assert len(names) >= 500
