"""The merges a careful person would try by hand. They are scored before the search starts.

They stand beside the winner in the report, they seed the optimizer where its space can express them,
and the verdict is a paired test of the winner against the best of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.errors import ConfigError, nearest
from evomerge.merging.recipe import Recipe, Setting, TensorGroup
from evomerge.search.ports import Named

SHORT = (
    "uniform average",
    "task arithmetic 0.3",
    "task arithmetic 0.6",
    "task arithmetic 0.4, equal norms",
    "TIES",
    "TIES 0.4, not normalised",
    "DARE-TIES",
    "SLERP",
    "Model Stock",
    "greedy soup",
)
"""The baselines of models that are costly to score."""

COSTLY = 50_000_000
"""Number of weights from which a model is costly to score."""

TESTED = 5
"""How many of the baselines of costly models are scored on `test`: the best on `search`."""

SOUP = "greedy soup"

BaselinesSpec = Literal["auto", "all"] | tuple[str, ...]
"""The `baselines` part of a run config."""

STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""The task-arithmetic grid: the weight every task vector gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which hand-made merges are scored. names: None for all of them. short: whether clearly worse ones leave
    early, and only the TESTED best on `search` are scored on `test`."""

    names: tuple[str, ...] | None = None
    short: bool = False

    def __contains__(self, name: str) -> bool:
        return self.names is None or name in self.names

    def as_data(self) -> dict[str, Any]:
        """Return it as a fact of the store."""
        return {"names": None if self.names is None else list(self.names), "short": self.short}

    @classmethod
    def from_data(cls, data: Mapping[str, Any] | None) -> Choice:
        """Return the choice of a stored run; runs begun before there was a choice scored all."""
        if data is None:
            return cls()
        names = data["names"]
        return cls(names=None if names is None else tuple(names), short=bool(data["short"]))


def choose(spec: BaselinesSpec, *, available: Sequence[str], weights: int) -> Choice:
    """Return which baselines a run scores.

    Args:
        spec: `auto`: all where a model has fewer than COSTLY weights, else the short list; `all`; or names.
        available: names of all hand-made merges of these sources.
        weights: number of the base model's weights.

    Raises:
        ConfigError: there is no such baseline.
    """
    if spec == "all" or (spec == "auto" and weights < COSTLY):
        return Choice()
    if spec == "auto":
        return Choice(names=tuple(name for name in SHORT if name in available), short=True)
    for name in spec:
        if name not in available:
            raise ConfigError(f"baselines: there is no {name!r}", fix=nearest(name, available))
    return Choice(names=tuple(name for name in available if name in spec))


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
    return Named(name=SOUP, recipe=_global(template, "linear", kept, weight=1.0))


def as_task_vectors(template: Recipe, sources: Sequence[str], model: str) -> Recipe:
    """Return a model's weights (the base's, or a source's) as a task-arithmetic merge of the sources."""
    weights = tuple(float(source == model) for source in sources)
    return _global(template, "task_arithmetic", sources, weight=weights)


def _global(template: Recipe, method: str, sources: Sequence[str], **parameters: Setting) -> Recipe:
    """One method with the same parameters for every tensor."""
    group = TensorGroup(method=method, sources=tuple(sources), parameters=parameters)
    return template.with_groups([group])
