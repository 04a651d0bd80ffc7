"""Facts are declared once: their keys, types and part in the digest, and the page that describes them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

import pytest

import evomerge
from evomerge.errors import StoreError
from evomerge.running.store import RunStore, facts

PACKAGE = Path(evomerge.__file__).parent
OPEN = ("running/store/facts.py",)
"""Where keys are spelled."""
WORDS = {fact.key for fact in facts.FACTS if "_" in fact.key} - {"batch_sizes", "warm_start"}
"""Keys that mean nothing else in the package: not names of settings or of arguments."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in OPEN:
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def test_the_page_has_the_table_of_the_declarations() -> None:
    page = (Path(__file__).parents[3] / "runs" / "README.md").read_text(encoding="utf-8")
    assert facts.as_table() in page


def test_keys_are_distinct() -> None:
    keys = [fact.key.split()[0] for fact in facts.FACTS]
    assert len(set(keys)) == len(keys)


def test_who_writes_a_fact_is_a_module() -> None:
    for fact in facts.FACTS:
        place = PACKAGE / fact.written_by.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), fact.key


def test_no_other_module_spells_a_key() -> None:
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in ("read_value", "write_value"), f"{name}:{node.lineno}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in WORDS, f"{name}:{node.lineno}: {node.value}"
                assert not re.search(r"\bkey (=|GLOB|LIKE) '", node.value), f"{name}:{node.lineno}"


def test_the_values_of_a_finished_run_have_the_declared_types(finished_run: Path) -> None:
    with RunStore.read(finished_run) as store:
        present = set()
        for fact in facts.FACTS:
            if isinstance(fact, facts.Fact) and (value := fact.get(store)) is not None:
                assert isinstance(value, get_origin(fact.type) or fact.type), fact.key
                present.add(fact.key)
        undeclared = {key for (key,) in store._db.execute("SELECT key FROM run")} - present
    later = {
        "answers",
        "distributions",
        "full_hashes",
        "batch_sizes",
        "warm_start",
        "stacks",
        "stop",
        "migrated",
        "sharing",
        "descent_plan",
        "gradient_seconds",
        "gradient_parts",
        "frugal",
        "pending",
        "judges",
        "proposed",
        "gradient RECIPE LOSS",
        "weights RECIPE",
    }
    assert present >= {fact.key for fact in facts.FACTS} - later
    assert all(key.startswith(("gradient ", "weights ")) for key in undeclared)


def test_a_fact_that_is_missing_where_it_is_needed(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, {}) as store:
        assert facts.NORMS.get(store) is None
        with pytest.raises(StoreError, match=r"no fact `norms` \(norm of each"):
            facts.NORMS.require(store)
        facts.NORMS.set(store, {})
        assert facts.NORMS.require(store) == {}


def test_facts_outside_the_digest_do_not_change_it(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, {facts.NORMS: {"a": 1.0}}) as store:
        before = store.digest()
        facts.CLOCK.set(store, {"limit": None})
        assert store.digest() == before
        facts.STOPPED.set(store, "budget used")
        assert store.digest() != before
    outside = [
        "clock",
        "config",
        "forward",
        "full_hashes",
        "genes",
        "gradient_seconds",
        "item_notes",
        "migrated",
        "sharing",
        "stop",
        "store_id",
        "task_files",
    ]
    assert facts.outside_digest() == outside
