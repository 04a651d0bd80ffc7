"""One pass over a GPU's memory for one blend, in Triton: what kernels.c is on a processor.

The bits are those of kernels.c and of `methods.blend.run`: float32 multiplications and additions in the same
order, never fused (`enable_fp_fusion=False`), division rounded to nearest, draws from the same hash, ties by
lowest index. Triton compiles one kernel for each form of a blend: number and types of the sources, kinds of
masks. With TRITON_INTERPRET=1 it runs the same code on tensors in main memory, slowly, for tests.

A program merges one block of `CHUNK` elements, as two rows: the halves of a block share the hashes of their
draws (see `draws`). bfloat16 is passed as its bits in int16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evomerge.merging.methods.blend import GUARD
from evomerge.merging.methods.draws import CHUNK

FIELDS = 5
"""Numbers per source in each of the two tables, see `_Planned.tables` in on_device.py."""
_HALF = tl.constexpr(CHUNK // 2)
_FIELDS = tl.constexpr(FIELDS)
_GUARD = tl.constexpr(GUARD)


@triton.jit
def _wide(x):
    """Return stored weights in float32."""
    if x.dtype == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _rounded(x, type_: tl.constexpr):
    """Return float32 rounded to a type, ties to even."""
    if type_ == tl.int16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        return x.to(type_)


@triton.jit(do_not_specialize=["blocks"])
def count_equal(xs, base_, reals, counts, blocks, n, K: tl.constexpr, MINUS: tl.constexpr):
    """Count the elements of each block whose magnitude is a source's limit, or its top.

    counts: (2 K, blocks) int32; first those of the limits.
    """
    start = tl.program_id(0).to(tl.int64) * (2 * _HALF)
    inside = tl.arange(0, 2)[:, None] * _HALF + tl.arange(0, _HALF)[None, :]
    there = start + inside < n
    base = 0.0
    if base_ is not None:
        base = _wide(tl.load(base_ + start + inside, mask=there, other=0))
    for k in tl.static_range(K):
        d = _wide(tl.load(xs[k] + start + inside, mask=there, other=0))
        if MINUS[k]:
            d = d - base
        for which in tl.static_range(2):
            equal = there & (tl.abs(d) == tl.load(reals + k * _FIELDS + 3 + which))
            number = tl.sum(tl.sum(equal.to(tl.int32), axis=1), axis=0)
            tl.store(counts + (which * K + k) * blocks + tl.program_id(0), number)


@triton.jit
def _beyond(equal, ties, until):
    """Return 1 for equal elements of this block that are not among the first `ties` of the tensor, else 0.

    until: for each block, the number of equal elements up to its end.
    """
    block = tl.program_id(0)
    last = tl.load(until + block)
    before = tl.load(until + block - 1, mask=block > 0, other=0)
    number = equal.to(tl.int32)
    beyond = tl.where(before >= ties, number, 0)
    if (before < ties) & (last > ties):  # they run out in this block
        upper = tl.arange(0, 2) == 0
        in_upper = tl.sum(tl.where(upper, tl.sum(number, axis=1), 0), axis=0)
        rank = before + tl.cumsum(number, axis=1) + tl.where(upper, 0, in_upper)[:, None]
        beyond = tl.where(rank > ties, number, 0)
    return beyond


@triton.jit
def _ranked(d, reals, whole, until, until_top, TOP: tl.constexpr, COUNTED: tl.constexpr):
    """Return a source with the elements below its limit, and those from its top on, set to 0."""
    size = tl.abs(d)
    limit = tl.load(reals + 3)
    dropped = size < limit
    if COUNTED:
        dropped = dropped | (_beyond(size == limit, tl.load(whole), until) > 0)
    if TOP:
        top = tl.load(reals + 4)
        equal = size == top
        if COUNTED:
            equal = equal & (_beyond(equal, tl.load(whole + 1), until_top) == 0)
        dropped = dropped | (size > top) | equal
    return tl.where(dropped, 0.0, d)


@triton.jit
def _drawn(d, reals, whole, start, half: tl.constexpr):
    """Return a source with elements set to 0 at random, times a factor; the hash is that of `draws.bits`."""
    x = (start // 2).to(tl.uint32) + tl.arange(0, half).to(tl.uint32)
    x ^= tl.load(whole + 2).to(tl.uint32)
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x += tl.load(whole + 3).to(tl.uint32)
    x *= 0xD35A2D97
    x ^= x >> 15
    upper = (tl.arange(0, 2) == 0)[:, None]
    draws = tl.where(upper, (x & 0xFFFF)[None, :], (x >> 16)[None, :])
    return tl.where(draws < tl.load(whole + 4).to(tl.uint32), d * tl.load(reals + 2), 0.0)


@triton.jit
def _elected(total, parts, reals, K: tl.constexpr, MEAN: tl.constexpr):
    """Return the sum, or the mean, of the parts that have the sign of their total."""
    sign = total.to(tl.uint32, bitcast=True) & 0x80000000
    mix = tl.full(total.shape, 0.0, tl.float32)
    divisor, size = mix, mix
    for k in tl.static_range(K):
        agreeing = (parts[k].to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        mix = mix + tl.where(agreeing < 0.0, 0.0, agreeing)
        if MEAN:
            divisor = divisor + tl.where(agreeing > 0.0, tl.load(reals + k * _FIELDS), 0.0)
            size = size + tl.where(agreeing > 0.0, tl.load(reals + k * _FIELDS + 1), 0.0)
    mix = (mix.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    if MEAN:
        inverse = tl.div_rn(tl.full(total.shape, 1.0, tl.float32), divisor)
        mix = mix * tl.where(tl.abs(divisor) <= size * _GUARD, 1.0, inverse)
    return mix


@triton.jit
def _write(mix, places, bad_, there, TYPE: tl.constexpr, OUT: tl.constexpr):
    """Write a result, rounded to TYPE first; write 1 to `bad_` where it is not finite."""
    rounded = _rounded(mix, TYPE)
    again = _wide(rounded)
    finite = (tl.abs(mix) < float("inf")) & (tl.abs(again) < float("inf"))
    bad = tl.max(tl.max((there & ~finite).to(tl.int32), axis=1), axis=0)
    tl.store(bad_, 1, mask=bad > 0)
    if OUT != TYPE:
        rounded = _rounded(again, OUT)
    tl.store(places, rounded, mask=there)


@triton.jit(do_not_specialize=["blocks"])
def blend(
    xs,
    base_,
    reals,
    whole,
    until,
    out_,
    bad_,
    blocks,
    n,
    scale,
    K: tl.constexpr,
    MINUS: tl.constexpr,
    ADD: tl.constexpr,
    RANKED: tl.constexpr,
    TOP: tl.constexpr,
    DRAWN: tl.constexpr,
    ELECT: tl.constexpr,
    MEAN: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Write one block of a blend to `out_`, rounded to TYPE first; write 1 to `bad_` where it is not finite.

    xs: the K sources. reals, whole: (K, FIELDS). until: running sums of `count_equal`, None without ties.
    """
    start = tl.program_id(0).to(tl.int64) * (2 * _HALF)
    inside = tl.arange(0, 2)[:, None] * _HALF + tl.arange(0, _HALF)[None, :]
    there = start + inside < n
    base = 0.0
    if base_ is not None:
        base = _wide(tl.load(base_ + start + inside, mask=there, other=0))
    parts = ()
    for k in tl.static_range(K):
        d = _wide(tl.load(xs[k] + start + inside, mask=there, other=0))
        if MINUS[k]:
            d = d - base
        real, number = reals + k * _FIELDS, whole + k * _FIELDS
        if RANKED:
            if until is None:
                d = _ranked(d, real, number, until, until, TOP, False)
            else:
                d = _ranked(d, real, number, until + k * blocks, until + (K + k) * blocks, TOP, True)
        if DRAWN:
            d = _drawn(d, real, number, start, _HALF)
        parts = parts + (d * tl.load(real),)
    mix = parts[0]
    for k in tl.static_range(1, K):
        mix = mix + parts[k]
    if ELECT:
        mix = _elected(mix, parts, reals, K, MEAN)
    mix = mix * scale
    if ADD:
        mix = mix + base
    _write(mix, out_ + start + inside, bad_, there, TYPE, out_.dtype.element_ty)
