"""The examples in the docstrings are run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from evomerge import delivery

MODULES = [
    module.name
    for module in pkgutil.walk_packages(delivery.__path__, f"{delivery.__name__}.")
    if not module.name.endswith((".wandb", ".mlflow", ".tensorboard"))  # optional packages
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_hold(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0
