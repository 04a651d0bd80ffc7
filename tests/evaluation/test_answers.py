"""Tasks that execute answers: each answer is scored, and none of them harms the worker."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import ConfigError
from evomerge.evaluation import answers, sandbox
from evomerge.evaluation.permissions import Permissions
from evomerge.evaluation.tasks import build
from tests.evaluation.test_permissions import LM, suite, write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are Linux's")
TRUSTED = Permissions(trust_tasks=True)
ALLOWED = Permissions(trust_tasks=True, allow_code_execution=True)
EXECUTING = """
def results(doc, answers):
    scope = {}
    exec(answers[0], scope)
    return {"exact_match": scope["answer"]}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = write(tmp_path / "tasks", "process_results: !function helpers.results\nunsafe_code: true\n")
    (folder / "helpers.py").write_text(EXECUTING)
    return folder


def test_answers_are_not_executed_without_permission(tasks: Path) -> None:
    with pytest.raises(ConfigError, match=r"executes the models' answers(.|\n)*allow_code_execution"):
        build(suite(tasks), lm=LM, seed=0, permissions=TRUSTED)
    with pytest.raises(ConfigError, match="would run Python code"):
        build(suite(tasks), lm=LM, seed=0, permissions=Permissions(allow_code_execution=True))


@pytest.mark.end_to_end
def test_answers_are_scored_and_bad_ones_score_zero(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a server of theirs that was killed is started again."""
    monkeypatch.setenv("SOME_API_KEY", "s3cret")
    servers: list[Any] = []
    started = answers.IsolatedMetrics._started

    def noted(self: answers.IsolatedMetrics) -> Any:
        servers.append(started(self))
        return servers[-1]

    monkeypatch.setattr(answers.IsolatedMetrics, "_started", noted)
    (builder,) = build(suite(tasks), lm=LM, seed=0, permissions=ALLOWED)
    process = builder.requests("test").process_results

    def score(answer: str) -> float:
        return float(process({"prompt": "a"}, [answer])["exact_match"])

    assert score("answer = 1.0") == 1.0
    assert score("answer = True") == 1.0
    assert score("import os; answer = float('SOME_API_KEY' in os.environ)") == 0.0
    bad = [
        "",
        "answer = float('nan')",
        "answer = 'text'",
        "import sys; sys.exit()",
        "import os; os._exit(0)",
        "print('{\"exact_match\": 1.0}')",
        "import os\nwhile os.fork(): break\nos._exit(0)",
        "import ctypes; ctypes.string_at(0)",
        "answer = len(bytearray(2 ** 34))",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL); os._exit(0)",
    ]
    assert [score(answer) for answer in bad] == [0.0] * len(bad)
    assert score("answer = 1.0") == 1.0
    assert "SOME_API_KEY" in os.environ
    count = len(servers)
    os.kill(servers[-1].pid, signal.SIGKILL)
    assert score("answer = 1.0") == 1.0
    assert len(servers) == count + 1


def test_a_task_that_hides_that_it_executes_answers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the user's environment allows the library `evaluate` to execute them."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    folder = write(tmp_path / "tasks", "process_results: !function helpers.results\n")
    (folder / "helpers.py").write_text(
        "import os\n"
        "def results(doc, answers):\n"
        "    if os.getenv('HF_ALLOW_CODE_EVAL', 0) != '1':\n"
        "        raise ValueError('set the environment variable HF_ALLOW_CODE_EVAL=\"1\"')\n"
        "    return {'exact_match': 1.0}\n"
    )
    for permissions in (TRUSTED, ALLOWED):
        with pytest.raises(ConfigError, match="does not say so"):
            build(suite(folder), lm=LM, seed=0, permissions=permissions)


def test_a_class_can_say_that_it_executes_answers(tasks: Path) -> None:
    (tasks / "helpers.py").write_text(
        "from lm_eval.api.task import ConfigurableTask\n"
        "class Own(ConfigurableTask):\n"
        "    UNSAFE_CODE = True\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config={k: v for k, v in config.items() if k != 'class'})\n"
    )
    text = (tasks / "write.yaml").read_text().replace("unsafe_code: true\n", "class: !function helpers.Own\n")
    (tasks / "write.yaml").write_text(text.replace("process_results: !function helpers.results\n", ""))
    with pytest.raises(ConfigError, match="UNSAFE_CODE of its class"):
        build(suite(tasks), lm=LM, seed=0, permissions=TRUSTED)


@pytest.mark.end_to_end
def test_unknown_metrics_are_still_found(tasks: Path) -> None:
    wrong: Any = suite(tasks).model_dump()
    wrong["tasks"][0]["metric"] = "exact_mach"
    with pytest.raises(ConfigError, match="did you mean 'exact_match'"):
        build(type(suite(tasks)).model_validate(wrong), lm=LM, seed=0, permissions=ALLOWED)


def test_the_limits_are_what_the_documentation_says() -> None:
    text = Path("docs/security.md").read_text(encoding="utf-8")
    limits = (
        f"{sandbox.CPU_SECONDS} seconds of processor time",
        f"{sandbox.WALL_SECONDS:g} seconds of wall time",
        f"{sandbox.MEMORY // 2**30} GiB of memory",
        f"{sandbox.FILE_SIZE // 2**20} MiB per file",
        f"{sandbox.PROCESSES} processes",
    )
    assert [limit for limit in limits if limit not in text] == []


@pytest.mark.end_to_end
def test_metrics_of_the_library_evaluate_work_in_the_sandbox(tasks: Path) -> None:
    """They write their cache; the folder is open to the sandbox."""
    (tasks / "own").mkdir()
    (tasks / "own" / "own.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Own(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        value = datasets.Value('string')\n"
        "        features = datasets.Features({'predictions': value, 'references': value})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        scope = {}\n"
        "        exec(predictions[0], scope)\n"
        "        return {'exact_match': float(str(scope['answer']) == references[0])}\n"
    )
    (tasks / "helpers.py").write_text(
        "import evaluate\n"
        "from pathlib import Path\n"
        "own = evaluate.load(str(Path(__file__).with_name('own')))\n"
        "def results(doc, answers):\n"
        "    return own.compute(predictions=answers, references=['1'])\n"
    )
    metrics = answers.IsolatedMetrics(suite(tasks), "write", ALLOWED, ["exact_match"])
    scores = [metrics({}, [answer])["exact_match"] for answer in ("answer = 1", "answer = 2", "answer =")]
    assert scores == [1.0, 0.0, 0.0]
