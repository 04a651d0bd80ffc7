"""A malformed input as a case, and the valid inputs that cases change: models, config, suite and recipe."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import evomerge
from evomerge.schema import preset_folder

ZOO = Path(evomerge.__file__).parent / "zoo" / "demo"
TASKS = preset_folder("benchmarks/suites").parent / "tasks" / "demo"

CONFIG: dict[str, Any] = {
    "models": {"base": "base", "sources": {"add": "add", "sort": "base+sort"}},
    "space": "space.yaml",
    "suite": "suite.yaml",
    "budget": {"evaluations": 4},
    "executor": {"name": "inline"},
    "out": "run",
}
SUITE: dict[str, Any] = {
    "name": "small",
    "tasks_dir": "tasks",
    "tasks": [
        {
            "task": "demo_add",
            "metric": "acc",
            "splits": {"search": "search", "select": "select", "test": "test"},
        }
    ],
}
SPACE: dict[str, Any] = {
    "name": "small",
    "about": "one weight per source",
    "method": "task_arithmetic",
    "genes": {"weight": {"low": -0.5, "high": 1.5, "per": ["source"]}},
}
PATH_SPACE: dict[str, Any] = {"kind": "layer_path", "name": "path", "about": "a stack of layers"}
RECIPE: dict[str, Any] = {
    "models": {"base": "base", "add": "add", "reverse": "reverse"},
    "base": "base",
    "groups": [{"method": "ties", "sources": ["add", "reverse"], "parameters": {"density": 0.5}}],
}
MERGEKIT: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "dtype": "bfloat16",
    "slices": [
        {
            "sources": [
                {"model": name, "layer_range": [0, 4], "parameters": {"weight": 0.5}}
                for name in ("add", "reverse")
            ]
        }
    ],
}
EVOLVE: dict[str, Any] = {
    "genome": {
        "models": ["add", {"model": "reverse"}],
        "base_model": "base",
        "merge_method": "ties",
        "tokenizer_source": "base",
        "layer_granularity": 2,
        "normalize": True,
        "allow_negative_weights": False,
        "smooth": True,
        "filters": ["self_attn", "mlp"],
    },
    "tasks": [{"name": "demo_add", "weight": 1.0, "metric": "acc,none"}, {"name": "demo_reverse"}],
    "limit": 9,
    "num_fewshot": 1,
    "apply_chat_template": True,
    "fewshot_as_multiturn": True,
}
GENETIC: dict[str, Any] = {
    "run_id": "x",
    "pop_size": 8,
    "n_iter": 2,
    "n_samples": 5,
    "seed": 1,
    "dtype": "float16",
    "eval_batch_size": 4,
    "base_model": "base",
    "models": {"add": "add", "reverse": "reverse"},
    "tasks": {"search": {"add": "demo_add", "reverse": "demo_reverse"}, "test": {"add": "demo_add"}},
    "additional_templates_folder": "tasks",
    "metric": "acc",
    "device": "cuda:0",
}
CHECK = ("check", "config.yaml")
RUN = ("run", "config.yaml")
MERGE = ("merge", "recipe.yaml", "merged")
MERGEKIT_OUT = ("merge", "recipe.yaml", "out.yaml", "--as", "mergekit")
ADAPTER_OUT = ("merge", "recipe.yaml", "merged", "--as", "adapter")
CONVERT = ("convert", "recipe.yaml", "--suite", "suite.yaml", "--out", "new.yaml")
CONVERT_ALONE = ("convert", "recipe.yaml", "--out", "new.yaml")
ANALYZE = ("analyze", "recipe.yaml")
EVALUATE = ("evaluate", "add", "--suite", "suite.yaml")
FISHER = ("fisher", "add", "text.txt", "fisher.safetensors", "--sequences", "1")
SHOW_SPACE = ("spaces", "show", "space.yaml")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One malformed input.

    kind, name: what it is. make: changes a folder of valid inputs, in which the commands then start.
    commands: those that read the input. message: what their message must contain; `a|b` is either.
    """

    kind: str
    name: str
    make: Callable[[Path], None]
    commands: Sequence[tuple[str, ...]]
    message: str


def write_valid(folder: Path) -> None:
    """Fill an empty folder with inputs that every command accepts."""
    for name in ("base", "add", "reverse", "sort"):
        (folder / name).mkdir()
        for file in (ZOO / name).iterdir():
            (folder / name / file.name).symlink_to(file)
    shutil.copytree(TASKS, folder / "tasks")
    for name, data in (("config", CONFIG), ("suite", SUITE), ("space", SPACE), ("recipe", RECIPE)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    (folder / "text.txt").write_text("add 1 2 + 3 4 =\nadd 1 1 + 2 2 =\n")


def replaced(folder: Path, name: str) -> Path:
    """Remove a file, if there is one, and return its path for another."""
    path = folder / name
    path.unlink(missing_ok=True)
    return path


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Return what writes a file."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda folder: replaced(folder, name).write_bytes(data) and None


def changed(data: Any, place: str, value: Any) -> Any:
    """Return a copy of nested data with the value at a dotted place replaced."""
    key, _, rest = place.partition(".")
    copy = list(data) if isinstance(data, list) else dict(data)
    at: Any = int(key) if isinstance(data, list) else key
    inner = copy[at] if isinstance(copy, list) or at in copy else {}
    copy[at] = changed(inner, rest, value) if rest else value
    return copy


def as_yaml(name: str, data: Any) -> Callable[[Path], None]:
    """Return what writes data as a YAML file."""
    return text(name, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def as_json(name: str, data: Any) -> Callable[[Path], None]:
    """Return what writes data as a JSON file; NaN and infinities become the literals that Python writes."""
    return text(name, json.dumps(data))


def json_with(name: str, **changes: Any) -> Callable[[Path], None]:
    """Return what replaces keys of a JSON file."""

    def make(folder: Path) -> None:
        data = json.loads((folder / name).read_text()) | changes
        as_json(name, data)(folder)

    return make


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file as data, and the bytes behind it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(
    change: Callable[[dict[str, Any]], Any], name: str = "add/model.safetensors"
) -> Callable[[Path], None]:
    """Return what changes the header of a safetensors file; a text or bytes replace the JSON."""

    def make(folder: Path) -> None:
        data, weights = header(folder / name)
        made = change(data)
        made = data if made is None else made
        encoded = (
            made
            if isinstance(made, bytes)
            else (made if isinstance(made, str) else json.dumps(made)).encode()
        )
        replaced(folder, name).write_bytes(struct.pack("<Q", len(encoded)) + encoded + weights)

    return make


def limit_memory(megabytes: int) -> None:
    """Let this process take so much more memory than it has, so that a mistake doesn't take the machine's."""
    status = Path("/proc/self/status").read_text()
    data = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (data * 1024 + megabytes * 2**20,) * 2)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    bound = socket.socket(socket.AF_UNIX)
    before = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        bound.bind(path.name)
    finally:
        os.chdir(before)
        bound.close()


SPECIAL: dict[str, Callable[[Path], None]] = {
    "fifo": fifo,
    "socket": a_socket,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "symlink to itself": lambda path: path.symlink_to(path.name),
    "dangling symlink": lambda path: path.symlink_to("nowhere"),
    "empty": lambda path: path.write_bytes(b"") and None,
    "zeros": lambda path: path.write_bytes(bytes(4096)) and None,
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x80" * 50) and None,
}
"""What may stand at the place of any file."""


def special(name: str, what: str) -> Callable[[Path], None]:
    """Return what puts something else than a regular, readable file at a place."""
    return lambda folder: SPECIAL[what](replaced(folder, name))
