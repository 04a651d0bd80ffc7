"""A judge behind an OpenAI-compatible server: what it is asked, what is kept, and when it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from evomerge.errors import ConfigError, JudgeError
from evomerge.evaluation import judge as judge_module
from evomerge.evaluation.judge import FILE, Judge, Judgements, serving, spent_in
from evomerge.evaluation.judge_spec import JudgeSpec
from evomerge.evaluation.permissions import NOTHING, Permissions
from evomerge.evaluation.suite import Suite
from evomerge.prepare import with_judges
from evomerge.running.store import StoreReader
from evomerge.zoo.skills import vocabulary
from tests.conftest import config_data
from tests.evaluation import judge_stand_in
from tests.evaluation.judge_stand_in import KEY, MODEL, JudgeServer
from tests.test_cli import everything_in, invoke, refuse, succeed

ALLOWED = Permissions(ask_judges=True)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setattr(judge_module, "FIRST_WAIT", 0.0)
    with judge_stand_in.serving() as running:
        yield running


def spec_of(server: JudgeServer, **changes: Any) -> JudgeSpec:
    return JudgeSpec(url=server.url, model=MODEL, **changes)


def judge_of(server: JudgeServer, **changes: Any) -> Judge:
    return Judge("t", spec_of(server, **changes), ALLOWED)


def answers(*texts: str) -> list[tuple[str, str, str, dict[str, Any]]]:
    return [("What?", text, "right", {"n": 2}) for text in texts]


def test_what_a_judge_is_asked_and_what_its_verdict_is_worth(server: JudgeServer) -> None:
    judge = judge_of(server, scale=(0, 5), max_tokens=40, prompt="{{prompt}}/{{answer}}/{{right}}/{{item.n}}")
    server.judge = lambda question: "Well. **Score:** 4/5"
    assert judge("What?", "an answer", "right", {"n": 2}) == 0.8
    (body,) = server.asked
    assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == (MODEL, 0, 0, 40)
    (message,) = body["messages"]
    assert message["content"].startswith("What?/an answer/right/2\n")
    assert "from 0 (worst) to 5 (best)" in message["content"]


def test_an_answer_is_judged_once(server: JudgeServer, tmp_path: Path) -> None:
    judge = judge_of(server)
    judge.keep_in(tmp_path)
    assert judge.ahead(answers("a b", "a b c", "a b", "", "  ")) == [0.2, 0.3, 0.2, 0.0, 0.0]
    assert len(server.asked) == 2
    server.judge = lambda question: "Score: 9"
    again = judge_of(server, parallel=1, timeout=5, most_requests=3)  # the same judge, reached in another way
    again.keep_in(tmp_path)
    assert again.ahead(answers("a b c", "a b", "new")) == [0.3, 0.2, 0.9]
    assert len(server.asked) == 3
    other = judge_of(server, scale=(0, 20))
    other.keep_in(tmp_path)
    assert other.ahead(answers("a b")) == [0.45]
    spent = spent_in(tmp_path, spec_of(server))
    assert spent is not None
    assert (spent.requests, spent.verdicts, spent.unreadable, spent.tokens) == (3, 3, 0, 321)


@pytest.mark.parametrize("verdict", ["", "Score: 11", "Score: -1", "either 3 or 4", "good", "Score: high"])
def test_a_verdict_without_a_score_counts_nothing_and_is_counted(server: JudgeServer, verdict: str) -> None:
    server.judge = lambda question: verdict
    judge = judge_of(server)
    assert judge.ahead(answers("a", "a")) == [0.0, 0.0]
    spent = judge.kept.spent(spec_of(server).hash)
    assert (spent.verdicts, spent.unreadable) == (1, 1)
    assert len(server.asked) == 1


def test_requests_are_sent_together_and_results_keep_their_order(server: JudgeServer) -> None:
    server.delay = 0.2
    texts = [" ".join(["w"] * count) for count in (7, 1, 5, 3, 2, 6, 4, 8)]
    assert judge_of(server, parallel=4).ahead(answers(*texts)) == [len(t.split()) / 10 for t in texts]
    assert 1 < server.most <= 4


def test_passing_faults_are_tried_again_and_lasting_ones_end_it(server: JudgeServer) -> None:
    server.failing = 2
    judge = judge_of(server, parallel=1)
    assert judge.ahead(answers("a")) == [0.1]
    assert judge.kept.spent(spec_of(server).hash).requests == 3
    server.failing = 100
    with pytest.raises(JudgeError, match="can't be asked") as caught:
        judge.ahead(answers("b"))
    assert "503" in str(caught.value)
    gone = JudgeSpec(url="http://127.0.0.1:9/v1", model=MODEL)
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9/v1 can't be asked"):
        serving("t", gone, ALLOWED)
    server.delay, server.failing = 0.5, 0
    with pytest.raises(JudgeError, match="Timeout"):
        judge_of(server, timeout=0.05).ahead(answers("c"))


def test_what_was_judged_before_a_fault_is_kept(server: JudgeServer) -> None:
    judge = judge_of(server, parallel=1, most_requests=2)
    with pytest.raises(JudgeError, match="asked 2 times, its limit") as caught:
        judge.ahead(answers("a", "b", "c"))
    assert "raise most_requests" in str(caught.value)
    assert judge.ahead(answers("a", "b")) == [0.1, 0.1]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((200, {"choices": []}), "in a form that is not OpenAI's"),
        ((200, [1]), "in a form that is not OpenAI's"),
        ((404, {"error": "no such model"}), "status 404"),
        ((302, "http://127.0.0.1:9/elsewhere"), "status 302"),
    ],
)
def test_other_replies_are_one_message(server: JudgeServer, reply: tuple[int, Any], message: str) -> None:
    server.answer = lambda *_: reply  # type: ignore[method-assign]
    with pytest.raises(JudgeError, match=message):
        judge_of(server).ahead(answers("a"))


def test_another_model_behind_the_name_is_refused(server: JudgeServer) -> None:
    judge = judge_of(server)
    judge.ahead(answers("a"))
    server.model = "judge-8b"
    with pytest.raises(JudgeError, match="another model answers") as caught:
        judge.ahead(answers("b"))
    assert f"expected: {MODEL}" in str(caught.value)
    with pytest.raises(ConfigError, match=f"does not serve the judge '{MODEL}'"):
        serving("t", spec_of(server), ALLOWED)


def test_a_judge_is_asked_only_with_permission_and_its_key(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="to a judge") as caught:
        Judge("t", spec_of(server, key="MY_KEY"), NOTHING)
    for part in (server.url, "$MY_KEY", "--ask-judges"):
        assert part in str(caught.value)
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="the judge's key is not set"):
        Judge("t", spec_of(server, key="MY_KEY"), ALLOWED)
    server.key = KEY
    with pytest.raises(JudgeError, match="status 401"):
        judge_of(server).ahead(answers("a"))
    monkeypatch.setenv("MY_KEY", f"{KEY}x")
    with pytest.raises(JudgeError) as caught_error:
        judge_of(server, key="MY_KEY").ahead(answers("a"))
    assert KEY not in str(caught_error.value)
    monkeypatch.setenv("MY_KEY", KEY)
    assert judge_of(server, key="MY_KEY").ahead(answers("a")) == [0.1]
    assert serving("t", spec_of(server, key="MY_KEY"), ALLOWED)["root"] == server.root


def test_verdicts_in_memory_move_to_the_run_folder(server: JudgeServer, tmp_path: Path) -> None:
    judge = judge_of(server)
    judge.keep_in(tmp_path / "run")
    judge.ahead(answers("a b"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    judge.ahead(answers("c"))
    kept = Judgements(tmp_path / "run").spent(spec_of(server).hash)
    assert (kept.verdicts, kept.requests) == (2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "localhost:8000"}, "http://127.0.0.1:8000/v1"),
        ({"url": "https://ann:pw@host/v1"}, "holds a secret"),
        ({"prompt": "{{ answer"}, "not a valid jinja text"),
        ({"prompt": "Is it good?"}, "{{ answer }}"),
        ({"scale": [5, 1]}, "the worst below the best"),
        ({"key": "sk-abc"}, "judge.key"),
        ({"scorer": "x.py:f"}, "remove choices and scorer"),
        ({"metric": "exact"}, "a judge's metric is 'score'"),
    ],
)
def test_mistakes_in_a_suite(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "q.jsonl").write_text("")
    outside = {key: changes.pop(key) for key in ("scorer", "metric") if key in changes}
    judge = {"url": "http://127.0.0.1:8000/v1", "model": "m", **changes}
    task = {"data": "q.jsonl", "prompt": "q", "answer": "a", "judge": judge, **outside}
    with pytest.raises(ConfigError) as caught:
        Suite.from_mapping({"name": "s", "tasks": [task]}, folder=tmp_path, where="s.yaml")
    assert message in str(caught.value)


def test_a_suite_is_the_same_wherever_its_judge_is(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"q": "x", "a": "y"}\n')

    def digest(**changes: Any) -> str:
        judge = {"url": "http://127.0.0.1:8000/v1", "model": "m", **changes}
        task = {"data": "q.jsonl", "prompt": "q", "answer": "a", "judge": judge}
        return Suite.from_mapping({"name": "s", "tasks": [task]}, folder=tmp_path, where="s.yaml").digest()

    first = digest()
    assert digest(url="http://other:1/v1", key="K", parallel=2, timeout=3, most_requests=9) == first
    for changes in ({"model": "n"}, {"scale": [1, 5]}, {"prompt": "{{answer}}?"}, {"max_tokens": 5}):
        assert digest(**changes) != first


@pytest.fixture
def judged(tiny_zoo: Path, tmp_path: Path, server: JudgeServer) -> Callable[..., Path]:
    """Write a config whose suite has a judge; keyword arguments are keys of the judge."""

    def write(**judge: Any) -> Path:
        words = [word for word in vocabulary() if word.isalpha() and len(word) > 2][:18]
        rows = [{"q": f"upper {word} =", "a": word.upper()} for word in words]
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = {"url": server.url, "model": MODEL, "key": "MY_KEY", **judge}
        task = {"data": "q.jsonl", "prompt": "q", "answer": "a", "judge": entry}
        suite = {"name": "judged", "tasks": [{**task, "gen_kwargs": {"max_gen_toks": 6}}]}
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
        few = {"baselines": ["TIES"], "budget": {"generations": 1}}
        data = config_data(tiny_zoo, tmp_path, racing={"blocks": 1}, **few)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


@pytest.mark.end_to_end
def test_a_run_with_a_judge(
    judged: Callable[..., Path], server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `check` says, what a run stores and shows, and that nothing is asked twice."""
    monkeypatch.setenv("MY_KEY", KEY)
    server.key = KEY
    config = judged()
    assert "to a judge" in refuse("check", config, folder=tmp_path)
    said = succeed("check", config, "--ask-judges")
    assert f"are sent to {server.url}, where {MODEL} judges them (key in $MY_KEY)" in " ".join(said.split())
    assert "requests, with replies of at most 512 tokens" in " ".join(said.split())
    asked = succeed("run", config, "--ask-judges")
    assert f"judged by {MODEL}" in " ".join(asked.split())
    run = tmp_path / "run"
    assert (run / FILE).is_file()
    assert not any(KEY.encode() in content for content in everything_in(run).values())
    with StoreReader.read(run) as store:
        first = store.digest()
    count = len(server.asked)
    succeed("resume", run, "--ask-judges")
    succeed("export", run, tmp_path / "model", "--ask-judges")
    succeed("evaluate", tmp_path / "model", "--run", run, "--ask-judges")
    assert len(server.asked) == count
    with StoreReader.read(run) as store:
        assert store.digest() == first
    server.root = "/models/another"
    assert "another judge than the run began with" in refuse("resume", run, "--ask-judges", folder=tmp_path)
    server.model = "other"
    assert "does not serve the judge" in refuse("resume", run, "--ask-judges", folder=tmp_path)


