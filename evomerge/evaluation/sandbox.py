"""Sandbox: one call in a child process with limits, for code that a model wrote.

The child has no network, sees no other process, and can write only to its own folder, where the system
allows it to make namespaces (Linux); see `notes`. Everywhere it has limits of memory, processor time, wall
time and file size, an empty working folder, and almost no environment variables. It can still read what the
user can read. When the call ends, all processes that it started are killed.

The call is made in a fork, so that it costs milliseconds: use this from a small process of one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from evomerge.evaluation.permissions import Permissions

CPU_SECONDS = 10
WALL_SECONDS = 30.0
MEMORY = 2**30
"""Bytes of address space, in addition to those of the process that calls `run`."""
FILE_SIZE = 2**24
PROCESSES = 64
"""Processes and threads of one call; not enforced for root."""
LONGEST = 2**20
"""Bytes of an answer to the caller."""

_KEPT = ("PATH", "LANG", "LC_ALL", "HF_ALLOW_CODE_EVAL", "PYTHONHASHSEED", "OMP_NUM_THREADS")
"""Environment variables that the call sees, beside HOME and TMPDIR."""

_NEW_USER, _NEW_NETWORK, _NEW_PROCESSES = 0x10000000, 0x40000000, 0x20000000
_NEW_IPC, _NEW_MOUNTS = 0x08000000, 0x00020000
_EVERYTHING = _NEW_USER | _NEW_NETWORK | _NEW_PROCESSES | _NEW_IPC | _NEW_MOUNTS
_BIND, _REC, _PRIVATE = 4096, 16384, 1 << 18
_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_MOUNT_SETATTR, _HERE, _RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
_DEATH_SIGNAL, _ADOPT_ORPHANS = 1, 36


def run(
    call: Callable[[], bytes], *, writable: Sequence[Path] = (), wall_seconds: float = WALL_SECONDS
) -> bytes | None:
    """Return what a call returns in a child process; None if it raised, ended, died or took too long.

    writable: folders that the call may write to, beside its own.
    """
    _control(_ADOPT_ORPHANS, 1)  # what escapes the child's process group becomes ours, and is killed below
    ours = set(_children())
    with tempfile.TemporaryDirectory(prefix="evomerge-", ignore_cleanup_errors=True) as folder:
        receiving, sending = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.close(receiving)
                _confined(call, Path(folder), writable, sending)
            os._exit(1)
        os.close(sending)
        try:
            return _received(receiving, child, time.monotonic() + wall_seconds)
        finally:
            os.close(receiving)
            _end(child, ours)


def notes(permissions: Permissions) -> tuple[str, ...]:
    """Return a note for the user if answers may be executed and this machine's sandbox is not complete."""
    if not permissions.allow_code_execution:
        return ()
    attempt = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare({_EVERYTHING}))"
    if (
        sys.platform == "linux"
        and subprocess.run([sys.executable, "-c", attempt], check=False, capture_output=True).returncode == 0
    ):
        return ()
    return (
        "this system lets evomerge make no namespaces, so the answers that are executed can use the network, "
        "and write every file that you can write",
    )


def _confined(call: Callable[[], bytes], folder: Path, writable: Sequence[Path], sending: int) -> None:
    """Carry out the call in this process, or in a grandchild if there are namespaces; never return."""
    os.setsid()
    _control(_DEATH_SIGNAL, signal.SIGKILL)
    if _unshared():
        first = os.fork()
        if first:
            os.close(sending)
            os.waitpid(first, 0)
            os._exit(0)
        # The first process of the namespace: when it ends, the kernel kills all others.
        _control(_DEATH_SIGNAL, signal.SIGKILL)
        _close_file_system((folder, *writable))
        caller = os.fork()
        if caller:
            os.close(sending)
            while os.wait()[0] != caller:
                pass
            os._exit(0)
        _limit(resource.RLIMIT_NPROC, PROCESSES)
    _limit(resource.RLIMIT_AS, _address_space() + MEMORY)
    _limit(resource.RLIMIT_CPU, CPU_SECONDS)
    _limit(resource.RLIMIT_FSIZE, FILE_SIZE)
    _limit(resource.RLIMIT_CORE, 0)
    _only_open(sending)
    os.chdir(folder)
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    os.environ.clear()
    os.environ.update(kept, HOME=str(folder), TMPDIR=str(folder))
    tempfile.tempdir = None  # so that TMPDIR counts
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    answer = call()
    if len(answer) <= LONGEST:
        with os.fdopen(sending, "wb") as pipe:
            pipe.write(struct.pack(">I", len(answer)) + answer)
    os._exit(0)


def _received(pipe: int, child: int, deadline: float) -> bytes | None:
    """Return the child's answer; None if it ends, or the deadline passes, before the answer is complete."""
    content, over = b"", False
    while time.monotonic() < deadline:
        ready, _, _ = select.select([pipe], [], [], 0 if over else 0.02)
        if ready:
            part = os.read(pipe, 65536)
            content += part
            if not part or len(content) > LONGEST + 4:
                return None
            if len(content) >= 4 and len(content) - 4 == struct.unpack(">I", content[:4])[0]:
                return content[4:]
        elif over:
            return None
        else:
            over = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return None


def _end(child: int, spared: set[int]) -> None:
    """Kill the child and everything that it started; spared: other children of this process."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # it may not have made its group yet
    os.waitpid(child, 0)
    while orphans := set(_children()) - spared:
        for orphan in orphans:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(orphan, signal.SIGKILL)
                os.waitpid(orphan, 0)


def _children() -> list[int]:
    try:
        return [int(name) for name in Path("/proc/thread-self/children").read_text().split()]
    except OSError:
        return []


def _unshared() -> bool:
    """Put this process into namespaces of its own; say whether the system allows it."""
    if sys.platform != "linux":
        return False
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(_EVERYTHING) != 0:
        return False
    with contextlib.suppress(OSError):  # the same user inside; without it the files still belong to the user
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def _close_file_system(writable: Sequence[Path]) -> None:
    """Make all files read-only except some folders, and hide the other processes; as far as possible."""
    system = ctypes.CDLL(None)
    system.mount(None, b"/", None, _REC | _PRIVATE, None)
    system.mount(b"proc", b"/proc", b"proc", _NOSUID_NODEV_NOEXEC, None)
    places = [os.fsencode(path) for path in writable]
    for place in places:
        system.mount(place, place, None, _BIND, None)
    _set_attributes(b"/", _RECURSIVE, on=_READ_ONLY)
    for place in places:
        _set_attributes(place, 0, off=_READ_ONLY)


def _set_attributes(place: bytes, flags: int, *, on: int = 0, off: int = 0) -> None:
    attributes = struct.pack("QQQQ", on, off, 0, 0)
    ctypes.CDLL(None).syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(_HERE),
        ctypes.c_char_p(place),
        ctypes.c_uint(flags),
        ctypes.c_char_p(attributes),
        ctypes.c_size_t(len(attributes)),
    )


def _control(option: int, value: int) -> None:
    """Call prctl, where there is one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _limit(kind: int, value: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # the system allows less, or does not know it
        resource.setrlimit(kind, (value, value))


def _address_space() -> int:
    """Return the bytes of address space of this process."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 2**33


def _only_open(kept: int) -> None:
    """Close all files except one; standard input, output and errors lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, closefd=False) for n, mode in enumerate("rww"))  # noqa: SIM115
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
