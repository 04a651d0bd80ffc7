"""Candidates merged on a GPU: sources that stay there, one pass per tensor, the bits of the processor.

`DeviceMerger.merge` makes the tensors of a recipe that are blends (see `methods.blend`) with gpu_kernels.py,
directly in the live model, and says which ones are left for the processor. Left are: methods and parameters
that are no blend, adapters merged by their factors, whole numbers, tensors that are not finite (the processor
says what is wrong with them), and everything once a kernel has failed.

What a method knows of whole tensors (inner products, sorted magnitudes) is computed by the processor's own
code and cached in `WarmInputs`. Nothing waits for the GPU before all tensors of a recipe are under way.

Sources are kept on the GPU from their first use on while `ROOM` of its memory stays free for forward passes;
the others are sent through pinned memory, tensor by tensor, each time they are read. `give_way` and
lack of memory while merging free them.

Before a form of kernel is trusted, the processor merges one of its tensors, too. Where a bit differs, the
processor merges everything from then on, and the log says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from evomerge.errors import ConfigError, UserError
from evomerge.merging.methods.blend import Blend, Draws, Ranks
from evomerge.merging.methods.draws import CHUNK
from evomerge.merging.methods.selection import EVERYTHING, Boundary
from evomerge.merging.recipe import Recipe
from evomerge.merging.sources.arrays import WeightArray, to_tensor
from evomerge.merging.tensors.inputs import Difference, WarmInputs
from evomerge.merging.tensors.kernels import Operand
from evomerge.merging.tensors.merge_tensor import Storage, StoredStatistics, Task, merge_tensor
from evomerge.merging.tensors.threads import each

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
ROOM = 0.2
"""Share of a GPU's memory that kept sources leave free: forward passes need it."""
MOST_SOURCES = 16
"""Sources up to which a tensor is merged on a GPU; a kernel holds a block of each in registers."""
ENOUGH = 8 * CHUNK
"""Number of elements from which a tensor shows whether a form of kernel is right."""
NO_TOP = Boundary(math.nan, EVERYTHING.ties)
EXACT: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}


def installed() -> bool:
    """Say whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def available(device: str) -> bool:
    """Say whether candidates can be merged on a device: a GPU, or any with TRITON_INTERPRET=1 (for tests)."""
    return installed() and (device.startswith("cuda") or os.environ.get("TRITON_INTERPRET") == "1")


def merges_there(merge_on: str, device: str) -> bool:
    """Say whether candidates are merged on the live model's device.

    merge_on: as in the executor's settings. Raises ConfigError for "device" where that can't be.
    """
    if merge_on == "device" and not available(device):
        on_gpu = device.startswith("cuda")
        raise ConfigError(
            f"executor.merge_on: device, but candidates can't be merged on {device}",
            expected="a CUDA GPU, and Triton",
            got="Triton is not installed" if on_gpu else f"device {device}",
            fix="pip install 'evomerge[triton]' (on Linux), or set executor.merge_on: auto"
            if on_gpu
            else "set executor.merge_on: auto",
        )
    return merge_on == "device" or (merge_on == "auto" and device.startswith("cuda") and available(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A tensor to be merged on the device. boundaries: limit and top of each source, where ranks decide."""

    name: str
    place: Storage
    size: int
    task: Task
    blend: Blend
    boundaries: tuple[tuple[Boundary, Boundary], ...]

    @property
    def ranked(self) -> bool:
        return bool(self.boundaries)

    @property
    def topped(self) -> bool:
        return any(top is not NO_TOP for _, top in self.boundaries)

    @property
    def counted(self) -> bool:
        """Whether elements that equal a boundary may have to be told apart."""
        return any(b.ties < EVERYTHING.ties for pair in self.boundaries for b in pair)

    def tables(self) -> tuple[WeightArray, WeightArray]:
        """Return the settings of the sources for gpu_kernels.py, two tables of a row per source.

        float32: weight, size, factor, magnitudes of limit and top. int64: ties of limit and top, the halves
        of the key, share.
        """
        blend, count = self.blend, len(self.task.reads)
        reals = numpy.zeros((count, 5), dtype=numpy.float32)
        whole = numpy.zeros((count, 5), dtype=numpy.int64)
        reals[:, 0], reals[:, 1], reals[:, 2] = blend.weights, blend.sizes, 1.0
        for i, (limit, top) in enumerate(self.boundaries):
            reals[i, 3:] = limit.magnitude, top.magnitude
            whole[i, :2] = limit.ties, top.ties
        for i, rule in enumerate(blend.masks):
            if isinstance(rule, Draws):
                reals[i, 2] = rule.factor
                whole[i, 2:] = rule.key & 0xFFFFFFFF, rule.key >> 32, rule.share
        return reals, whole


