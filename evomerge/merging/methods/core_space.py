"""core_space: LoRA adapters of one base, merged in the small space that their factors span."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merging.methods.blend import Blend, Ranks, run
from evomerge.merging.methods.declaration import Parameter, method
from evomerge.merging.methods.reduction import one_thread
from evomerge.merging.methods.spectral import factors
from evomerge.merging.methods.task_vectors import LAMBDA, TOP_DENSITY, WEIGHT, normalize_by

if TYPE_CHECKING:
    from torch import Tensor

LowRankUpdate = tuple["Tensor", "Tensor"]
"""B (m, r) and A (r, n) of an update B A."""


@method(
    "core_space",
    WEIGHT,
    TOP_DENSITY,
    normalize_by(True),
    Parameter(
        name="elect", default=True, kind="flag", help="TIES on the cores; false: task arithmetic on them"
    ),
    LAMBDA,
    paper="Panariello et al. 2025, Low-rank model merging in core space, arXiv:2509.17786",
    inputs="task_vectors",
    factored=True,
)
def core_space(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weight: tuple[float, ...],
    density: tuple[float, ...],
    normalize: bool = True,
    elect: bool = True,
    lambda_: float = 1.0,
    updates: Sequence[LowRankUpdate | None] | None = None,
) -> Tensor:
    """Merge LoRA adapters of one base by TIES in the space that their factors span.

    For updates B_k A_k, with orthonormal bases U of all B and V of all A' (from the singular value
    decompositions of the stacks), the cores U' B_k A_k V are small matrices. TIES merges their elements into
    C, and the merge moves by U C V'. No update is multiplied out.

    Deviations: task vectors have weights, as in `ties`. Tensors that an adapter stores whole, and biases, are
    merged by TIES on their own elements. With `elect: false` and no density the merge is task arithmetic,
    because a change of basis changes no sum.

    >>> import torch
    >>> one = (torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0, 0.0]]))
    >>> core_space(torch.zeros(2, 2), (), weight=(1.0,), density=(1.0,), updates=[one])
    tensor([[2., 0.],
            [0., 0.]])
    """
    import torch

    def merged(vectors: Sequence[Tensor], origin: Tensor | None) -> Tensor:
        masks = tuple(Ranks(last=int(share * vectors[0].numel())) for share in density)
        return run(
            Blend(weights=weight, masks=masks, elect=elect, mean=elect and normalize, scale=lambda_),
            origin,
            vectors,
        )

    if updates is None:
        return merged(tensors, base)
    changes = [update for update in updates if update is not None]
    if not changes:
        return base.clone()
    if not all(bool(part.isfinite().all()) for change in changes for part in change):
        return base * math.nan  # which is refused with the tensor's name
    with one_thread():
        left = factors(torch.cat([up for up, _ in changes], dim=1))[0]
        right = factors(torch.cat([down for _, down in changes]))[2].T
        cores = [
            torch.zeros(left.shape[1], right.shape[1])
            if update is None
            else (left.T @ update[0]) @ (update[1] @ right)
            for update in updates
        ]
        return base + left @ merged(cores, None) @ right.T