@pytest.mark.end_to_end
def test_a_run_whose_judge_goes_away_stops_and_goes_on(
    judged: Callable[..., Path], server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the judge is no candidate's failure: the resumed run ends as an unbroken one."""
    monkeypatch.setenv("MY_KEY", KEY)
    config = judged()
    succeed("run", config, "--ask-judges", "--out", tmp_path / "whole")
    server.last = len(server.asked) + len(server.asked) * 2 // 3
    stopped = invoke("run", config, "--ask-judges")
    assert stopped.exit_code == 2
    assert "can't be asked (5 attempts)" in " ".join(stopped.output.split())
    server.last = 10**9
    succeed("resume", tmp_path / "run", "--ask-judges")
    digests = []
    for name in ("whole", "run"):
        with StoreReader.read(tmp_path / name) as store:
            assert not store.failures()
            digests.append(store.digest())
    assert digests[0] == digests[1]


def test_judges_need_a_run_folder_that_workers_share(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"q": "x", "a": "y"}\n')
    judge = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    task = {"data": "q.jsonl", "prompt": "q", "answer": "a", "judge": judge}
    suite = Suite.from_mapping({"name": "s", "tasks": [task]}, folder=tmp_path, where="s.yaml")
    config = SimpleNamespace(executor=SimpleNamespace(name="ray"), permissions=ALLOWED)
    prepared: Any = SimpleNamespace(suite=suite, config=config)
    with pytest.raises(ConfigError, match="workers on a Ray cluster don't share"):
        with_judges(prepared)
