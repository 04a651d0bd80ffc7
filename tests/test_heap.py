"""What libraries may keep of a worker's memory."""

from __future__ import annotations

import os

import pytest

from evomerge import heap

NAME = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def test_few_kernels_are_kept_unless_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setenv(NAME, "512")
    heap.bound_kernels()
    assert os.environ[NAME] == "512"
    monkeypatch.delenv(NAME)
    heap.bound_kernels()
    assert os.environ[NAME] == "64"
