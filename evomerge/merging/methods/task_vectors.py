"""Methods that add task vectors to the base: task_arithmetic, ties, dare_linear, dare_ties.

All four, and those in `sparse`, are one pipeline: sparsify each task vector, weight it, keep the
elements that agree with the majority sign (the ties methods), sum, divide by the weights that took part
(`normalize`), scale by `lambda` and add the base. See `blend` for the steps and their guards.
"""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.merging.methods.averaging import WEIGHT_LIMIT
from evomerge.merging.methods.blend import Blend, Draws, Ranks, Statistics, normalised
from evomerge.merging.methods.declaration import Parameter, blended
from evomerge.merging.methods.draws import STEPS

WEIGHT = Parameter(
    name="weight",
    default=1.0,
    low=-WEIGHT_LIMIT,
    high=WEIGHT_LIMIT,
    per_source=True,
    help="factor of each task vector; negative ones subtract it",
)
LAMBDA = Parameter(
    name="lambda", default=1.0, low=-WEIGHT_LIMIT, high=WEIGHT_LIMIT, help="factor of the merged task vector"
)


def density_of(help: str) -> Parameter:
    return Parameter(name="density", default=1.0, low=0.0, high=1.0, per_source=True, help=help)


def normalize_by(default: bool) -> Parameter:
    return Parameter(
        name="normalize", default=default, kind="flag", help="divide by the weights that took part"
    )


TOP_DENSITY = density_of("share of each task vector's elements kept, the largest ones")
RANDOM_DENSITY = density_of("probability of keeping an element of a task vector")
RESCALE = Parameter(
    name="rescale", default=True, kind="flag", help="divide what is kept by the density (the mean stays)"
)


@blended(
    "task_arithmetic",
    WEIGHT,
    normalize_by(False),
    LAMBDA,
    paper="Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089",
    inputs="task_vectors",
)
def task_arithmetic(
    tensors: Statistics,
    *,
    weight: tuple[float, ...],
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Blend:
    """Add weighted task vectors to the base: base + lambda * sum(w d).

    Section 3 of the paper: one weight of 1 returns the model, a negative one forgets its task.

    >>> import torch
    >>> task_arithmetic(torch.ones(2), [torch.ones(2), torch.ones(2)], weight=(0.5, -2.0))
    tensor([-0.5000, -0.5000])
    """
    return Blend(weights=normalised(weight, normalize), scale=lambda_)


@blended(
    "ties",
    WEIGHT,
    TOP_DENSITY,
    normalize_by(True),
    LAMBDA,
    paper="Yadav et al. 2023, TIES-Merging, arXiv:2306.01708",
    inputs="task_vectors",
)
def ties(
    tensors: Statistics,
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Blend:
    """Trim task vectors to their largest elements, elect a sign per element, average who agrees.

    Algorithm 1 of the paper: trim to the int(density * n) largest magnitudes (ties: lowest index first),
    elect the sign of the sum of the weighted task vectors (a sum of 0 elects plus), then the mean over
    those whose weighted element has that sign; zeros never take part.

    Deviations: task vectors have weights, as in mergekit; the divisor is the sum of the weights that
    took part, guarded as `blend` says. With weights of one sign the guard never acts and
    no element exceeds lambda times the largest task vector element there.

    Deviations from mergekit: with `dtype: bfloat16` it casts the models on load and computes in that type, so
    task vectors and sums are rounded; here both are float32, and only the result is rounded. Differences of
    bfloat16 models have few distinct magnitudes, so many are equal where they are trimmed: mergekit keeps
    those that torch's topk returns, here the lowest indices are kept. The paper says neither, and float32
    is closer to its formula.

    >>> import torch
    >>> vectors = [torch.tensor([4.0, -1.0]), torch.tensor([2.0, 3.0])]
    >>> ties(torch.zeros(2), vectors, weight=(1.0, 1.0), density=(1.0, 1.0))
    tensor([3., 3.])
    """
    masks = tuple(Ranks(last=int(share * tensors.size)) for share in density)
    return Blend(weights=weight, masks=masks, elect=True, mean=normalize, scale=lambda_)


@blended(
    "dare_linear",
    WEIGHT,
    RANDOM_DENSITY,
    normalize_by(False),
    RESCALE,
    LAMBDA,
    paper="Yu et al. 2024, Language models are super Mario (DARE), arXiv:2311.03099",
    inputs="task_vectors",
    random=True,
)
def dare_linear(
    tensors: Statistics,
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    keys: Sequence[int],
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Blend:
    """Drop elements of the task vectors at random, rescale the rest, add them to the base.

    Section 3.1 of the paper, with density = 1 - p: what is kept is divided by the density, so the mean
    over all masks is task arithmetic. Densities are rounded to multiples of 2^-16, for the draws and for
    the division alike. (mergekit rescales by the ratio of L1 norms instead.)

    >>> import torch
    >>> dare_linear(torch.zeros(99), [torch.ones(99)], weight=(1.0,), density=(0.5,), keys=[1]).unique()
    tensor([0., 2.])
    """
    masks = tuple(_draws(key, share, rescale) for key, share in zip(keys, density, strict=True))
    return Blend(weights=normalised(weight, normalize), masks=masks, scale=lambda_)


@blended(
    "dare_ties",
    WEIGHT,
    RANDOM_DENSITY,
    normalize_by(False),
    RESCALE,
    LAMBDA,
    paper="Yu et al. 2024, arXiv:2311.03099, with the sign election of arXiv:2306.01708",
    inputs="task_vectors",
    random=True,
)
def dare_ties(
    tensors: Statistics,
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    keys: Sequence[int],
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Blend:
    """Drop elements of the task vectors at random, then elect signs and merge as TIES does.

    >>> import torch
    >>> dare_ties(torch.zeros(2), [torch.ones(2)], weight=(0.5,), density=(1.0,), keys=[1])
    tensor([0.5000, 0.5000])
    """
    masks = tuple(_draws(key, share, rescale) for key, share in zip(keys, density, strict=True))
    return Blend(weights=weight, masks=masks, elect=True, mean=normalize, scale=lambda_)


def _draws(key: int, density: float, rescale: bool) -> Draws:
    share = round(density * STEPS)
    return Draws(key=key, share=share, factor=STEPS / share if rescale and share else 1.0)
