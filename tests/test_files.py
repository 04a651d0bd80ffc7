"""Drafts: whole or not at all, over what was there, and nothing of killed processes stays."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evomerge import files
from evomerge.errors import ConfigError, DiskError
from evomerge.files import (
    drafted_file,
    drafted_folder,
    expanded,
    passing_folder,
    read_regular,
    remove_abandoned,
)
from evomerge.merging.tensors import kernels


def killed(code: str, *arguments: object, **environment: str) -> None:
    """Run some code that kills its own process by calling `die`."""
    head = (
        "import os, signal, sys; from pathlib import Path\n"
        "def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
        "from evomerge.files import drafted_file, drafted_folder, passing_folder\n"
    )
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    done = subprocess.run(command, check=False, env={**os.environ, **environment})
    assert done.returncode == -signal.SIGKILL


def test_a_file_takes_the_place_of_another_in_one_step(tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    for text in ("first", "second"):
        with drafted_file(out) as draft:
            draft.write_text(text)
            assert not out.exists() or out.read_text() == "first"
        assert out.read_text() == text
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise error

    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr(files, "sync", fail)
    expected = DiskError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), drafted_file(tmp_path / "page.html") as draft:
        draft.write_text("new")
    with pytest.raises(expected), drafted_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    with pytest.raises(type(error)), passing_folder(tmp_path, "x"):
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


def test_a_library_in_rust_meets_a_full_disk(tmp_path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    def write() -> None:
        with drafted_file(tmp_path / "out") as draft:
            save_file({"x": np.zeros(10_000)}, draft)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DiskError, match=r"out: can't be written\n  got: .*too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(SafetensorError), drafted_folder(tmp_path / "model"):
        raise SafetensorError("something else")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed("with drafted_file(Path(sys.argv[1])) as d: d.write_text('half'); die()", tmp_path / "a.yaml")
    killed("with drafted_folder(Path(sys.argv[1])) as d: (d / 'x').touch(); die()", tmp_path / "model")
    killed("with passing_folder(Path(sys.argv[1]), 'kernel') as d: die()", tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    with drafted_file(tmp_path / "a.yaml") as draft:
        draft.touch()
    with drafted_folder(tmp_path / "model"), passing_folder(tmp_path, "kernel"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.yaml", "model"]


def test_what_the_living_and_other_machines_have_is_left_alone(tmp_path: Path) -> None:
    """Whose process lives is known by its lock; the number of a dead process may be another's by now."""
    here = socket.gethostname()
    with passing_folder(tmp_path, "a") as living:
        names = [living.name, ".a.partial-elsewhere-x", f".b.partial-{here}-x", f"a.partial-{here}-x"]
        for name in names[1:]:
            (tmp_path / name).mkdir()
        remove_abandoned(tmp_path, "a")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
        remove_abandoned(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[:2] + names[3:])


def test_a_draft_that_is_swept_before_it_is_locked_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = files.fcntl.flock, []

    def late(handle: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (stale,) = tmp_path.iterdir()
            shutil.rmtree(stale)
        flock(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with drafted_file(tmp_path / "page") as draft:
        draft.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["page"]
    assert len(calls) == 2


def test_drafts_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    (tmp_path / f".page.partial-{socket.gethostname()}-x").mkdir()
    with drafted_file(tmp_path / "page") as draft:
        draft.write_text("whole")
    assert (tmp_path / "page").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2  # nobody can know whether the other's process lives


@pytest.mark.skipif(not kernels.available(), reason="no C compiler")
def test_a_compilation_that_was_killed_leaves_nothing_for_long(tmp_path: Path) -> None:
    code = "from evomerge.merging.tensors import kernels\n{}kernels._compiler()"
    dying = "import types; kernels.subprocess = types.SimpleNamespace(run=die, SubprocessError=OSError)\n"
    killed(code.format(dying), XDG_CACHE_HOME=str(tmp_path))
    folder = tmp_path / "evomerge" / "kernels"
    assert len(list(folder.iterdir())) == 1
    subprocess.run(
        [sys.executable, "-c", code.format("")],
        check=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert [p.suffix for p in folder.iterdir()] == [".so"]


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    fifo, loop, file = tmp_path / "fifo", tmp_path / "loop", tmp_path / "file"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    file.write_bytes(b"12345")
    for path, reason in (
        (fifo, "a FIFO instead of a regular file"),
        (tmp_path, "a folder instead of a regular file"),
        (Path("/dev/zero"), "a device instead of a regular file"),
        (Path("a\0b"), "embedded null byte"),
        (loop, "Too many levels"),
        (tmp_path / "x", "No such file"),
    ):
        with pytest.raises(OSError, match=reason):
            read_regular(path, 100)
    assert read_regular(file, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(file, 4)


def test_an_unknown_user_is_a_message(tmp_path: Path) -> None:
    assert expanded("~/a") == Path.home() / "a"
    with pytest.raises(ConfigError, match="there is no such user"):
        expanded("~nosuchuser/a")
