"""Judges: a model behind an OpenAI-compatible server scores answers. It is asked only with permission.

Every verdict is kept by a hash of judge and question (which holds the prompt and the answer), in the run
folder's `judgements.sqlite`. So an answer that was judged once keeps its score, in a resumed run and for an
export. Requests of a block of items are sent together, by threads; results do not depend on their order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jinja2
import tenacity

from evomerge.errors import ConfigError, JudgeError, nearest
from evomerge.evaluation.judge_spec import SEED, JudgeSpec
from evomerge.evaluation.permissions import Permissions

FILE = "judgements.sqlite"
ATTEMPTS = 5
"""Attempts for one request: others follow time-outs, broken connections, and answers that say "later"."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
"""Seconds before the second attempt, doubled before each further one, up to the longest."""
LATER = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which a request is sent again."""
LARGEST_REPLY = 2**20
"""Characters of a verdict that are read."""
_TABLES = """
CREATE TABLE IF NOT EXISTS judgement (
    key TEXT PRIMARY KEY, judge TEXT NOT NULL, verdict TEXT NOT NULL, score REAL,
    prompt_tokens INTEGER NOT NULL, reply_tokens INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS judge (judge TEXT PRIMARY KEY, served TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sent (judge TEXT PRIMARY KEY, requests INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A judge's reply. score: from 0 to 1, None where it has none. Tokens as the server counts them."""

    text: str
    score: float | None
    prompt_tokens: int = 0
    reply_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCost:
    """What a judge was asked so far. unreadable: verdicts without a score, which count 0."""

    requests: int
    verdicts: int
    unreadable: int
    tokens: int


class Judgements:
    """Verdicts by hash: in a file of the run folder, or in memory where there is no folder (yet).

    folder: of the run; None keeps verdicts in memory only.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._kept = False

    def find(self, key: str) -> Judgement | None:
        """Return a verdict, None where there is none."""
        with self._writing() as db:
            row = db.execute(
                "SELECT verdict, score, prompt_tokens, reply_tokens FROM judgement WHERE key = ?", (key,)
            ).fetchone()
        if row is None:
            return None
        return Judgement(text=row[0], score=row[1], prompt_tokens=row[2], reply_tokens=row[3])

    def keep(self, key: str, judge: str, verdict: Judgement) -> None:
        """Store a verdict; the first one of a key stays."""
        row = (key, judge, verdict.text, verdict.score, verdict.prompt_tokens, verdict.reply_tokens)
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO judgement VALUES (?, ?, ?, ?, ?, ?)", row)

    def served(self, judge: str, model: str) -> str:
        """Return the model that served a judge's first reply; this one, if it is the first."""
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO judge VALUES (?, ?)", (judge, model))
            return str(db.execute("SELECT served FROM judge WHERE judge = ?", (judge,)).fetchone()[0])

    def reserve(self, judge: str, most: int) -> bool:
        """Count one more request; return False, and count nothing, where it would be one too many."""
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO sent VALUES (?, 0)", (judge,))
            done = db.execute(
                "UPDATE sent SET requests = requests + 1 WHERE judge = ? AND requests < ?", (judge, most)
            )
            return done.rowcount == 1

    def spent(self, judge: str) -> JudgeCost:
        """Return what a judge was asked."""
        with self._writing() as db:
            return _spent(db, judge)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One thread's transaction after the other: they share the connection."""
        with self._lock, self._open() as db:
            yield db

    def _open(self) -> sqlite3.Connection:
        """Return the database; what was kept in memory moves to the run folder as soon as there is one."""
        there = self.folder is not None and self.folder.is_dir()
        if self._db is not None and self._kept == there:
            return self._db
        place = str(self.folder / FILE) if there and self.folder is not None else ":memory:"
        db = sqlite3.connect(place, timeout=60, check_same_thread=False)
        db.executescript(_TABLES)
        if self._db is not None:
            for table, marks in (("judgement", "?, ?, ?, ?, ?, ?"), ("judge", "?, ?"), ("sent", "?, ?")):
                with db:
                    db.executemany(
                        f"INSERT OR IGNORE INTO {table} VALUES ({marks})",
                        self._db.execute(f"SELECT * FROM {table}").fetchall(),
                    )
            self._db.close()
        self._db, self._kept = db, there
        return db


class Judge:
    """Score answers by asking a judge.

    Args:
        task: the suite's name of the task, for messages.
        spec: the judge.
        permissions: what the user allowed.

    Raises:
        ConfigError: the network may not be asked, or the variable with the key is not set.
    """

    def __init__(self, task: str, spec: JudgeSpec, permissions: Permissions) -> None:
        refuse_unasked(task, spec, permissions)
        self._task, self._spec = task, spec
        self.kept = Judgements()

    def keep_in(self, folder: Path) -> None:
        """Keep verdicts in a run folder."""
        if self.kept.folder != folder:
            self.kept = Judgements(folder)

    def __call__(self, prompt: str, answer: str, right: str, item: Mapping[str, Any]) -> float:
        """Return the score of one answer; raise as `ahead` does."""
        (score,) = self.ahead([(prompt, answer, right, item)])
        return score

    def ahead(self, answers: Sequence[tuple[str, str, str, Mapping[str, Any]]]) -> list[float]:
        """Return the scores of many answers: those without a verdict are judged at the same time.

        An empty answer, and one whose verdict has no score, counts 0.

        answers: prompt, answer, right answer and row of each.

        Raises:
            JudgeError: the server can't be asked, another model answers, or the limit of requests is reached.
        """
        questions = [self._question(*each) if each[1].strip() else None for each in answers]
        keys = [None if question is None else _key(self._spec, question) for question in questions]
        found = {key: self.kept.find(key) for key in keys if key is not None}
        new = {
            key: question
            for key, question in zip(keys, questions, strict=True)
            if key is not None and question is not None and found[key] is None
        }
        for key, verdict in self._asked(new):
            self.kept.keep(key, self._spec.hash, verdict)
            found[key] = self.kept.find(key)
        scores = []
        for asked in keys:
            known = None if asked is None else found[asked]
            scores.append(0.0 if known is None or known.score is None else known.score)
        return scores

    def _question(self, prompt: str, answer: str, right: str, item: Mapping[str, Any]) -> str:
        try:
            return self._spec.question(prompt, answer, right, item)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"task {self._task!r}: the judge's prompt can't be rendered",
                got=str(error),
                fix="it has prompt, answer, right, and item, the row of the data file",
            ) from None

    def _asked(self, questions: Mapping[str, str]) -> Iterator[tuple[str, Judgement]]:
        """Yield the verdict of each question in order; after an error those that follow are not sent."""
        if not questions:
            return
        with (
            _client(self._spec) as client,
            ThreadPoolExecutor(min(self._spec.parallel, len(questions))) as threads,
        ):
            asked = [(key, threads.submit(self._verdict, client, text)) for key, text in questions.items()]
            try:
                for key, verdict in asked:
                    yield key, verdict.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for key, verdict in asked:  # what was paid for is kept
                    if verdict.done() and not verdict.cancelled() and verdict.exception() is None:
                        self.kept.keep(key, self._spec.hash, verdict.result())
                raise

    def _verdict(self, client: httpx.Client, question: str) -> Judgement:
        spec = self._spec
        body = {
            "model": spec.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "seed": SEED,
            "max_tokens": spec.max_tokens,
        }

        def send() -> Any:
            if not self.kept.reserve(spec.hash, spec.most_requests):
                raise JudgeError(
                    f"task {self._task!r}: the judge was asked {spec.most_requests:,} times, its limit",
                    fix="raise most_requests in the suite's judge, then go on with `evomerge resume`",
                )
            return _sent(client, "POST", "/chat/completions", spec, body)

        reply = _insisting(send, spec)
        try:
            text = reply["choices"][0]["message"]["content"] or ""
            model, used = reply.get("model") or spec.model, reply.get("usage") or {}
            tokens = [int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (LookupError, TypeError, AttributeError, ValueError):
            raise JudgeError(
                f"the judge at {spec.url} answered in a form that is not OpenAI's",
                got=json.dumps(reply)[:200],
            ) from None
        if (before := self.kept.served(spec.hash, str(model))) != model:
            raise JudgeError(
                f"another model answers at {spec.url}, and a run has one judge",
                expected=before,
                got=str(model),
                fix="serve the same model again, or start a new run in another folder",
            )
        verdict = str(text)[:LARGEST_REPLY]
        return Judgement(
            text=verdict, score=spec.score(verdict), prompt_tokens=tokens[0], reply_tokens=tokens[1]
        )


def spent_in(folder: Path, spec: JudgeSpec) -> JudgeCost | None:
    """Return what a judge was asked in a run, None where nothing was; the folder is only read."""
    if not (folder / FILE).is_file():
        return None
    with contextlib.closing(
        sqlite3.connect(f"{(folder / FILE).absolute().as_uri()}?mode=ro", uri=True)
    ) as db:
        return _spent(db, spec.hash)


def _spent(db: sqlite3.Connection, judge: str) -> JudgeCost:
    sent = db.execute("SELECT requests FROM sent WHERE judge = ?", (judge,)).fetchone()
    verdicts, scored, tokens = db.execute(
        "SELECT count(*), count(score), coalesce(sum(prompt_tokens + reply_tokens), 0) FROM judgement "
        "WHERE judge = ?",
        (judge,),
    ).fetchone()
    return JudgeCost(
        requests=sent[0] if sent else 0, verdicts=verdicts, unreadable=verdicts - scored, tokens=tokens
    )


def refuse_unasked(task: str, spec: JudgeSpec, permissions: Permissions) -> None:
    """Raise ConfigError where a judge may not be asked, or its key is not there."""
    if not permissions.ask_judges:
        raise ConfigError(
            f"task {task!r} sends its prompts and the models' answers to a judge",
            expected="your permission",
            got=f"{spec.model} at {spec.url}" + (f", with the key in ${spec.key}" if spec.key else ""),
            fix="if you want that, set ask_judges: true in the run config, or add --ask-judges",
        )
    if spec.key is not None and not os.environ.get(spec.key):
        raise ConfigError(
            f"task {task!r}: the judge's key is not set",
            expected=f"the API key of {spec.url} in the environment variable {spec.key}",
            fix=f"export {spec.key}=...",
        )


def serving(task: str, spec: JudgeSpec, permissions: Permissions) -> dict[str, Any]:
    """Ask a server what it serves; return what a run keeps of its judge: model, its origin, and its hash.

    Raises:
        ConfigError: as `refuse_unasked`, or the server does not serve the model.
        JudgeError: the server can't be asked.
    """
    refuse_unasked(task, spec, permissions)
    with _client(spec) as client:
        listed = _insisting(lambda: _sent(client, "GET", "/models", spec), spec)
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        models = {str(each["id"]): each for each in listed["data"]}
        if spec.model not in models:
            raise ConfigError(
                f"task {task!r}: {spec.url} does not serve the judge {spec.model!r}",
                fix=nearest(spec.model, list(models)),
            )
        root = models[spec.model].get("root")
        return {"model": spec.model, "root": None if root is None else str(root), "judge": spec.hash}
    raise JudgeError(
        f"{spec.url}/models answered in a form that is not OpenAI's", got=json.dumps(listed)[:200]
    )


def _client(spec: JudgeSpec) -> httpx.Client:
    """Return a client that follows no redirects: the key and the answers are for this server."""
    headers = {} if spec.key is None else {"Authorization": f"Bearer {os.environ.get(spec.key, '')}"}
    return httpx.Client(timeout=spec.timeout, headers=headers, follow_redirects=False)


def _sent(client: httpx.Client, method: str, path: str, spec: JudgeSpec, body: Any = None) -> Any:
    """Send one request and return its JSON; raise httpx.HTTPError or JudgeError."""
    response = client.request(method, spec.url + path, json=body)
    if response.status_code in LATER:
        response.raise_for_status()
    if response.status_code != httpx.codes.OK:
        hint = {401: "the key is wrong, or `key` is not set", 403: "the key may not do this"}
        raise JudgeError(
            f"the judge at {spec.url} refused a request",
            got=f"status {response.status_code}: {_shown(response.text, spec)}",
            fix=hint.get(response.status_code),
        )
    try:
        return response.json()
    except ValueError:
        raise JudgeError(
            f"the judge at {spec.url} did not answer in JSON", got=_shown(response.text, spec)
        ) from None


def _insisting(send: Any, spec: JudgeSpec) -> Any:
    """Send a request, again after passing faults; raise JudgeError where it never gets through."""
    try:
        return tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT),
            retry=tenacity.retry_if_exception_type(httpx.HTTPError),
            reraise=True,
        )(send)
    except httpx.HTTPError as error:
        raise JudgeError(
            f"the judge at {spec.url} can't be asked ({ATTEMPTS} attempts)",
            got=_shown(f"{type(error).__name__}: {error}", spec),
            fix="start its server, or look at its log; a run goes on with `evomerge resume`",
        ) from None


def _shown(text: str, spec: JudgeSpec) -> str:
    """Return the beginning of a server's text on one line, without the key."""
    key = os.environ.get(spec.key or "", "")
    return " ".join((text.replace(key, "***") if key else text).split())[:200]


def _key(spec: JudgeSpec, question: str) -> str:
    return hashlib.sha256(f"{spec.hash}\0{question}".encode()).hexdigest()
