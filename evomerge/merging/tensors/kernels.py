"""Blends in one compiled pass over memory: kernels.c, compiled by the machine's C compiler when needed.

A kernel is compiled for one form of a blend (number and types of the sources, kinds of masks) in under a
second and kept in the user's cache folder, which only the user can write. In one pass it reads stored
weights, subtracts the base, masks, weights, elects signs, adds, rounds, and writes into the file's buffer or
the live model. Its results are those of `methods.blend.run`, bit for bit. Without a C compiler (or with
EVOMERGE_KERNELS=0) `run` is used instead: the same weights, many times slower.

Covered: float32 and bfloat16 in main memory. Other types are converted to float32 first.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy

from evomerge.files import own_folder, passing_folder, temporary_parent
from evomerge.merging.methods.blend import GUARD, Blend, Draws, Ranks
from evomerge.merging.methods.reduction import BLOCK, symmetric
from evomerge.merging.methods.selection import EVERYTHING, NOTHING, Boundary
from evomerge.merging.sources.arrays import WeightArray

log = logging.getLogger(__name__)
MISSING = (
    "no working C compiler found (CC, cc, gcc, clang), so merging uses no compiled kernels: "
    "the weights are the same, but merging takes many times longer"
)

EXACT = (
    "-O3",
    "-std=gnu11",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
FASTEST = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
"""Compiler flags for the processor, tried in this order; none of them changes a result."""
CODE = files("evomerge.merging.tensors").joinpath("kernels.c").read_text(encoding="utf-8")
"""Read at import, so that a long run is not affected by a version that is installed later."""
FORMATS = {numpy.dtype("float32"): "f32", numpy.dtype("uint16"): "bf16"}
"""numpy type -> its name in kernels.c; bfloat16 is passed as its bits in uint16."""


SOURCE = numpy.dtype(
    [
        ("weight", "f4"),
        ("size", "f4"),
        ("factor", "f4"),
        ("limit", "f4"),
        ("top", "f4"),
        ("ties", "i8"),
        ("top_ties", "i8"),
        ("key", "u8"),
        ("share", "u4"),
    ],
    align=True,
)
"""`source_t` of kernels.c."""


@dataclass(frozen=True, slots=True)
class Operand:
    """One input of a merge: weights, and whether the base is still to be subtracted from them.

    data: contiguous; float32, or bfloat16 as its bits in uint16 (see `arrays`).
    """

    data: WeightArray
    minus_base: bool = False
    address: int = field(init=False)

    def __post_init__(self) -> None:
        assert self.data.flags.c_contiguous
        object.__setattr__(self, "address", self.data.__array_interface__["data"][0])

    @property
    def format(self) -> str:
        """The type's name in kernels.c."""
        return FORMATS[self.data.dtype]


def available() -> bool:
    """Say whether kernels can be compiled here."""
    return _compiler() is not None


def notes() -> tuple[str, ...]:
    """Return a note for the user if merging uses no compiled kernels because no compiler works."""
    return () if available() or _declined() else (MISSING,)


def _declined() -> bool:
    return os.environ.get("EVOMERGE_KERNELS") == "0"


def blend(
    plan: Blend,
    base: Operand | None,
    operands: Sequence[Operand],
    boundaries: Callable[[int, int], Boundary],
    out: WeightArray,
    *,
    add_base: bool,
    rounded: bool = False,
) -> bool:
    """Write a blend into `out` and say whether all of it is finite.

    base: subtracted from operands with `minus_base`, and added to the result if `add_base`.
    boundaries: (operand's index, rank) -> the boundary above which `rank` elements lie.
    out: contiguous float32 or bfloat16 on the CPU; `rounded` rounds a float32 one to bfloat16.
    """
    ranked = bool(plan.masks) and isinstance(plan.masks[0], Ranks)
    drawn = bool(plan.masks) and not ranked
    top = ranked and any(isinstance(rule, Ranks) and rule.first for rule in plan.masks)
    settings = numpy.empty(len(operands), dtype=SOURCE)
    rules = plan.masks or (None,) * len(operands)
    for index, (weight, size, rule) in enumerate(zip(plan.weights, plan.sizes, rules, strict=True)):
        limit, above = EVERYTHING, Boundary(math.nan, EVERYTHING.ties)
        key, share, factor = 0, 0, 1.0
        if isinstance(rule, Draws):
            key, share, factor = rule.key, rule.share, rule.factor
        elif isinstance(rule, Ranks):
            limit = boundaries(index, rule.last)
            above = boundaries(index, rule.first) if rule.first else above
        settings[index] = (
            *(weight, size, factor),
            *(limit.magnitude, above.magnitude, limit.ties, above.ties, key, share),
        )
    result = Operand(out)
    flags = (
        *("ADD",) * add_base,
        *("RANKED",) * ranked,
        *("TOP",) * top,
        *("DRAWN",) * drawn,
        *("ELECT",) * plan.elect,
        *("MEAN",) * (plan.elect and plan.mean),
        *("ROUND",) * (rounded or result.format == "bf16"),
        f"OUT={result.format}",
    )
    kernel = _found("blend", *_shape(base, operands, needed=add_base), *flags)
    scale = ctypes.c_float(plan.scale)
    bad = kernel(out.size, _address(base), _addresses(operands), settings.ctypes.data, scale, result.address)
    return not bad


