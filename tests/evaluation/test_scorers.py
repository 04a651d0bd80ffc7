"""A user's scorer: the documented example, what it may return, and what happens when it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ConfigError
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.permissions import NOTHING, Permissions
from evomerge.evaluation.scorers import AnswerScorer
from evomerge.evaluation.suite import Suite

DOCS = Path(__file__).parents[2] / "docs" / "your_data.md"
TRUSTED = Permissions(trust_tasks=True)


def code_file(folder: Path, code: str) -> str:
    (folder / "mine.py").write_text(code)
    return f"{folder / 'mine.py'}:score"


def scored(folder: Path, body: str, **options: Any) -> dict[str, float]:
    return AnswerScorer(
        "t", code_file(folder, f"def score(answer, item):\n    {body}\n"), TRUSTED, **options
    )("x y", {"n": 2})


def test_what_a_scorer_may_return(tmp_path: Path) -> None:
    assert scored(tmp_path, "return len(answer.split()) / item['n']") == {"score": 1.0}
    assert scored(tmp_path, "return {'a': True, 'b': 0.5}") == {"a": 1.0, "b": 0.5}
    assert scored(tmp_path, "import numpy; return numpy.float32(0.5)") == {"score": 0.5}
    assert scored(tmp_path, "print('noise'); return 1") == {"score": 1.0}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('k')", "the scorer mine.py:score: KeyError: 'k'"),
        ("return 'good'", "returned 'good' for 'score'"),
        ("return None", "returned 'None' for 'score'"),
        ("return float('nan')", "expected a finite number"),
        ("return {'a': [1]}", "for 'a'; expected a finite number"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import os; os._exit(1)", "the scorer mine.py:score ended its process"),
    ],
)
def test_what_is_an_error(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        scored(tmp_path, body)


def test_a_call_that_hangs_is_ended_and_the_next_one_works(tmp_path: Path) -> None:
    code = "def score(answer, item):\n    while answer == 'hang':\n        pass\n    return 1\n"
    scorer = AnswerScorer("t", code_file(tmp_path, code), TRUSTED, seconds=0.5)
    with pytest.raises(ValueError, match=r"took more than 0\.5 seconds"):
        scorer("hang", {})
    assert AnswerScorer("t", code_file(tmp_path, code), TRUSTED)("go on", {}) == {"score": 1.0}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module", "ModuleNotFoundError"),
        ("score = 1", "score is no function"),
        ("def other(): ...", "has no attribute 'score'"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_code_that_cannot_be_loaded(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(ConfigError, match="can't be loaded") as caught:
        AnswerScorer("t", code_file(tmp_path, code), TRUSTED)("", {})
    assert message in str(caught.value.got)


def test_a_scorer_runs_only_with_permission(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would run Python code"):
        AnswerScorer("t", code_file(tmp_path, "open('ran', 'w')"), NOTHING)


def suite(folder: Path, code: str, **entry: Any) -> Suite:
    (folder / "words.py").write_text(code)
    rows = [{"task": f"a b {n}", "words": "a b"} for n in range(40)]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"data": "stories.jsonl", "prompt": "task", "answer": "words", "scorer": "words.py:score"}
    data = {"name": "own", "gen_kwargs": {"max_gen_toks": 2}, "tasks": [task | entry]}
    return Suite.from_mapping(data, folder=folder, where="suite.yaml")


def test_the_documented_example_runs(tmp_path: Path, tokenizer: Any, model: Any) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    own = suite(tmp_path, code)
    harness = Harness(own, tokenizer=tokenizer, batch_size=16, max_length=None, permissions=TRUSTED)
    (scores,) = harness.evaluate(model, harness.items("test"))
    assert set(scores.metric) <= {0.0, 0.5, 1.0}
    with pytest.raises(ConfigError, match="would run Python code"):
        Harness(own, tokenizer=tokenizer, batch_size=16, max_length=None)


def test_a_scorer_that_fails_on_the_empty_answer_is_refused_before_a_model_is_loaded(
    tmp_path: Path, tokenizer: Any
) -> None:
    own = suite(tmp_path, "def score(answer, item):\n    return answer.split()[0] == 'a'\n")
    with pytest.raises(ConfigError, match="can't process a result") as caught:
        Harness(own, tokenizer=tokenizer, batch_size=16, max_length=None, permissions=TRUSTED)
    assert "IndexError" in str(caught.value.got)


def test_a_later_error_is_the_candidates(tmp_path: Path, tokenizer: Any, model: Any) -> None:
    own = suite(tmp_path, "def score(answer, item):\n    return 1 if not answer else 1 / 0\n")
    harness = Harness(own, tokenizer=tokenizer, batch_size=16, max_length=None, permissions=TRUSTED)
    with pytest.raises(ConfigError, match=r"failed on item 0: ValueError: the scorer words.py:score: Zero"):
        harness.evaluate(model, harness.items("test"))


def test_a_metric_that_the_scorer_lacks_is_named(tmp_path: Path, tokenizer: Any) -> None:
    own = suite(tmp_path, "def score(answer, item):\n    return {'good': 1, 'short': 0}\n", metric="goood")
    with pytest.raises(ConfigError, match="did you mean 'good'"):
        Harness(own, tokenizer=tokenizer, batch_size=16, max_length=None, permissions=TRUSTED)


def test_what_a_scorer_imports_belongs_to_the_suite(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("X = 1\n")
    own = suite(tmp_path, "import helper\ndef score(answer, item):\n    return 1\n")
    assert set(own.files()) == {"stories.jsonl", "words.py", "helper.py"}
    before = own.digest()
    (tmp_path / "helper.py").write_text("X = 2\n")
    assert own.digest() != before
