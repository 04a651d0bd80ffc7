"""The merges a careful person would try by hand. They are scored before the search starts.

They stand beside the winner in the report, they seed the optimizer where its space can express them,
and the verdict is a paired test of the winner against the best of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from evomerge.merging.recipe import Recipe, Setting, TensorGroup
from evomerge.search.ports import Named

STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""The task-arithmetic grid: the weight every task vector gets."""


def parents(template: Recipe, sources: Sequence[str]) -> list[Named]:
    """Return the base (first) and every source, each as an exact copy of its weights."""
    assert template.base is not None
    return [
        Named(name=n, recipe=_global(template, "linear", [n], weight=1.0)) for n in (template.base, *sources)
    ]


def hand_made(template: Recipe, sources: Sequence[str], norms: Mapping[str, float]) -> list[Named]:
    """Return the standard hand-made merges of all sources.

    Args:
        template: Gives models, base, dtype, tokenizer and seed of every recipe.
        sources: Names of the models to merge, without the base.
        norms: The Frobenius norm of every source's task vector. The "equal norms" grid scales each task
            vector to their mean before weighting, so that no fine-tune dominates by its size alone.

    Returns:
        Named recipes: uniform average, task-arithmetic grids, TIES, DARE-TIES, SLERP for two sources, Model
        Stock for two or more.
    """
    count = len(sources)
    mean_norm = sum(norms[s] for s in sources) / count
    equal = tuple(float(f"{mean_norm / norms[s]:.6g}") if norms[s] > 0 else 0.0 for s in sources)
    named = [("uniform average", _global(template, "linear", sources, weight=1.0))]
    for strength in STRENGTHS:
        plain = _global(template, "task_arithmetic", sources, weight=strength)
        named.append((f"task arithmetic {strength:g}", plain))
    for strength in STRENGTHS:
        weights = tuple(float(f"{strength * e:.6g}") for e in equal)
        scaled = _global(template, "task_arithmetic", sources, weight=weights)
        named.append((f"task arithmetic {strength:g}, equal norms", scaled))
    # TIES as in its paper: keep the top 20 %, disjoint mean, lambda 1 (Yadav et al. 2023, section 4).
    named.append(("TIES", _global(template, "ties", sources, weight=1.0, density=0.2, normalize=True)))
    named.append(
        ("DARE-TIES", _global(template, "dare_ties", sources, weight=1.0, density=0.5, normalize=True))
    )
    # The same as plain sums, whose weights are absolute as in task arithmetic: spaces of these methods do not
    # normalise, because otherwise many genomes would be one model, and need a point to start from.
    for name, method in (("TIES", "ties"), ("DARE-TIES", "dare_ties")):
        summed = _global(template, method, sources, weight=0.4, density=0.5, normalize=False)
        named.append((f"{name} 0.4, not normalised", summed))
    if count == 2:
        named.append(("SLERP", _global(template, "slerp", sources, t=0.5)))
    if count >= 2:
        named.append(("Model Stock", _global(template, "model_stock", sources)))
    return [Named(name=name, recipe=recipe) for name, recipe in named]


def greedy_soup(
    template: Recipe, sources: Sequence[str], losses: Mapping[str, float], loss_of: Callable[[Recipe], float]
) -> Named:
    """Return the greedy soup (Wortsman et al. 2022, algorithm 1) over the sources.

    Sources enter in the order of their own losses; each stays if the average with it is no worse.
    """
    ranked = sorted(sources, key=lambda name: (losses[name], name))
    kept, best = [ranked[0]], losses[ranked[0]]
    for name in ranked[1:]:
        more = [n for n in sources if n in kept or n == name]  # in this order all of them are one recipe
        loss = loss_of(_global(template, "linear", more, weight=1.0))
        if loss <= best:
            kept, best = more, loss
    return Named(name="greedy soup", recipe=_global(template, "linear", kept, weight=1.0))


def as_task_vectors(template: Recipe, sources: Sequence[str], model: str) -> Recipe:
    """Return a model's weights (the base's, or a source's) as a task-arithmetic merge of the sources."""
    weights = tuple(float(source == model) for source in sources)
    return _global(template, "task_arithmetic", sources, weight=weights)


def _global(template: Recipe, method: str, sources: Sequence[str], **parameters: Setting) -> Recipe:
    """One method with the same parameters for every tensor."""
    group = TensorGroup(method=method, sources=tuple(sources), parameters=parameters)
    return template.with_groups([group])