def gram(base: Operand | None, operands: Sequence[Operand]) -> list[list[float]]:
    """Return the inner products of all pairs of operands, the bits of `methods.reduction.gram`."""
    count, size = len(operands), operands[0].data.size
    blocks, pairs = -(-size // BLOCK), count * (count + 1) // 2
    sums = (ctypes.c_double * (blocks * pairs))()
    kernel = _found("gram", *_shape(base, operands, needed=False))
    kernel(size, _address(base), _addresses(operands), sums)
    values = list(sums)
    return symmetric([values[i : i + pairs] for i in range(0, len(values), pairs)], count)


def magnitudes(operand: Operand, base: Operand | None) -> WeightArray:
    """Return the magnitudes of an operand's elements, (n,) float32, new."""
    sizes = numpy.empty(operand.data.size, dtype=numpy.float32)
    blend(Blend(weights=(1.0,)), base, [operand], lambda *_: NOTHING, sizes, add_base=False)
    return numpy.abs(sizes, out=sizes)


def _shape(base: Operand | None, operands: Sequence[Operand], *, needed: bool) -> tuple[str, ...]:
    sources = " ".join(
        f"S({k},{operand.format},{int(operand.minus_base)})" for k, operand in enumerate(operands)
    )
    definitions = (f"SOURCES(S)={sources}", f"K={len(operands)}")
    if base is not None and (needed or any(operand.minus_base for operand in operands)):
        return (*definitions, f"BASE={base.format}")
    return definitions


def _address(operand: Operand | None) -> int | None:
    return None if operand is None else operand.address


def _addresses(operands: Sequence[Operand]) -> Any:
    return (ctypes.c_void_p * len(operands))(*(operand.address for operand in operands))


class NoKernelError(Exception):
    """This kernel can't be compiled although others can; torch is used instead."""


def _found(name: str, *definitions: str) -> Any:
    kernel = _kernel(name, *definitions)
    if kernel is None:
        raise NoKernelError
    return kernel


@functools.cache
def _kernel(name: str, *definitions: str) -> Any:
    """Return the compiled function for some definitions, or None after logging why there is none."""
    compiler = _compiler()
    assert compiler is not None
    try:
        function = getattr(ctypes.CDLL(str(_built(compiler, name, definitions))), name)
    except (OSError, subprocess.SubprocessError) as error:
        # As an error, because the command line hides warnings.
        log.error(
            "%s can't compile a merge kernel (%s): merging continues without it, slower", compiler, error
        )
        return None
    function.restype = ctypes.c_int
    pointer = ctypes.c_void_p
    if name == "blend":
        function.argtypes = (ctypes.c_int64, pointer, pointer, pointer, ctypes.c_float, pointer)
    else:
        function.argtypes = (ctypes.c_int64, pointer, pointer, pointer)
    return function


def _built(compiler: str, name: str, definitions: Sequence[str]) -> Path:
    """Return the library with a function, compiled if it is not in the cache folder.

    Its file name ends in the hash of its content, so that a truncated file is compiled again: loading it
    would crash the process. It is compiled to a temporary file and renamed, because several processes may
    compile it at once. Raises OSError, subprocess.SubprocessError.
    """
    identity = _digest(repr((CODE, compiler, EXACT, GUARD, definitions, _processor())).encode())
    for library in _folder().glob(f"{name}-{identity}-*.so"):
        if _private(library, stat.S_ISREG) and library.stem.endswith(_digest(library.read_bytes())):
            return library
        with suppress(OSError):
            library.unlink()
    with passing_folder(_folder(), "kernel") as folder:
        code, built = folder / "kernels.c", folder / "kernels.so"
        code.write_text(CODE, encoding="utf-8")
        defined = [f"-D{definition}" for definition in (f"GUARD={GUARD}f", *definitions)]
        for flags in FASTEST:
            command = [compiler, *EXACT, *flags, *defined, str(code), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, check=False, timeout=300)
            if done.returncode == 0:
                path = _folder() / f"{name}-{identity}-{_digest(built.read_bytes())}.so"
                built.chmod(0o700)
                built.replace(path)
                return path
        done.check_returncode()
    raise AssertionError("unreachable")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


@functools.cache
def _compiler() -> str | None:
    """Return a C compiler that works here, or None."""
    if _declined():
        return None
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path and _works(path):
            return path
    return None


def _works(compiler: str) -> bool:
    """Say whether a compiler makes a kernel that can be loaded."""
    try:
        ctypes.CDLL(str(_built(compiler, "blend", ("SOURCES(S)=S(0,f32,0)", "K=1", "OUT=f32"))))
        return True
    except (OSError, subprocess.SubprocessError):
        return False


@functools.cache
def _processor() -> str:
    """Return what -march=native depends on, so that different machines can share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        facts = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        facts = []
    return "\n".join((platform.machine(), platform.processor(), *facts))


@functools.cache
def _folder() -> Path:
    """Return the folder of compiled kernels: in the user's cache, or a temporary one.

    The cache is not used if it can't be written, or if others could write to it or exchange it.
    """
    with suppress(OSError, RuntimeError):
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = (home if home.is_absolute() else Path.home() / ".cache") / "evomerge" / "kernels"
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        above = {*folder.parents, *folder.resolve().parents}
        if _private(folder, stat.S_ISDIR) and all(map(_guarded, above)):
            folder.chmod(0o700)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    private = own_folder(temporary_parent(), "evomerge-kernels")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return private


def _private(path: Path, kind: Callable[[int], bool]) -> bool:
    """Say whether a file or folder (no link) belongs to this user and only the user can write it."""
    found = path.lstat()
    return kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _guarded(folder: Path) -> bool:
    """Say whether only this user and root can replace what lies in a folder."""
    for found in (folder.lstat(), folder.stat()):
        others_write = (
            found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX and not stat.S_ISLNK(found.st_mode)
        )
        if found.st_uid not in (0, os.geteuid()) or others_write:
            return False
    return True
