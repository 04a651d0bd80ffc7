"""The examples in the docstrings are run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from evomerge import evaluation, search

MODULES = [
    found.name
    for room in (search, evaluation)
    for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}.")
    if found.name != "evomerge.evaluation.vllm_weights"  # only vLLM imports it
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_hold(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
