"""The sandbox: whatever a call does, it ends, and nothing of it is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.evaluation import sandbox
from evomerge.evaluation.permissions import Permissions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are Linux's")
ALLOWED = Permissions(allow_code_execution=True)
complete = pytest.mark.skipif(bool(sandbox.notes(ALLOWED)), reason="no namespaces here")


@pytest.fixture(params=["namespaces", "limits only"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "limits only":
        monkeypatch.setattr(sandbox, "_unshared", lambda: False)
    return str(request.param)


def forever() -> bytes:
    while True:
        pass


def asleep() -> bytes:
    time.sleep(600)
    return b"late"


def ended() -> bytes:
    os._exit(0)


def failed() -> bytes:
    raise SystemExit(0)


def greedy() -> bytes:
    return str(len(bytearray(4 * sandbox.MEMORY))).encode()


def endless_file() -> bytes:
    Path("big").write_bytes(bytes(2 * sandbox.FILE_SIZE))
    return b"written"


def talkative() -> bytes:
    print("1.0")
    os.write(1, b"\0\0\0\x01")
    return b"said"


CALLS: list[tuple[Callable[[], bytes], bytes | None]] = [
    (lambda: b"fine", b"fine"),
    (lambda: str(len(list(Path().iterdir()))).encode(), b"0"),
    (talkative, b"said"),
    (lambda: bytes(sandbox.LONGEST + 1), None),
    *((call, None) for call in (forever, asleep, ended, failed, greedy, endless_file)),
]


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(("call", "answer"), CALLS)
def test_every_call_ends(
    call: Callable[[], bytes], answer: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    wall_seconds = 0.5 if call is asleep else 2.0
    assert [sandbox.run(call, wall_seconds=wall_seconds) for _ in range(2)] == [answer, answer]


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("last", [b"answered", None])
def test_no_process_outlives_the_call(last: bytes | None, tmp_path: Path) -> None:
    sign = f"{os.getpid()}{time.monotonic_ns()}"

    def leave_one_behind() -> bytes:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", sign])
            os._exit(0)
        os.wait()
        time.sleep(0.1)
        if last is None:
            os._exit(0)
        return last

    assert sandbox.run(leave_one_behind) == last
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path)]
    assert not [command for command in commands if sign.encode() in command]


def _readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


@pytest.mark.usefixtures("both")
def test_the_environment_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    seen = sandbox.run(lambda: repr(dict(os.environ)).encode())
    assert seen is not None
    assert b"s3cret" not in seen
    home, temporary = (
        sandbox.run(lambda name=name: os.environ[name].encode()) for name in ("HOME", "TMPDIR")
    )
    assert home is not None
    assert b"evomerge-" in home
    assert temporary is not None


@pytest.mark.usefixtures("both")
def test_a_call_draws_the_same_random_numbers_each_time() -> None:
    import random

    assert len({sandbox.run(lambda: str(random.random()).encode()) for _ in range(3)}) == 1


@complete
def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def connect() -> bytes:
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                return b"connected"

        assert connect() == b"connected"
        assert sandbox.run(connect) is None


@complete
def test_only_its_own_folder_can_be_written(tmp_path: Path) -> None:
    def write() -> bytes:
        Path("own").touch()
        (tmp_path / "yours").touch()
        return b"written"

    assert sandbox.run(write) is None
    assert not (tmp_path / "yours").exists()
    assert sandbox.run(write, writable=[tmp_path]) == b"written"


@complete
def test_other_processes_are_hidden() -> None:
    parent = os.getpid()
    assert sandbox.run(lambda: str(Path(f"/proc/{parent}/environ").exists()).encode()) == b"False"


def test_a_machine_without_namespaces_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sandbox.notes(Permissions()) == ()
    failed_attempt = subprocess.CompletedProcess(args=(), returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed_attempt)
    assert "network" in sandbox.notes(ALLOWED)[0]
