"""The shape of the package: import circles, lengths of files and functions, class names, plain words."""

from __future__ import annotations

import ast
import graphlib
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "evomerge").rglob("*.py"))
DIALECT = re.compile(
    r"\b(nobody|somebody|whoever|listened to|(was|were|is|are) told|who wins|has the say|good for nothing)\b",
    re.IGNORECASE,
)
"""Phrases that a reader whose second language is English has to read twice."""


def test_there_is_no_import_circle() -> None:
    """Lazy and type-only imports count."""
    graph = grimp.build_graph("evomerge", exclude_type_checking_imports=False)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    order = list(graphlib.TopologicalSorter(imports).static_order())  # CycleError names a circle
    assert set(order) == graph.modules


def test_files_are_of_a_readable_length() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 600} == {}
    assert statistics.median(lengths.values()) <= 200


def test_functions_are_of_a_readable_length() -> None:
    long = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= 60
    ]
    assert long == []


def test_a_class_name_stands_for_one_thing() -> None:
    names = Counter(
        node.name
        for file in FILES
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def _texts() -> Iterator[tuple[str, str]]:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", node.value
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("runs/*.md")]
    for page in sorted([*pages, *ROOT.glob("evomerge/**/*.jinja")]):
        yield str(page.relative_to(ROOT)), page.read_text()


def test_texts_are_in_plain_words() -> None:
    """Messages, docstrings, templates and pages."""
    bad = [f"{place}: {match[0]}" for place, text in _texts() if (match := DIALECT.search(text))]
    assert bad == []
