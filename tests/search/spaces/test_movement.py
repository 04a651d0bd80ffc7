"""How far genes move the model: by the task vectors they scale, whatever the space."""

from __future__ import annotations

import numpy as np
import pytest

from evomerge.search.spaces.movement import CUTTING, DAMPED, movements, stretched
from evomerge.search.spaces.space import Coordinate
from tests.search.spaces.test_layer_path import space as layer_path
from tests.search.spaces.test_merge_space import TENSORS, inline, make

NORMS = {
    "a": {tensor: 1.0 + number for number, tensor in enumerate(TENSORS)},
    "b": {tensor: 0.0 if "layers.3." in tensor else 2.0 for tensor in TENSORS},
}


def lengths(*groups: tuple[str, str]) -> np.ndarray:
    """Of the task vectors of (source, part of the tensors' names)."""
    return np.array(
        [sum(norm**2 for tensor, norm in NORMS[s].items() if part in tensor) ** 0.5 for s, part in groups]
    )


def scaled(values: np.ndarray) -> np.ndarray:
    """The lengths of the coordinates of some movements."""
    found: np.ndarray = values**DAMPED
    return found / np.sqrt((found**2).mean())


def test_weights_move_the_model_by_their_task_vectors() -> None:
    space = make(inline(method="task_arithmetic", layers=1))
    found = movements(space, NORMS)
    assert found is not None
    groups = [
        (gene.source or "", f"layers.{i}.") for i in range(4) for gene in space.genes[2 * i : 2 * i + 2]
    ]
    outside = [(gene.source or "", "") for gene in space.genes[8:]]
    expected = lengths(*groups, *outside)
    for number, (source, _) in enumerate(outside):
        inside = lengths(*[(source, f"layers.{i}.") for i in range(4)])
        expected[8 + number] = np.sqrt(expected[8 + number] ** 2 - (inside**2).sum())
    assert found == pytest.approx(scaled(expected), rel=1e-4)
    assert found[7] == 0  # b has no task vector in layer 3


def test_what_cuts_task_vectors_counts_less_and_shared_genes_move_all_they_are_shared_by() -> None:
    genes = {
        "weight": {"low": 0, "high": 1, "per": ["source"]},
        "density": {"low": 0.2, "high": 0.7, "per": []},
    }
    found = movements(make(inline(genes=genes)), NORMS)
    whole = lengths(("a", ""), ("b", ""))
    assert found == pytest.approx(scaled(np.append(whole, 0.5 * CUTTING * np.linalg.norm(whole))), rel=1e-4)


def test_points_of_a_curve_move_the_layers_they_reach() -> None:
    genes = {"weight": {"low": 0, "high": 1, "curve": {"points": 2, "kind": "linear"}, "per": ["layers"]}}
    found = movements(make(inline(method="task_arithmetic", layers=1, genes=genes)), NORMS)
    assert found is not None
    by_layer = np.array(
        [np.linalg.norm(lengths(("a", f"layers.{i}."), ("b", f"layers.{i}."))) for i in range(4)]
    )
    first = np.linalg.norm(by_layer * np.array([1, 2 / 3, 1 / 3, 0]))
    last = np.linalg.norm(by_layer * np.array([0, 1 / 3, 2 / 3, 1]))
    assert found[1] / found[0] == pytest.approx((last / first) ** DAMPED, rel=1e-4)


def test_choices_keep_their_length_and_genes_of_every_method_have_one() -> None:
    space = make(inline(method={"choices": ["task_arithmetic", "ties"], "per": ["layers"]}, layers=1))
    found = movements(space, NORMS | {"b": NORMS["a"]})
    assert found is not None
    for gene, length in zip(space.genes, found, strict=True):
        assert length == 1.0 if gene.parameter == "method" else length > 0, gene.name
    continuous = [m for gene, m in zip(space.genes, found, strict=True) if gene.parameter != "method"]
    assert np.mean(np.square(continuous)) == pytest.approx(1, rel=1e-4)


def test_where_nothing_continuous_moves_genes_count_alike() -> None:
    space = make(inline(method="task_arithmetic"))
    assert movements(space, {source: dict.fromkeys(TENSORS, 0.0) for source in "ab"}) is None
    assert stretched(space.coordinates, None) == space.coordinates
    assert stretched([Coordinate(), Coordinate(levels=2)], [0.5, 1.0]) == (
        Coordinate(length=0.5),
        Coordinate(levels=2),
    )


def test_tensors_of_no_group_are_left_out() -> None:
    space = make(inline(method="task_arithmetic", outside={"embeddings": ["embed"], "norm": []}))
    more = {source: by_tensor | {"visual.patch.weight": 9.0} for source, by_tensor in NORMS.items()}
    assert movements(space, more) is not None


def test_layer_paths_have_no_movements() -> None:
    assert movements(layer_path(), {}) is None
    assert movements(layer_path(scale={"low": 0.5, "high": 2.0}), {}) is None
