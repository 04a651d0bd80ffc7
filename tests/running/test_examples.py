"""The examples in the docstrings of `running` are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ["budget", "clock", "forecast", "observers", "retries"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"evomerge.running.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
