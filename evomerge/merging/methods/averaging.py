"""Methods that average the models themselves: linear, model_stock, and passthrough of a single one.

All but filter-wise Model Stock are blends: their coefficients need no tensors, or only inner products of
whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.errors import ConfigError
from evomerge.merging.methods.blend import Blend, Statistics, TensorStatistics, run, weighted_sum
from evomerge.merging.methods.declaration import Parameter, blended, method
from evomerge.merging.methods.reduction import as_rows, cosines, row_cosines

if TYPE_CHECKING:
    from torch import Tensor

CANCELLED = 1e-3
"""Weights cancel when |sum| is at most this share of the sum of their absolute values."""
LOWEST = -0.9
"""Model Stock keeps mean cosine * (number of task vectors - 1) at or above this: its pole is at -1."""
WEIGHT_LIMIT = 1e4
"""Bound on weights and scales. Larger values exceed float16's range and are probably typing errors."""
SHARE = Parameter(
    name="weight", default=1.0, low=0.0, high=WEIGHT_LIMIT, per_source=True, help="share of each model"
)


@blended(
    "linear",
    Parameter(
        name="weight",
        default=1.0,
        low=-WEIGHT_LIMIT,
        high=WEIGHT_LIMIT,
        per_source=True,
        help="share of each model",
    ),
    Parameter(name="normalize", default=True, kind="flag", help="divide by the sum of the weights"),
    paper="Wortsman et al. 2022, Model soups, arXiv:2203.05482",
    inputs="models",
)
def linear(tensors: Statistics, *, weight: tuple[float, ...], normalize: bool = True) -> Blend:
    """Average the models with weights: sum(w x) / sum(w).

    The uniform soup of the paper (section 2) is all weights equal; other weights make the learned soup
    (its equation 1). Weights are divided by their sum in double precision, before tensors are multiplied, so
    one source with any non-zero weight is copied exactly.

    Raises ConfigError where `normalize` would divide by a sum below 1/1000 of the weights' size.

    >>> import torch
    >>> linear(None, [torch.ones(2), torch.zeros(2)], weight=(1.0, 3.0))
    tensor([0.2500, 0.2500])
    """
    if not normalize:
        return Blend(weights=weight)
    total = math.fsum(weight)
    if abs(total) <= CANCELLED * math.fsum(map(abs, weight)):
        raise ConfigError(
            "linear: the weights cancel, so they can't be normalised",
            expected="weights whose sum is not close to 0",
            got=f"weights {', '.join(f'{w:g}' for w in weight)} with sum {total:g}",
            fix="change a weight, set normalize: false, or use task_arithmetic to subtract a model",
        )
    return Blend(weights=tuple(w / total for w in weight))


@blended(
    "passthrough",
    Parameter(
        name="scale",
        default=1.0,
        low=-WEIGHT_LIMIT,
        high=WEIGHT_LIMIT,
        per_source=True,
        help="factor of the weights",
    ),
    paper="none; mergekit's passthrough, Goddard et al. 2024, arXiv:2403.13257",
    inputs="models",
    sources=(1, 1),
)
def passthrough(tensors: Statistics, *, scale: tuple[float, ...]) -> Blend:
    """Copy one model's weights, times a factor.

    >>> import torch
    >>> passthrough(None, [torch.ones(2)], scale=(0.5,))
    tensor([0.5000, 0.5000])
    """
    return Blend(weights=scale)


def _stock(tensors: Statistics, *, filter_wise: bool = False) -> Blend | None:
    """Return the blend of whole-tensor Model Stock, or None with filter-wise ratios."""
    if filter_wise:
        return None
    count = tensors.count
    cos = cosines(tensors.gram())
    pairs = [cos[i][j] for i in range(count) for j in range(i)]
    c = max(math.fsum(pairs) / len(pairs), LOWEST / (count - 1))
    ratio = count * c / (1.0 + (count - 1) * c)
    return Blend(weights=(ratio / count,) * count)


@method(
    "model_stock",
    Parameter(
        name="filter_wise", default=False, kind="flag", help="one ratio per row instead of one per tensor"
    ),
    paper="Jang et al. 2024, Model Stock, arXiv:2403.19522",
    inputs="task_vectors",
    sources=(2, None),
    blend=_stock,
    by_rows=True,
)
def model_stock(base: Tensor, tensors: Sequence[Tensor], *, filter_wise: bool = False) -> Tensor:
    """Move from the base towards the models' mean as far as their agreement allows.

    With c the mean pairwise cosine of the N task vectors of this tensor, the ratio is
    t = N c / (1 + (N - 1) c) (equation 5 of the paper, and its N-model form in appendix B) and the result
    base + t * mean(task vectors). With `filter_wise`, c and t are those of each row (the last dimension)
    by itself; a tensor of one dimension is one row.

    Deviation: the formula has a pole at c = -1 / (N - 1), where the task vectors cancel; c is kept at or
    above 0.9 of that, so |t| <= 9 N / (N - 1). The paper assumes c >= 0.

    >>> import torch
    >>> model_stock(torch.zeros(2), [torch.ones(2), torch.ones(2)])
    tensor([1., 1.])
    """
    if not filter_wise:
        blend = _stock(TensorStatistics(tensors))
        assert blend is not None
        return run(blend, base, tensors)
    count = len(tensors)
    cos = row_cosines(tensors).clamp(min=LOWEST / (count - 1))
    ratios = (count * cos / (1.0 + (count - 1) * cos)).to(base.dtype)
    mix = weighted_sum(tensors, (1.0 / count,) * count)
    mix = (as_rows(mix) * ratios[:, None]).view(base.shape)
    mix += base
    return mix
