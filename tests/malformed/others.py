"""Malformed data files, run folders and command lines."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.malformed.texts import TASK
from tests.malformed.workspace import CHECK, EVALUATE, FISHER, SPECIAL, Case, special, text

DATA = "tasks/data/demo_add.test.jsonl"
ROW = '{"prompt": "add 1 8 + 3 4 =", "answer": "2 5"}\n'


def data() -> Iterator[Case]:
    """Data of tasks, and the texts of `fisher`."""
    rows = {
        "a row that is no JSON": ROW * 3 + "no json\n",
        "a row of a list": ROW + "[1, 2]\n",
        "a row of a number": "7\n",
        "nested too deeply": '{"prompt": ' + "[" * 100_000 + "\n",
        "an unclosed row": '{"prompt": "add 1 8',
        "blank lines only": "\n\n\n",
        "NUL": ROW + "\0\0\0\n",
        "lone surrogate": '{"prompt": "\\ud800", "answer": "x"}\n',
        "a web page": "<!doctype html>\n",
    }
    for name, content in rows.items():
        yield Case(kind="data", name=name, make=text(DATA, content), commands=(CHECK, EVALUATE), message="")
    for what in SPECIAL:
        yield Case(kind="data", name=what, make=special(DATA, what), commands=(CHECK, EVALUATE), message="")
    for suffix, content in {
        "csv": b'prompt,answer\n"add 1 8,2 5\n"\n',
        "csv-quotes": b"prompt,answer\n" + b'"' * 1001,
        "csv-columns": b"prompt,answer\n1,2,3,4\n5\n",
        "parquet": b"PAR1" + bytes(100) + b"PAR1",
        "parquet-short": b"PAR1",
        "arrow": b"ARROW1\0\0" + bytes(50),
    }.items():
        kind = suffix.partition("-")[0]
        task = {
            **TASK,
            "dataset_path": kind,
            "dataset_kwargs": {"data_files": dict.fromkeys(("search", "select", "test"), f"data/x.{kind}")},
        }

        def make(folder: Path, task: object = task, kind: str = kind, content: bytes = content) -> None:
            (folder / "tasks" / "demo_add.yaml").write_text(yaml.safe_dump(task))
            (folder / "tasks" / "data" / f"x.{kind}").write_bytes(content)

        yield Case(kind="data", name=suffix, make=make, commands=(CHECK, EVALUATE), message="")
    texts = {"empty": "", "blank": "\n \n", "not UTF-8": b"\xff\xfe\xff", "one token": "add\n"}
    for name, content in texts.items():
        yield Case(
            kind="data",
            name=f"the text: {name}",
            make=text("text.txt", content),
            commands=(FISHER,),
            message="text.txt",
        )
    for what in SPECIAL:
        yield Case(
            kind="data",
            name=f"text {what}",
            make=special("text.txt", what),
            commands=(FISHER,),
            message="text.txt",
        )


def store() -> Iterator[Case]:
    """Run folders."""
    commands = tuple(
        (*words[:1], "run", *words[1:])
        for words in (
            ("status",),
            ("show", "winner"),
            ("report",),
            ("export", "merged"),
            ("resume",),
            ("predict", "recipe.yaml"),
            ("migrate",),
        )
    )
    contents = {
        "empty": b"",
        "zeros": bytes(8192),
        "text": b"no database",
        "header only": b"SQLite format 3\0",
        "header and zeros": b"SQLite format 3\0" + bytes(4080),
        "header and ones": b"SQLite format 3\0" + b"\xff" * 4080,
    }

    def at(folder: Path) -> Path:
        (folder / "run").mkdir(exist_ok=True)
        return folder / "run" / "run.sqlite"

    for name, content in contents.items():
        yield Case(
            kind="store",
            name=name,
            make=lambda folder, content=content: at(folder).write_bytes(content) and None,
            commands=commands,
            message="run",
        )
    for what in SPECIAL:
        yield Case(
            kind="store",
            name=f"a {what}",
            make=lambda folder, what=what: SPECIAL[what](at(folder)),
            commands=commands,
            message="run",
        )

    def other(folder: Path, statements: str) -> None:
        with sqlite3.connect(at(folder)) as database:
            database.executescript(statements)
        database.close()

    for name, statements in {
        "another database": "create table people (name text);",
        "no tables": "pragma user_version = 5;",
        "a table of the same name": "create table facts (x); pragma user_version = 6;",
        "a version of the future": "create table facts (key text); pragma user_version = 1000000;",
        "a negative version": "create table facts (key text, value text); pragma user_version = -1;",
    }.items():
        yield Case(
            kind="store",
            name=name,
            make=lambda folder, statements=statements: other(folder, statements),
            commands=commands,
            message="run",
        )
    yield Case(kind="store", name="no folder", make=lambda folder: None, commands=commands, message="run")
    yield Case(
        kind="store",
        name="an empty folder",
        make=lambda folder: (folder / "run").mkdir(),
        commands=commands,
        message="run",
    )
    yield Case(
        kind="store",
        name="a file instead of the folder",
        make=lambda folder: (folder / "run").write_text("x") and None,
        commands=commands,
        message="run",
    )


def cli() -> Iterator[Case]:
    """Command lines."""
    huge, long = "9" * 40, "x" * 5000
    merge, evaluate, fisher = ("merge", "recipe.yaml", "merged"), EVALUATE, FISHER[:4]
    lines: list[tuple[str, ...]] = [
        ("no_such_command",),
        ("check",),
        ("check", "config.yaml", "extra"),
        ("check", "--no-such-option", "config.yaml"),
        ("check", ""),
        ("check", "no\nsuch\nfile"),
        ("check", long),
        ("check", "/dev/zero"),
        ("check", "."),
        ("run", "config.yaml", "--seed", "-1"),
        ("run", "config.yaml", "--seed", huge),
        ("run", "config.yaml", "--seed", "1.5"),
        ("run", "config.yaml", "--out", ""),
        ("run", "config.yaml", "--out", long),
        ("run", "config.yaml", "--out", "~nosuchuser/run"),
        ("run", "config.yaml", "--out", "/dev/null/run"),
        ("run", "config.yaml", "--out", "config.yaml"),
        *(
            ("run", "config.yaml", option, value)
            for option in ("--evaluations", "--items", "--generations", "--patience", "--failures")
            for value in ("0", huge, "x")
        ),
        *(
            ("run", "config.yaml", option, value)
            for option in ("--hours", "--cost", "--per-hour")
            for value in ("nan", "inf", "-1", "1e300")
        ),
        *(
            ("run", "config.yaml", "--until", value)
            for value in ("", "25:00", "0001-01-01T00:00", huge, "08:00\0"[:5] + "x")
        ),
        (*merge, "--as", "folder"),
        (*merge, "--as", ""),
        (*merge, "--rank", "4"),
        (*merge, "--keep-rest"),
        (*merge, "--as", "adapter", "--rank", "0"),
        (*merge, "--as", "adapter", "--rank", huge),
        ("merge", "recipe.yaml", ""),
        ("merge", "recipe.yaml", "base"),
        ("merge", "recipe.yaml", "base/config.json/merged"),
        ("merge", "recipe.yaml", long),
        ("merge", "recipe.yaml", "/dev/null"),
        ("merge", "recipe.yaml", "/proc/merged"),
        ("analyze", "recipe.yaml", "--threshold", "nan"),
        ("analyze", "recipe.yaml", "--threshold", "inf"),
        ("analyze", "recipe.yaml", "--threshold", "-1"),
        *(("analyze", "recipe.yaml", "--top", value) for value in ("0", "2", "nan", "-inf", "1e300", "x")),
        ("analyze", "recipe.yaml", "--map", "fog"),
        ("analyze", "recipe.yaml", "--base", "~nosuchuser/x"),
        ("analyze", "recipe.yaml", "--base", ""),
        ("analyze", "recipe.yaml", "--base", "nowhere"),
        ("analyze", "recipe.yaml", "--html", "recipe.yaml"),
        ("analyze", "recipe.yaml", "--html", long),
        (*evaluate, "--split", "train"),
        *((*evaluate, "--batch-size", value) for value in ("0", "-1", huge, "big")),
        ("evaluate", "", "--suite", "suite.yaml"),
        ("evaluate", "+", "--suite", "suite.yaml"),
        ("evaluate", "~nosuchuser/x", "--suite", "suite.yaml"),
        ("evaluate", long, "--suite", "suite.yaml"),
        ("evaluate", "/dev/zero", "--suite", "suite.yaml"),
        ("evaluate", "a\nb/c", "--suite", "suite.yaml"),
        ("evaluate", "base+base+base", "--suite", "suite.yaml"),
        ("evaluate", "add", "--suite", ""),
        ("evaluate", "add", "--suite", "~nosuchuser/x"),
        ("evaluate", "add", "--suite", long),
        *((*fisher, "--labels", value) for value in ("", "truth")),
        *((*fisher, "--sequences", value) for value in ("0", "-1", huge, "x")),
        *((*fisher, "--max-length", value) for value in ("1", huge, "x")),
        *((*fisher, "--seed", value) for value in ("-1", huge)),
        *((*fisher, "--device", value) for value in ("", "gpu", "cuda:99", "cuda:x", "meta")),
        ("fisher", "add", "text.txt", "add"),
        ("fisher", "add", "text.txt", "recipe.yaml"),
        ("fisher", "add", "text.txt", "recipe.yaml/fisher"),
        ("spaces", "show", ""),
        ("spaces", "show", long),
        ("spaces", "show", "~nosuchuser/x"),
        ("spaces", "--models", "no.yaml"),
        ("zoo", "build", "base", "--tiny"),
        ("zoo", "build", "recipe.yaml", "--tiny"),
        ("zoo", "build", "out", "--seed", huge),
        ("resume", "no_run", "--model", "base"),
        ("resume", "no_run", "--model", "=x"),
        ("resume", "no_run", "--suite", ""),
        ("show", "no_run", "winner", "--split", "train"),
        ("show", "~nosuchuser/run", "winner"),
        ("export", "no_run", "out", "--as", "cake"),
        ("export", "no_run", "out", "--pick", ""),
        ("predict", "no_run", "nothing"),
        ("migrate", ""),
        ("status", long),
        ("report", "/dev/null"),
        ("demo", "--evaluations", "0"),
        ("watch", "no_run"),
        ("watch", long, "--once"),
        ("serve", "no_run"),
        ("serve", "/dev/null"),
        ("serve", "--port", "70000"),
        ("dashboard", "no_run"),
        ("runs", "no_folder"),
        ("runs", ""),
        ("runs", "diff", "no_run", "no_run"),
        ("runs", "prune", "no_folder", "--yes"),
        ("runs", "prune", "--runs", "no_run", "--yes"),
        ("demo", "--seed", huge),
    ]
    for line in lines:
        shown = " ".join(word if len(word) < 50 else f"{word[:10]}..." for word in line)
        yield Case(kind="cli", name=repr(shown), make=lambda folder: None, commands=(line,), message="")
