"""What of this machine and its libraries matters to a run, and what is wrong with it (`evomerge doctor`)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from evomerge.delivery import style
from evomerge.merging.tensors import kernels
from evomerge.running.executors import devices
from evomerge.version import __version__

Level = Literal["ok", "note", "fault"]
EXTRAS = {
    "ray": "ray",
    "vllm": "vllm",
    "triton": "triton",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "gguf": "gguf",
    "ifeval": "langdetect",
}
"""Extras of the package, and a module that each of them brings."""
LIBRARIES = (
    "torch",
    "transformers",
    "lm-eval",
    "safetensors",
    "tokenizers",
    "peft",
    "cma",
    "pymoo",
    "optuna",
)
LEAST_DISK, LEAST_MEMORY = 5.0, 4.0
"""GB below which there is a note."""
_STYLES = {"ok": "green", "note": "yellow", "fault": "bold red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. fix: what to do about a note or a fault."""

    what: str
    found: str
    level: Level = "ok"
    fix: str = ""


def examine(folder: Path) -> list[Finding]:
    """Look at the machine. folder: where runs would be written."""
    findings: list[Finding] = []
    for look in (_python, _libraries, _processor, _compiler, _devices, _memory, _threads, _extras, _hub):
        findings += look()
    return findings + list(_disk(folder))


def as_data(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings as plain data."""
    return {
        "evomerge": __version__,
        "faults": sum(finding.level == "fault" for finding in findings),
        "findings": [
            {"what": f.what, "found": f.found, "level": f.level, "fix": f.fix or None} for f in findings
        ],
    }


def table(findings: list[Finding]) -> Table:
    """Return the findings as a table for a rich console."""
    shown = style.table(
        style.words(""), style.words("what"), style.words("found"), title=f"evomerge {__version__}"
    )
    for finding in findings:
        text = Text(finding.found)
        if finding.fix:
            text.append(f"\ndo: {finding.fix}", style="italic")
        shown.add_row(Text(finding.level, style=_STYLES[finding.level]), finding.what, text)
    return shown


def _python() -> Iterator[Finding]:
    yield Finding(what="python", found=f"{platform.python_version()} on {platform.platform(terse=True)}")
    if sys.flags.utf8_mode == 0 and sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        yield Finding(
            what="texts",
            found=f"the file system's encoding is {sys.getfilesystemencoding()}",
            level="note",
            fix="set PYTHONUTF8=1, so that prompts and names with other letters can be read",
        )


def _libraries() -> Iterator[Finding]:
    missing, present = [], []
    for name in LIBRARIES:
        try:
            present.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding(what="libraries", found=", ".join(present))
    if missing:
        yield Finding(
            what="libraries",
            found=f"not installed: {', '.join(missing)}",
            level="fault",
            fix="pip install -c constraints.txt evomerge",
        )


def _processor() -> Iterator[Finding]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(what="processor", found=f"{devices.cores()} cores for this process, {capability}")


def _compiler() -> Iterator[Finding]:
    notes = list(kernels.notes())
    if not notes:
        yield Finding(what="compiler", found="merge kernels are compiled")
    for note in notes:
        yield Finding(
            what="compiler",
            found=note,
            level="note",
            fix="install a C++ compiler (g++ or clang++): merging is several times faster with it",
        )


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            yield Finding(
                what=f"cuda:{number}", found=f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
            )
    elif torch.backends.mps.is_available():
        yield Finding(what="mps", found="Apple GPU")
    else:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = shutil.which("nvidia-smi") is not None
        yield Finding(
            what="GPU",
            found=f"none; torch {torch.__version__} is built {built}"
            + (f", CUDA_VISIBLE_DEVICES={hidden}" if hidden is not None else ""),
            level="note" if seen else "ok",
            fix="this machine has a driver: install torch for CUDA, or check CUDA_VISIBLE_DEVICES"
            if seen
            else "",
        )


def _memory() -> Iterator[Finding]:
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (ValueError, OSError):
        return
    low = total < LEAST_MEMORY
    yield Finding(
        what="memory",
        found=f"{total:.1f} GB, {available:.1f} GB of them unused",
        level="note" if low else "ok",
        fix="use small models, one worker, and executor: {low_memory: true}" if low else "",
    )


def _threads() -> Iterator[Finding]:
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted is None:
        return
    cores = devices.cores()
    many = wanted.isdigit() and int(wanted) > cores
    yield Finding(
        what="threads",
        found=f"OMP_NUM_THREADS={wanted}, which each worker takes",
        level="note" if many else "ok",
        fix=f"unset it: this process has {cores} cores" if many else "",
    )


def _extras() -> Iterator[Finding]:
    found = [name for name, module in EXTRAS.items() if importlib.util.find_spec(module) is not None]
    missing = [name for name in EXTRAS if name not in found]
    yield Finding(
        what="extras",
        found=(f"installed: {', '.join(found)}" if found else "none installed")
        + (
            f"; not: {', '.join(missing)} (pip install 'evomerge[NAME]' when you need one)" if missing else ""
        ),
    )


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    offline = constants.HF_HUB_OFFLINE
    login = "logged in" if get_token() else "not logged in"
    yield Finding(
        what="hub", found=f"{login}{', offline' if offline else ''}; cache {constants.HF_HUB_CACHE}"
    )


def _disk(folder: Path) -> Iterator[Finding]:
    from huggingface_hub import constants

    places: dict[str, Callable[[], Path]] = {
        "runs": lambda: folder,
        "hub cache": lambda: Path(constants.HF_HUB_CACHE),
    }
    for what, place in places.items():
        there = next(path for path in (place().absolute(), *place().absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        low, locked = free < LEAST_DISK, not os.access(there, os.W_OK)
        yield Finding(
            what=f"disk, {what}",
            found=f"{free:.0f} GB free at {there}" + (", which can't be written" if locked else ""),
            level="fault" if locked and what == "runs" else "note" if low else "ok",
            fix="choose a run folder that can be written (`out`)"
            if locked and what == "runs"
            else "free some: an exported model takes as much as its source"
            if low
            else "",
        )
