"""The cache of compiled kernels: nothing is loaded that another user could have written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evomerge.merging.tensors import kernels

SHAPE = ("SOURCES(S)=S(0,f32,0)", "K=1", "OUT=f32")
SOMEBODY = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
compiles = pytest.mark.skipif(not kernels.available(), reason="no C compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder of kernels of a home of its own."""
    tmp_path.chmod(0o700)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    kernels._folder.cache_clear()
    yield tmp_path / ".cache" / "evomerge" / "kernels"
    folder = kernels._folder()
    if not folder.is_relative_to(tmp_path):
        shutil.rmtree(folder)
    monkeypatch.undo()
    kernels._folder.cache_clear()


def built() -> Path:
    compiler = kernels._compiler()
    assert compiler is not None
    return kernels._built(compiler, "blend", SHAPE)


def test_the_folder_is_private(cache: Path) -> None:
    assert kernels._folder() == cache
    assert [folder.stat().st_mode & 0o777 for folder in (cache, cache.parent)] == [0o700, 0o700]


def test_a_folder_of_an_older_version_becomes_private(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o755)
    assert kernels._folder() == cache
    assert cache.stat().st_mode & 0o777 == 0o700


def _writable_by_all(cache: Path) -> None:
    cache.chmod(0o777)


def _writable_by_the_group(cache: Path) -> None:
    cache.chmod(0o770)


def _in_a_folder_that_others_write(cache: Path) -> None:
    cache.parent.chmod(0o777)


def _in_a_home_that_others_write(cache: Path) -> None:
    cache.parents[2].chmod(0o777)


def _a_link(cache: Path) -> None:
    cache.rename(cache.with_name("elsewhere"))
    cache.symlink_to(cache.with_name("elsewhere"))


def _below_a_link_to_a_folder_that_others_write(cache: Path) -> None:
    target = cache.parents[2] / "shared" / "cache"
    target.parent.mkdir()
    cache.parents[1].rename(target)
    cache.parents[1].symlink_to(target)
    target.parent.chmod(0o777)


def _of_somebody_else(cache: Path) -> None:
    os.chown(cache, SOMEBODY, SOMEBODY)


def _below_a_folder_of_somebody_else(cache: Path) -> None:
    os.chown(cache.parent, SOMEBODY, SOMEBODY)


def _a_file(cache: Path) -> None:
    cache.rmdir()
    cache.touch()


DANGERS: list[Callable[[Path], None]] = [
    _writable_by_all,
    _writable_by_the_group,
    _in_a_folder_that_others_write,
    _in_a_home_that_others_write,
    _a_link,
    _below_a_link_to_a_folder_that_others_write,
    _a_file,
]


@pytest.mark.parametrize(
    "spoil",
    [
        *DANGERS,
        *(pytest.param(d, marks=as_root) for d in (_of_somebody_else, _below_a_folder_of_somebody_else)),
    ],
)
def test_a_folder_that_others_could_write_is_not_used(cache: Path, spoil: Callable[[Path], None]) -> None:
    cache.mkdir(parents=True, mode=0o700)
    spoil(cache)
    folder = kernels._folder()
    assert not folder.resolve().is_relative_to(cache.parents[2].resolve())
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_sticky_folder_above_is_no_danger(cache: Path) -> None:
    cache.parents[2].chmod(0o1777)
    assert kernels._folder() == cache


def test_a_home_that_is_missing_or_cannot_be_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for home in (str(tmp_path / "file"), "/proc/none", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        monkeypatch.setenv("HOME", "/proc/none")
        kernels._folder.cache_clear()
        folder = kernels._folder()
        assert folder.is_dir()
        assert "evomerge-kernels" in folder.name
        shutil.rmtree(folder)
    kernels._folder.cache_clear()


@compiles
@pytest.mark.usefixtures("cache")
def test_a_file_that_others_could_write_is_made_again() -> None:
    path = built()
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o777)
    before = path.stat().st_ino
    again = built()
    assert again.stat().st_mode & 0o777 == 0o700
    assert again == path or before != again.stat().st_ino


@compiles
@as_root
@pytest.mark.usefixtures("cache")
def test_a_file_of_somebody_else_is_made_again() -> None:
    path = built()
    os.chown(path, SOMEBODY, SOMEBODY)
    assert built().stat().st_uid == os.geteuid()


@compiles
@pytest.mark.usefixtures("cache")
def test_a_link_in_the_cache_is_not_followed(tmp_path: Path) -> None:
    path = built()
    path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    assert not built().is_symlink()
