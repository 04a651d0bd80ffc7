"""A Ray cluster that is not there, goes away or runs out of memory: one message, nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evomerge import compose
from evomerge.cli import app
from evomerge.errors import ClusterError
from evomerge.evaluation.scores import Failure
from evomerge.running.executors import ray_actors
from evomerge.running.executors.pool import Died, Pool
from evomerge.running.store import RunStore, facts
from tests.running.executors.test_executors import jobs


@contextlib.contextmanager
def server(answer: bytes) -> Iterator[str]:
    """A server that says the same to everybody, and nothing where there is nothing to say."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        kept = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    visitor = door.accept()[0]
                    kept.append(visitor)
                    visitor.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{door.getsockname()[1]}"
        door.shutdown(socket.SHUT_RDWR)
        thread.join()
        for visitor in kept:
            visitor.close()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_something_else_than_ray_listens(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actors, "ANSWER_SECONDS", 0.2)
    with server(answer) as address, pytest.raises(OSError, match=r"timed out|something else"):
        ray_actors._greet(address)


class FakeRay:
    """A cluster whose head is at an address, and that never has an answer."""

    def __init__(self, address: str) -> None:
        self.gcs_address = address
        self.waits = 0

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> FakeRay:
        return self

    def wait(self, answers: list[Any], **_: object) -> Any:
        self.waits += 1
        return [], answers


def test_a_cluster_that_does_not_answer_for_a_while_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(ray_actors.time, "monotonic", lambda: now[0])
    frame = bytes([0, 0, 0, 4])
    with server(frame) as address:
        pulse = ray_actors.Pulse(FakeRay(address))
        for _ in range(3):
            now[0] += ray_actors.LOST_SECONDS
            pulse.check()
    now[0] += ray_actors.PULSE_SECONDS
    pulse.check()  # it may come back
    now[0] += ray_actors.LOST_SECONDS
    assert not pulse.lost
    with pytest.raises(ClusterError, match="the Ray cluster was lost"):
        pulse.check()
    assert pulse.lost


class OutOfMemoryError(Exception):
    """Stands in for Ray's."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemoryError("1 worker(s) were killed"), "out_of_memory"),
        (Exception("killed due to the node running low on memory"), "out_of_memory"),
        (Exception("(1) the process is killed by SIGKILL by OOM killer due to high memory usage"), "crash"),
    ],
)
def test_actors_that_ray_kills_for_their_memory(error: Exception, kind: str) -> None:
    died = ray_actors._died(error)
    assert died.kind == kind


class Starved:
    """A backend whose workers are ready, and die of the second and third job for lack of memory."""

    lack, lingers = "", True

    def __init__(self) -> None:
        self.given: dict[int, Any] = {}
        self.ready: list[int] = []
        self.count = 0

    def start(self, name: str, seat: int) -> int:
        self.count += 1
        self.ready.append(self.count)
        return self.count

    def give(self, worker: int, job: Any) -> None:
        self.given[worker] = job

    def wait(self, workers: Any, seconds: float) -> Any:
        if self.ready:
            return [(worker, True) for worker in self.ready if worker in workers and not self.ready.clear()]
        return [(worker, Died(reason="low on memory", kind="out_of_memory")) for worker in workers]

    def alive(self, worker: int) -> bool:
        return True

    def kill(self, worker: int) -> None: ...

    def close(self, idle: Any, busy: Any) -> None: ...

    def now(self) -> float:
        return 0.0


def test_a_job_whose_workers_are_killed_for_their_memory_twice_is_out_of_memory() -> None:
    (result,) = Pool(Starved(), workers=1, timeout=5.0).run(jobs(1))
    assert result.outcome == Failure(kind="out_of_memory", reason="low on memory")


RUN = """
import os, signal, sys, threading, time
from pathlib import Path
from tests.running.executors.test_lost_cluster import listening, ours
from tests.running.executors.test_executors import ray
from tests.running.executors.test_executors import jobs

if __name__ == "__main__":
    executor = ray(address="local", timeout=60)
    print(*listening(), flush=True)
    victims = ours(sys.argv[1])

    def many():
        number = 0
        while True:
            if number == 20:
                for victim in victims:
                    os.kill(victim, signal.SIGKILL)
            yield jobs(number % 7)[0]
            number += 1

    try:
        for result in executor.run(many()):
            pass
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
    executor.close()
"""


def ours(program: str) -> list[int]:
    """Return the processes of a program that have this process's mark."""
    mark = f"RAY_SESSION_TEST={os.environ['RAY_SESSION_TEST']}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and mark in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().split(b"\0")[0].decode()
                if program in command and int(folder.name) != os.getpid():
                    found.append(int(folder.name))
    return found


def listening() -> list[str]:
    """Return the addresses, in /proc's hexadecimal form, on which our processes listen."""
    addresses = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                addresses[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    found = set()
    for pid in [*ours(""), os.getpid()]:
        with contextlib.suppress(OSError):
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found |= {addresses[end] for end in [str(handle.readlink())] if end in addresses}
    return sorted(found)


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["gcs_server", "raylet/raylet"])
def test_a_local_ray_listens_to_nobody_else_and_its_loss_is_one_message(program: str) -> None:
    pytest.importorskip("ray")
    mark = f"{os.getpid()}-{program.replace('/', '-')}"
    done = subprocess.run(
        [sys.executable, "-c", RUN, program],
        env={**os.environ, "RAY_SESSION_TEST": mark},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    addresses, error = done.stdout.splitlines()
    assert set(addresses.split()) <= LOOPBACK
    assert addresses
    assert error == "ClusterError the Ray cluster was lost while candidates were scored"
    assert done.stderr.count("\n") < 3, done.stderr
    os.environ["RAY_SESSION_TEST"] = mark
    deadline = time.monotonic() + 60
    try:
        while (left := ours("")) and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        del os.environ["RAY_SESSION_TEST"]
    assert left == []


def test_the_message_of_a_lost_cluster_has_the_command_that_goes_on(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object, **__: object) -> None:
        RunStore.create(tmp_path / "run", {facts.CONFIG: {}}).close()
        raise ClusterError("the Ray cluster was lost", fix="start it")

    monkeypatch.setattr(compose, "start", lost)
    done = CliRunner().invoke(app, ["run", str(config(generate=False)), "--quiet"])
    assert done.exit_code == 2
    assert f"do: start it; then: evomerge resume {tmp_path / 'run'}" in done.output
