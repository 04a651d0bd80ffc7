"""Run commands on malformed inputs: python -m tests.malformed.runner [--every N] [--kind KIND] [--name PART]

Every command runs in a child that is forked from a process in which the libraries are imported. It must end
with exit code 2 and one message that is no traceback, and write nothing. A JSON document with the results is
the last line of the output; the lines before it name what failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.malformed import models, others, own, texts
from tests.malformed.workspace import Case, limit_memory, write_valid

HANG = 60
"""Seconds after which a command counts as hanging, on any machine."""
SLOW = 2.0
"""Seconds that a command should take at most; commands that took longer are printed and fail no test."""
MEMORY = 300
"""Megabytes that a command may need beside the imported libraries."""
KINDS = (
    texts.config,
    texts.suite,
    texts.space,
    texts.recipe,
    texts.mergekit,
    texts.converted,
    texts.task,
    models.safetensors,
    models.index,
    models.model_config,
    models.adapter,
    others.data,
    others.store,
    others.cli,
    own.own,
    own.entries,
    own.gates,
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one command made of one input; problem: "" if it is what it should be."""

    kind: str
    name: str
    command: str
    problem: str
    output: str
    seconds: float
    megabytes: float


def cases() -> Iterator[Case]:
    """Return all cases, by kind."""
    for kind in KINDS:
        yield from kind()


def attempts() -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Return all cases with the commands that read them."""
    for case in cases():
        for command in case.commands:
            yield case, command


def warm() -> None:
    """Import what commands import, so that a child's time and memory are its own."""
    from evomerge.cli import commands
    from evomerge.config import RunConfig

    os.environ.update(dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"))
    assert commands
    assert RunConfig
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_valid(Path())
        config = Path("config.yaml")
        config.write_text(config.read_text().replace("add: add", "ad: no_such_folder"))
        _run_here(("check", "config.yaml"), Path("output"))
    import datasets.packaged_modules
    import lm_eval.evaluator
    import lm_eval.tasks
    import peft
    import torch
    import transformers.models.llama.modeling_llama

    import evomerge.compose
    import evomerge.delivery.analyze.page
    import evomerge.delivery.export
    import evomerge.delivery.predict
    import evomerge.delivery.report
    import evomerge.delivery.single
    import evomerge.merging.analysis.fisher
    import evomerge.merging.export.adapter
    import evomerge.prepare
    import evomerge.trial  # noqa: F401

    assert all((datasets, lm_eval, peft, transformers))
    torch.set_num_threads(1)


def _run_here(command: Sequence[str], output: Path) -> int:
    """Run a command in this process, with its output in a file; return the exit code."""
    from evomerge.cli.commands import app

    saved = os.dup(1), os.dup(2)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 0
    try:
        app([*command], prog_name="evomerge")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(saved[0], 1)
    os.dup2(saved[1], 2)
    os.close(handle)
    return code


def attempt(case: Case, command: tuple[str, ...]) -> Outcome:
    """Run one command on one case in a child process."""
    with tempfile.TemporaryDirectory(prefix="malformed-") as place:
        folder = Path(place) / "inputs"
        folder.mkdir()
        write_valid(folder)
        case.make(folder)
        before = _listing(folder)
        output = Path(place) / "output"
        output.touch()
        started = time.monotonic()
        child = os.fork()
        if not child:
            signal.alarm(HANG)
            limit_memory(4000)
            (Path(place) / "resident").write_text(str(_resident()))
            os.chdir(folder)
            os._exit(_run_here(command, output))
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - started
        megabytes = max(0.0, usage.ru_maxrss / 1024 - float((Path(place) / "resident").read_text()))
        said = output.read_text(errors="replace")
        problem = _problem(case, command, status, said, before, _listing(folder))
        if not problem and megabytes > MEMORY:
            problem = f"needed {megabytes:.0f} MB"
        return Outcome(
            kind=case.kind,
            name=case.name,
            command=" ".join(command)[:80],
            problem=problem,
            output=said,
            seconds=seconds,
            megabytes=megabytes,
        )


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def _listing(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.name.endswith((".lock", "-shm", "-wal")) and "__pycache__" not in path.parts
    }


def _problem(
    case: Case, command: tuple[str, ...], status: int, said: str, before: set[str], after: set[str]
) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"hangs for {HANG} seconds" if number == signal.SIGALRM else f"killed by signal {number}"
    if "Traceback" in said or "panicked" in said:
        return "a traceback"
    if (code := os.WEXITSTATUS(status)) != 2:
        return f"exit code {code}"
    if not said.strip():
        return "no message"
    shown = "".join(said.lower().split())
    if not any("".join(part.lower().split()) in shown for part in case.message.split("|")):
        return f"the message does not name {case.message!r}"
    if after != before:
        return f"wrote {sorted(after ^ before)[:3]}"
    return ""


def main() -> int:
    """Run the chosen cases; return 0 if all of them end as they should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="only every n-th")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--kind", default="")
    parser.add_argument("--name", default="")
    parser.add_argument("--say", action="store_true", help="print every message")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    warm()
    chosen = [
        (case, command)
        for case, command in attempts()
        if options.kind in ("", case.kind) and options.name in case.name
    ][options.first :: options.every]
    outcomes = []
    for case, command in chosen:
        outcome = attempt(case, command)
        outcomes.append(outcome)
        if outcome.problem or options.say:
            print(
                f"{outcome.kind} | {outcome.name} | {outcome.command}: {outcome.problem}\n"
                f"{outcome.output[-1200:]}",
                flush=True,
            )
    inputs = {(outcome.kind, outcome.name) for outcome in outcomes}
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    largest = max(outcomes, key=lambda outcome: outcome.megabytes)
    failed = [outcome for outcome in outcomes if outcome.problem]
    for outcome in outcomes:
        if outcome.seconds > SLOW:
            print(f"{outcome.seconds:.1f} s: {outcome.kind} | {outcome.name} | {outcome.command}")
    print(
        f"{len(inputs)} malformed inputs, {len(outcomes)} commands on them: "
        f"{sum('traceback' in outcome.problem for outcome in failed)} tracebacks, {len(failed)} problems; "
        f"slowest {slowest.seconds:.2f} s ({slowest.kind}, {slowest.name}, {slowest.command}), "
        f"largest {largest.megabytes:.0f} MB ({largest.kind}, {largest.name}, {largest.command})"
    )
    print(json.dumps({"inputs": len(inputs), "problems": [asdict(outcome) for outcome in failed]}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