class DeviceMerger:
    """Merges tensors into a live model on a device.

    Args:
        inputs: the sources, and what is known of their tensors.
        device: of the live model.
        spare: says whether enough memory is free for another kept source; None asks the GPU.
    """

    def __init__(self, inputs: WarmInputs, device: str, *, spare: Callable[[], bool] | None = None) -> None:
        self._inputs, self._device = inputs, device
        self._spare = spare or (lambda: _spare(device))
        self._kept: dict[Difference, Tensor | None] = {}
        self._keeps = True
        self._trusted: set[Hashable] = set()
        self._failed = False

    @property
    def nbytes(self) -> int:
        """The memory of the device that sources take, in bytes."""
        return sum(kept.nbytes for kept in self._kept.values() if kept is not None)

    def give_way(self) -> bool:
        """Free the sources and keep none from now on; say whether that freed anything."""
        freed = self.nbytes > 0
        self._kept, self._keeps = {}, False
        return freed

    def merge(self, recipe: Recipe, places: Mapping[str, Storage], sizes: Mapping[str, int]) -> list[str]:
        """Merge tensors of a recipe into their places; return those that are left, in the order of `places`.

        places: in the live model. sizes: the tensors' numbers of elements.
        """
        merged: set[str] = set()
        if not self._failed:
            planned = each(
                lambda name: self._planned(recipe, name, places[name], sizes[name]),
                list(places),
                total=sum(sizes[name] for name in places),
            )
            tensors = [tensor for tensor in planned if tensor is not None]
            try:
                with _on(self._device):
                    merged = self._run(recipe, tensors) if tensors else set()
            except (UserError, OSError, MemoryError):
                raise
            except Exception as error:
                if "out of memory" in str(error).lower() and self._keeps:
                    self.give_way()
                    _release(self._device)
                    return list(places)
                self._fail(f"a kernel failed ({type(error).__name__}: {error})")
        # Where two tensors lie in one place, the last one stays, so the processor then makes both.
        theirs = {_address(place) for name, place in places.items() if name not in merged}
        return [name for name, place in places.items() if name not in merged or _address(place) in theirs]

    def _fail(self, why: str) -> None:
        # As an error, because the command line hides warnings.
        log.error(
            "merging on %s: %s; the processor merges from now on, to the same weights", self._device, why
        )
        self._failed = True
        self.give_way()

    def _planned(self, recipe: Recipe, name: str, place: Storage, size: int) -> _Planned | None:
        """Return how a tensor is merged on the device; None for one that the processor merges."""
        if self._inputs.copied(recipe, name) is not None:
            return None
        task = Task.of(recipe, name)
        method, base = task.method, task.base
        if method.blend is None or method.factored or method.file or len(task.reads) > MOST_SOURCES:
            return None

        def operands() -> tuple[Operand | None, list[Operand]]:
            origin = None if base is None else self._inputs.operand(*base, None)
            return origin, [self._inputs.operand(*read, task.subtracted) for read in task.reads]

        measure = StoredStatistics(self._inputs, task.places, size, operands)
        try:
            blend = method.blend(measure, **task.settings)
        except ConfigError:
            return None  # the processor raises it, in its turn
        if blend is None:
            return None
        boundaries = [
            (
                measure.boundary(index, rule.last),
                measure.boundary(index, rule.first) if rule.first else NO_TOP,
            )
            for index, rule in enumerate(blend.masks)
            if isinstance(rule, Ranks)
        ]
        return _Planned(
            name=name, place=place, size=size, task=task, blend=blend, boundaries=tuple(boundaries)
        )

    def _run(self, recipe: Recipe, tensors: Sequence[_Planned]) -> set[str]:
        """Merge tensors; return the names of those that are finite and can be trusted."""
        import torch

        tables = self._tables(tensors)
        # Four numbers each, so that all addresses are multiples of 16: Triton compiles once for them.
        flags = torch.zeros((len(tensors), 4), dtype=torch.int32, device=self._device)
        forms: dict[Hashable, list[int]] = {}
        for i, tensor in enumerate(tensors):
            out = _direct(tensor.place)
            if out is not None:
                form = self._launch(tensor, tables[i], flags[i], out, recipe.dtype)
            else:
                merged = self._scratch(tensor, recipe.dtype)
                form = self._launch(tensor, tables[i], flags[i], merged, recipe.dtype)
                shape = getattr(tensor.place, "shape", merged.shape)
                tensor.place.copy_(merged.view(shape))
            forms.setdefault(form, []).append(i)
        not_finite = flags[:, 0].tolist()  # waits for the GPU, once
        for form, members in forms.items():
            finite = [i for i in members if not not_finite[i]]
            if form in self._trusted or not finite:
                continue
            i = min(finite, key=lambda i: (tensors[i].size < ENOUGH, abs(tensors[i].size - ENOUGH)))
            if not self._right(recipe, tensors[i], tables[i], flags[i]):
                method = tensors[i].task.method.name
                self._fail(f"{tensors[i].name!r} ({method}) does not get the processor's bits")
                return set()
            self._trusted.add(form)
        return {tensor.name for tensor, bad in zip(tensors, not_finite, strict=True) if not bad}

    def _tables(self, tensors: Sequence[_Planned]) -> list[tuple[Tensor, Tensor]]:
        """Return the tables of all tensors, sent together; each begins at a multiple of 16 bytes, too."""
        import torch

        room = max(len(tensor.task.reads) for tensor in tensors) + 3 & ~3
        reals = numpy.zeros((len(tensors), room, 5), dtype=numpy.float32)
        whole = numpy.zeros((len(tensors), room, 5), dtype=numpy.int64)
        for i, tensor in enumerate(tensors):
            rows = len(tensor.task.reads)
            reals[i, :rows], whole[i, :rows] = tensor.tables()
        sent = [torch.from_numpy(table).to(self._device, non_blocking=True) for table in (reals, whole)]
        return list(zip(*sent, strict=True))

    def _scratch(self, tensor: _Planned, dtype: str) -> Tensor:
        import torch

        out = _direct(tensor.place)
        type_ = getattr(torch, dtype) if out is None else out.dtype
        return torch.empty(tensor.size, dtype=type_, device=self._device)

    def _right(self, recipe: Recipe, tensor: _Planned, tables: tuple[Tensor, Tensor], flag: Tensor) -> bool:
        """Say whether a tensor gets the processor's bits, which this computes."""
        import torch

        merged = self._scratch(tensor, recipe.dtype)
        self._launch(tensor, tables, flag, merged, recipe.dtype)
        expected = merge_tensor(recipe, tensor.name, self._inputs).to(merged.dtype).reshape(-1)
        return torch.equal(merged.cpu().view(torch.uint8), expected.view(torch.uint8))

    def _launch(
        self, tensor: _Planned, tables: tuple[Tensor, Tensor], flag: Tensor, out: Tensor, dtype: str
    ) -> Hashable:
        """Start the kernels of one tensor; return what form of kernel that is."""
        import torch
        import triton.language as tl

        from evomerge.merging.tensors import gpu_kernels

        task, blend, n = tensor.task, tensor.blend, tensor.size
        vectors = [self._vector(place) for place in task.places]
        adds = task.subtracted is not None
        base = None
        if task.base is not None and (adds or any(vector is None or vector[1] for vector in vectors)):
            base, _ = self._vector((task.base, None)) or (None, False)
        # A vector of zeros is the base minus itself; where that is NaN, the processor merges.
        sources = [(base, True) if vector is None else vector for vector in vectors]
        xs, minus = tuple(x for x, _ in sources), tuple(subtracts for _, subtracts in sources)
        blocks, until = -(-n // CHUNK), None
        with numpy.errstate(all="ignore"):  # for Triton's interpreter
            if tensor.counted:
                counts = torch.empty((2 * len(xs), blocks), dtype=torch.int32, device=self._device)
                gpu_kernels.count_equal[(blocks,)](
                    xs, base, tables[0], counts, blocks, n, K=len(xs), MINUS=minus, **EXACT
                )
                until = counts.cumsum(1)
            form = {
                "K": len(xs),
                "MINUS": minus,
                "ADD": adds,
                "RANKED": tensor.ranked,
                "TOP": tensor.topped,
                "DRAWN": bool(blend.masks) and not tensor.ranked,
                "ELECT": blend.elect,
                "MEAN": blend.elect and blend.mean,
            }
            type_ = tl.int16 if dtype == "bfloat16" else getattr(tl, dtype)
            gpu_kernels.blend[(blocks,)](
                xs,
                base,
                *tables,
                until,
                _bits(out),
                flag,
                blocks,
                n,
                float(blend.scale),
                TYPE=type_,
                **form,
                **EXACT,
            )
        types = tuple(None if x is None else x.dtype for x in (*xs, base, out))
        return (*types, dtype, until is None, n % 16 == 0, *form.values())

    def _vector(self, place: Difference) -> tuple[Tensor, bool] | None:
        """Return a source's weights on the device, and whether the base is to be subtracted; None: zeros.

        bfloat16 as its bits in int16.
        """
        source, base = place
        computed = base is not None and self._inputs.computed(place)
        stored = place if computed else (source, None)
        if stored not in self._kept:
            array = self._inputs.weights(stored)
            sent = None if array is None else _sent(_bits(to_tensor(array).reshape(-1)), self._device)
            if sent is not None and not (self._keeps and self._spare()):
                return sent, base is not None and not computed
            self._kept[stored] = sent
        kept = self._kept[stored]
        return None if kept is None else (kept, base is not None and not computed)


def _direct(place: Storage) -> Tensor | None:
    """Return the memory of a live tensor if a kernel can write into it, as a vector."""
    import torch

    if not isinstance(place, torch.Tensor) or not place.is_contiguous():
        return None
    if place.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return place.detach().view(-1)


def _bits(weights: Tensor) -> Tensor:
    """Return bfloat16 as its bits in int16, and other types as they are."""
    import torch

    return weights.view(torch.int16) if weights.dtype == torch.bfloat16 else weights


def _address(place: Storage) -> Hashable:
    """Return a key that is equal for two places that begin in the same memory."""
    import torch

    return place.data_ptr() if isinstance(place, torch.Tensor) else id(place)


def _sent(weights: Tensor, device: str) -> Tensor:
    """Return weights on a device, as a copy, without waiting for it."""
    import torch

    if not device.startswith("cuda"):
        return weights.to(device, copy=True)
    pinned = torch.empty(weights.shape, dtype=weights.dtype, pin_memory=True)
    pinned.copy_(weights)
    return pinned.to(device, non_blocking=True)  # torch reuses pinned memory only when it has been read


def _spare(device: str) -> bool:
    """Say whether a GPU has memory for kept sources beside what forward passes need."""
    import torch

    if not device.startswith("cuda"):
        return True
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused >= ROOM * total


def _release(device: str) -> None:
    """Give memory back to a GPU that nothing uses any more."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _on(device: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which kernels start on a device."""
    import torch

    return torch.cuda.device(device) if device.startswith("cuda") else contextlib.nullcontext()
