"""Advice from the numbers of `interference`: rules, their thresholds and the sources of these.

All rules are in one table, `RULES`. Most thresholds are rules of thumb and say so. Advice names where to
start. It predicts no results: only scores on held-out items show those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from evomerge.merging.analysis.interference import Interference, Tally

Relation = Literal["empty", "same", "opposed", "aligned", "competing", "complementary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: the condition with its limit, the advice if it holds, and the source of the limit."""

    name: str
    when: str
    limit: float
    then: str
    source: str

    @property
    def condition(self) -> str:
        """The condition with its limit filled in."""
        return self.when.format(self.limit)


_THUMB = "rule of thumb"
RULES = {
    rule.name: rule
    for rule in (
        Rule(
            name="empty",
            when="a task vector is at most {:g} times as long as the longest",
            limit=0.01,
            then="leave the model out: it changes next to nothing",
            source=_THUMB,
        ),
        Rule(
            name="far",
            when="a task vector is at least {:g} times as long as the base",
            limit=0.5,
            then="check that it is a fine-tune of this base; if not, route between the models",
            source=f"{_THUMB}; averaging presumes a shared basin: Neyshabur et al. 2020, arXiv:2008.11687",
        ),
        Rule(
            name="same",
            when="the cosine of two task vectors is at least {:g}",
            limit=0.999,
            then="leave one out: together they would count twice",
            source=_THUMB,
        ),
        Rule(
            name="aligned",
            when="the cosine of two task vectors is at least {:g}",
            limit=0.3,
            then="average: linear, slerp or model_stock; global_weights, slerp_layers for two",
            source=f"{_THUMB}; averages of fine-tunes for one task: Wortsman et al. 2022, arXiv:2203.05482",
        ),
        Rule(
            name="opposed",
            when="the cosine of two task vectors is at most {:g}",
            limit=-0.1,
            then="ties or dare_ties with a weight per layer; ties_layers",
            source=f"{_THUMB}; interference of signs: Yadav et al. 2023, arXiv:2306.01708, section 3",
        ),
        Rule(
            name="undoing",
            when="the cosine of two task vectors is at most {:g}",
            limit=-0.3,
            then="retrain on the mixed data, or route between the models",
            source=f"{_THUMB}; negated task vectors remove skills: Ilharco et al. 2022, arXiv:2212.04089",
        ),
        Rule(
            name="competing",
            when="two tops overlap {:g} times as much as by chance, and their directions conflict",
            limit=2.0,
            then="ties or dare_ties; ties_layers",
            source=f"{_THUMB}; both change the same elements: Yadav et al. 2023, arXiv:2306.01708, section 3",
        ),
        Rule(
            name="conflict",
            when="directions conflict: they are opposite on at least {:g} of what both change (chance: 0.5)",
            limit=0.4,
            then="counts for `competing`",
            source=_THUMB,
        ),
        Rule(
            name="complementary",
            when="none of the above (cosines near {:g})",
            limit=0.0,
            then="add task vectors: task_arithmetic; task_arithmetic_layers",
            source="task vectors of different tasks are close to orthogonal: Ilharco et al. 2022, "
            "arXiv:2212.04089",
        ),
        Rule(
            name="uneven",
            when="the longest task vector is at least {:g} times as long as the shortest",
            limit=1.5,
            then="start from norm-equalised weights",
            source=_THUMB,
        ),
        Rule(
            name="hot",
            when="a layer's conflict is at least {:g} above the whole model's",
            limit=0.05,
            then="look at it first: give it to one model, or search a weight per layer",
            source=_THUMB,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One sentence and the rule it follows."""

    rule: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advised:
    """The advice on a set of models.

    verdict: one or two words.
    method, preset: where to start, from `merging.methods` and `search_spaces/`.
    relations: (i, j), positions of two models -> their relation.
    advice: sentences, each with the rule it follows.
    equal_weights: name -> the weight that gives all task vectors the same length, if lengths are uneven.
    """

    verdict: str
    method: str
    preset: str
    relations: Mapping[tuple[int, int], Relation]
    advice: tuple[Advice, ...]
    equal_weights: Mapping[str, float] = field(default_factory=dict)


def relation(tally: Tally, i: int, j: int, chance_overlap: float) -> Relation:
    """Return the relation between two models' task vectors: the first rule that holds."""
    norms, cosine = tally.norms, float(tally.cosine[i, j])
    if min(norms[i], norms[j]) <= RULES["empty"].limit * norms.max():
        return "empty"
    if cosine >= RULES["same"].limit:
        return "same"
    if cosine <= RULES["opposed"].limit:
        return "opposed"
    if cosine >= RULES["aligned"].limit:
        return "aligned"
    crowded = tally.overlap[i, j] >= RULES["competing"].limit * chance_overlap
    if crowded and tally.conflict[i, j] >= RULES["conflict"].limit:
        return "competing"
    return "complementary"


def advise(measured: Interference) -> Advised:
    """Return advice on where to start with these models, with the numbers it is based on.

    Args:
        measured: the result of `interference.measure`.

    Returns:
        A verdict, a method and preset to start from, the relation of every pair, and sentences that name
        their rules.
    """
    total = measured.total
    relations = {(i, j): relation(total, i, j, measured.chance_overlap) for i, j in measured.pairs}
    kinds = set(relations.values()) - {"empty"}
    strongest = min((float(total.cosine[pair]) for pair in measured.pairs), default=0.0)
    advice = _about_models(measured, total)
    advice += [
        Advice(rule="same", text=f"{_pair(measured, *p)} are the same up to their length: leave one out")
        for p, kind in relations.items()
        if kind == "same"
    ]
    if not kinds:
        verdict, method, preset = "nothing to merge", "passthrough", "global_weights"
    elif kinds & {"opposed", "competing"}:
        verdict, method, preset = "conflicting", "ties", "ties_layers"
        advice += _conflicts(measured, total, relations)
        if strongest <= RULES["undoing"].limit:
            verdict = "opposed"
    elif kinds <= {"aligned", "same"}:
        two = len(measured.models) == 2
        verdict = "aligned"
        method, preset = ("slerp", "slerp_layers") if two else ("model_stock", "global_weights")
        advice.append(_aligned(measured, total, method, preset))
    else:
        verdict, method, preset = "complementary", "task_arithmetic", "task_arithmetic_layers"
        advice.append(_complementary(measured, total, relations))
    weights = _equal_weights(measured, total)
    if weights:
        norms = [n for n in total.norms if n > RULES["empty"].limit * total.norms.max()]
        shown = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
        advice.append(
            Advice(
                rule="uneven",
                text=f"the longest task vector is {max(norms) / min(norms):.1f} times as long as the "
                f"shortest: start from weights in the ratio {shown}, which equalise the lengths (a run's "
                "baselines with equal norms do)",
            )
        )
    return Advised(
        verdict=verdict,
        method=method,
        preset=preset,
        relations=relations,
        advice=(*advice, *_layers(measured, total)),
        equal_weights=weights,
    )


def _about_models(measured: Interference, total: Tally) -> list[Advice]:
    advice = []
    for name, norm, relative in zip(measured.models, total.norms, total.relative, strict=True):
        if norm <= RULES["empty"].limit * total.norms.max():
            longest = total.norms.max()
            text = f"{name} changes next to nothing ({norm:.3g}, the longest {longest:.3g}): leave it out"
            advice.append(Advice(rule="empty", text=text))
        elif relative >= RULES["far"].limit:
            text = (
                f"{name} is {relative:.2f} times the base's length away from it: check that it is a "
                "fine-tune of this base. If it is not, don't merge; route between the models"
            )
            advice.append(Advice(rule="far", text=text))
    return advice


def _conflicts(
    measured: Interference, total: Tally, relations: Mapping[tuple[int, int], Relation]
) -> list[Advice]:
    advice = []
    for (i, j), kind in relations.items():
        cosine, pair = float(total.cosine[i, j]), _pair(measured, i, j)
        apart = f"opposite on {_percent(total.conflict[i, j])} of what both change"
        if kind == "opposed" and cosine <= RULES["undoing"].limit:
            text = (
                f"{pair} undo each other: cosine {cosine:.2f}, {apart}. Weights trade one for the "
                "other: retrain on the mixed data, or route between them"
            )
            advice.append(Advice(rule="undoing", text=text))
        elif kind == "opposed":
            text = (
                f"{pair} change in opposite directions: cosine {cosine:.2f}, {apart}. Start from ties or "
                "dare_ties with a weight per layer (ties_layers, dare_ties_layers)"
            )
            advice.append(Advice(rule="opposed", text=text))
        elif kind == "competing":
            text = (
                f"{pair} change the same elements most: tops overlap {_percent(total.overlap[i, j])} (chance "
                f"{_percent(measured.chance_overlap)}), {apart}. Start from ties or dare_ties "
                "(ties_layers, dare_ties_layers)"
            )
            advice.append(Advice(rule="competing", text=text))
    text = (
        "if no candidate keeps every skill you need: retrain on the mixed data, or route between the models"
    )
    return [*advice, Advice(rule="undoing", text=text)]


def _aligned(measured: Interference, total: Tally, method: str, preset: str) -> Advice:
    return Advice(
        rule="aligned",
        text=f"the models moved the same way ({_cosines(measured, total)}): start from an average; {method} "
        f"with {preset}, and the baselines uniform average and greedy soup",
    )


def _complementary(
    measured: Interference, total: Tally, relations: Mapping[tuple[int, int], Relation]
) -> Advice:
    pairs = [pair for pair, kind in relations.items() if kind == "complementary"]
    overlaps = [float(total.overlap[pair]) for pair in pairs]
    conflicts = [float(total.conflict[pair]) for pair in pairs]
    near = [_pair(measured, *pair) for pair, kind in relations.items() if kind in ("aligned", "same")]
    besides = f" {', '.join(near)} move together and may share their weight." if near else ""
    return Advice(
        rule="complementary",
        text=f"the models change different things ({_cosines(measured, total)}; tops overlap "
        f"{_range(overlaps)}, chance {_percent(measured.chance_overlap)}; opposite on {_range(conflicts)} of "
        f"what both change, chance 50 %).{besides} Start from task_arithmetic with task_arithmetic_layers, "
        "or with global_weights where a candidate is expensive to score",
    )


def _equal_weights(measured: Interference, total: Tally) -> dict[str, float]:
    norms = total.norms
    not_empty = norms > RULES["empty"].limit * norms.max()
    if not not_empty.any() or norms[not_empty].max() < RULES["uneven"].limit * norms[not_empty].min():
        return {}
    mean = float(norms[not_empty].mean())
    return {
        name: mean / float(n) for name, n, ok in zip(measured.models, norms, not_empty, strict=True) if ok
    }


def _layers(measured: Interference, total: Tally) -> list[Advice]:
    """Name the layers with the most conflict, whether it is high or not."""
    places = {place: tally.mean_conflict for place, tally in measured.by_layer().items()}
    ranked = sorted(
        (
            (conflict, place)
            for place, conflict in places.items()
            if place is not None and not math.isnan(conflict)
        ),
        key=lambda conflict_at: (-conflict_at[0], conflict_at[1]),
    )
    if len(ranked) < 2:
        return []
    mean = total.mean_conflict
    hot = [(c, layer) for c, layer in ranked if c >= mean + RULES["hot"].limit]
    shown = ", ".join(f"layer {layer} {_percent(c)}" for c, layer in (hot or ranked)[:3])
    if hot:
        text = (
            f"most conflict: {shown} (whole model {_percent(mean)}). A weight per layer lets a search give "
            "them to one model"
        )
    else:
        text = f"most conflict: {shown}; no layer stands out (whole model {_percent(mean)}, chance 50 %)"
    return [Advice(rule="hot", text=text)]


def _pair(measured: Interference, i: int, j: int) -> str:
    return f"{measured.models[i]} and {measured.models[j]}"


def _cosines(measured: Interference, total: Tally) -> str:
    values = [float(total.cosine[pair]) for pair in measured.pairs]
    low, high = (f"{round(value, 2) + 0.0:.2f}" for value in (min(values), max(values)))
    return f"cosine {low}" if low == high else f"cosines {low} to {high}"


def _range(values: list[float]) -> str:
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return "-"
    low, high = float(np.min(numbers)), float(np.max(numbers))
    return _percent(low) if round(100 * low) == round(100 * high) else f"{100 * low:.0f} to {_percent(high)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if not math.isnan(share) else "-"
