"""The shape of the package: no import circle anywhere, lazy and type-only imports counted."""

from __future__ import annotations

import graphlib

import grimp


def test_there_is_no_import_circle() -> None:
    graph = grimp.build_graph("evomerge", exclude_type_checking_imports=False)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    order = list(graphlib.TopologicalSorter(imports).static_order())  # CycleError names a circle
    assert set(order) == graph.modules
