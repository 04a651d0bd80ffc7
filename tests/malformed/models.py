"""Malformed model folders: safetensors headers, indexes, configs, tokenizers and adapters."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.malformed.workspace import (
    ANALYZE,
    CHECK,
    EVALUATE,
    FISHER,
    MERGE,
    SPECIAL,
    Case,
    as_json,
    header,
    json_with,
    replaced,
    special,
    text,
    with_header,
)

NAN, INF = float("nan"), float("inf")
COMMANDS = (MERGE, CHECK, ANALYZE, EVALUATE, FISHER)
WEIGHTS = "add/model.safetensors"
ADAPTER_COMMANDS = (
    CHECK,
    ("evaluate", "base+sort", "--suite", "suite.yaml"),
    ("analyze", "config.yaml"),
    ("evaluate", "sort", "--suite", "suite.yaml"),
)
JSON = {
    "list": "[]",
    "text": '"x"',
    "null": "null",
    "unclosed": '{"a": [1, 2',
    "trailing data": '{"a": 1} {"b": 2}',
    "trailing comma": '{"a": 1,}',
    "single quotes": "{'a': 1}",
    "comment": '{"a": 1} // no',
    "NaN": '{"a": NaN}',
    "overflow": '{"a": 1e999}',
    "negative overflow": '{"a": [-1e400]}',
    "duplicate key": '{"a": 1, "a": 2}',
    "duplicate key inside": '{"b": {"a": 1, "a": 1}}',
    "deep list": '{"a": ' + "[" * 100_000,
    "deep, closed": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "150 levels": '{"a": ' + "[" * 150 + "]" * 150 + "}",
    "deep mapping": '{"a": ' * 50_000 + "1" + "}" * 50_000,
    "integer of 5,000 digits": '{"a": ' + "9" * 5000 + "}",
    "integer of 400 digits": '{"a": -' + "9" * 400 + "}",
    "byte-order mark": "\ufeff{}",
    "NUL": '{"a": "\0"}',
    "NUL behind": "{}\0",
    "control character": '{"a": "\x01"}',
    "lone surrogate": '{"a": "\\ud800"}',
    "reversed surrogates": '{"a": "\\udc00\\ud800"}',
    "surrogate in bytes": '{"a": "\ud800"}',
    "bad escape": '{"a": "\\x41"}',
    "overlong UTF-8": b'{"a": "\xc0\xaf"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "20 MB": '{"a": "' + "x" * 20_000_000 + '"}',
}


def _json(kind: str, file: str, commands: tuple[tuple[str, ...], ...]) -> Iterator[Case]:
    for name, content in JSON.items():
        if name == "20 MB" and file.endswith("tokenizer.json"):
            continue  # that of large vocabularies has more
        yield Case(
            kind=kind, name=f"{file} {name}", make=text(file, content), commands=commands, message=file
        )
    for what in SPECIAL:
        if what == "dangling symlink" and not file.endswith("/config.json"):
            continue  # the same as no such file
        if what == "symlink to itself" and not file.endswith("/config.json"):
            continue
        yield Case(
            kind=kind, name=f"{file} {what}", make=special(file, what), commands=commands, message="add"
        )


def _entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def change(data: dict[str, Any]) -> None:
        name = next(name for name in data if name != "__metadata__")
        data[name] |= changes

    return change


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    def change(data: dict[str, Any]) -> None:
        del next(entry for name, entry in data.items() if name != "__metadata__")[key]

    return change


def _moved(by: int) -> Callable[[dict[str, Any]], Any]:
    def change(data: dict[str, Any]) -> None:
        last = [entry for name, entry in data.items() if name != "__metadata__"][-1]
        last["data_offsets"] = [offset + by for offset in last["data_offsets"]]

    return change


def _renamed(new: str) -> Callable[[dict[str, Any]], Any]:
    def change(data: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in data if "layers.3" in name)
        return {(new if key == name else key): value for key, value in data.items()}

    return change


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"shape {value!r}": _entry(shape=value)
        for value in (None, 7, "x", [], [1.5], [-1, -5], [True], ["96"], [[96]])
    },
    **{f"shape {value!r}": _entry(shape=value) for value in ([10**30], [NAN], [INF], [0], [2**63, 0], {})},
    "shape of 5,000 dimensions": _entry(shape=[1] * 5000),
    "shape of zeros and huge sizes": _entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    **{
        f"dtype {value!r}": _entry(dtype=value)
        for value in (None, 7, "X9", "", [], {}, "f32", "BF16\0", "I4", "F64")
    },
    **{
        f"offsets {value!r}": _entry(data_offsets=value)
        for value in (
            None,
            7,
            [],
            [0],
            [0, 1, 2],
            [-8, 8],
            [0.0, 8.0],
            [8, 0],
            ["0", "8"],
            [0, 10**30],
            [True, 8],
            [0, NAN],
        )
    },
    "no shape": _without("shape"),
    "no dtype": _without("dtype"),
    "no offsets": _without("data_offsets"),
    "an entry that is a list": lambda data: {**data, "x": []},
    "an entry that is null": lambda data: {**data, "x": None},
    "a gap": _moved(8),
    "an overlap": _moved(-8),
    "out of the file": _moved(10**12),
    "metadata is a list": lambda data: {**data, "__metadata__": []},
    "metadata is a number": lambda data: {**data, "__metadata__": 7},
    "metadata holds a mapping": lambda data: {**data, "__metadata__": {"a": {}}},
    "metadata holds a number": lambda data: {**data, "__metadata__": {"a": 1}},
    "no tensors": lambda data: {},
    "only metadata": lambda data: {"__metadata__": {"format": "pt"}},
    "a list": lambda data: "[]",
    "a number": lambda data: "123456",
    "a duplicate tensor": lambda data: json.dumps(data)[:-1] + ", " + json.dumps(data)[1:],
    "deep": lambda data: '{"a":' + "[" * 100_000,
    "NaN": lambda data: json.dumps(data)[:-1] + ', "x": NaN}',
    "not UTF-8": lambda data: json.dumps(data).encode() + b"\xff\xff",
    "spaces only": lambda data: " " * 100,
    "trailing text": lambda data: json.dumps(data) + "x",
    "lone surrogate": lambda data: json.dumps(data)[:-1] + ', "\\ud800": {}}',
    "integer of 5,000 digits": lambda data: (
        '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 4]}}'
    ),
    "layer 123,456": _renamed("model.layers.123456.mlp.down_proj.weight"),
    "layer 10 ** 12": _renamed(f"model.layers.{10**12}.mlp.down_proj.weight"),
    "layer of 5,000 digits": _renamed(f"model.layers.{'9' * 5000}.mlp.down_proj.weight"),
    "layer of a superscript": _renamed("model.layers.\u00b2.mlp.down_proj.weight"),
    "layer of Arabic digits": _renamed("model.layers.\u0663\u0663.mlp.down_proj.weight"),
    "name with newlines": _renamed("model\n.layers.3.\x1b[2J"),
    "empty name": _renamed(""),
    "long name": _renamed("x" * 100_000),
}


def _bytes(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        content = (folder / name).read_bytes()
        replaced(folder, name).write_bytes(change(content))

    return make


FILES: dict[str, Callable[[bytes], bytes]] = {
    "seven bytes": lambda content: content[:7],
    "length only": lambda content: content[:8],
    "half a header": lambda content: content[:300],
    "half the weights": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "twice": lambda content: content * 2,
    "length of zero": lambda content: struct.pack("<Q", 0) + content[8:],
    "length of one": lambda content: struct.pack("<Q", 1) + content[8:],
    "length of 2 ** 64 - 1": lambda content: struct.pack("<Q", 2**64 - 1) + content[8:],
    "length of 2 ** 63": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "length of 90 million": lambda content: struct.pack("<Q", 90_000_000) + content[8:],
    "length of the file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "length a little too short": lambda content: (
        struct.pack("<Q", struct.unpack("<Q", content[:8])[0] - 9) + content[8:]
    ),
    "big-endian length": lambda content: content[:8][::-1] + content[8:],
    "a pickle": lambda content: b"\x80\x04\x95" + content,
    "a ZIP file": lambda content: b"PK\x03\x04" + content,
    "a pointer of Git LFS": lambda content: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    ),
    "a web page": lambda content: b"<!doctype html><html>404</html>",
}


def safetensors() -> Iterator[Case]:
    """Weight files."""
    for name, change in HEADERS.items():
        yield Case(
            kind="safetensors",
            name=f"header: {name}",
            make=with_header(change),
            commands=COMMANDS,
            message="",
        )
    for name, cut in FILES.items():
        yield Case(kind="safetensors", name=name, make=_bytes(cut), commands=COMMANDS, message=WEIGHTS)
    for what in SPECIAL:
        yield Case(
            kind="safetensors", name=what, make=special(WEIGHTS, what), commands=COMMANDS, message="add"
        )
    for name, change in list(HEADERS.items())[::5]:
        make = with_header(change, "sort/adapter_model.safetensors")
        if not name.startswith("layer") and "name" not in name:
            yield Case(
                kind="safetensors",
                name=f"adapter: {name}",
                make=make,
                commands=ADAPTER_COMMANDS[:3],
                message="sort",
            )
    for name, cut in list(FILES.items())[::2]:
        yield Case(
            kind="safetensors",
            name=f"adapter: {name}",
            make=_bytes(cut, "sort/adapter_model.safetensors"),
            commands=ADAPTER_COMMANDS,
            message="sort",
        )


def shard(model: Path) -> dict[str, Any]:
    """Make a model's weights one shard of an index, and return the index."""
    path = model / "model.safetensors"
    content = path.read_bytes()
    data, _ = header(path)
    replaced(model, path.name)
    (model / "one.safetensors").write_bytes(content)
    names = (name for name in data if name != "__metadata__")
    return {"metadata": {"total_size": len(content)}, "weight_map": dict.fromkeys(names, "one.safetensors")}


INDEX = "add/model.safetensors.index.json"


def _index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        data = shard(folder / "add")
        made = change(data)
        as_json(INDEX, data if made is None else made)(folder)

    return make


def _map_to(place: object) -> Callable[[dict[str, Any]], Any]:
    return lambda data: {"weight_map": dict.fromkeys(data["weight_map"], place)}


def index() -> Iterator[Case]:
    """Index files."""
    for case in _json("index", INDEX, COMMANDS):

        def make(folder: Path, put: Callable[[Path], None] = case.make) -> None:
            shard(folder / "add")
            put(folder)

        yield Case(kind="index", name=case.name, make=make, commands=COMMANDS, message="add")
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "no map": lambda data: {"metadata": {}},
        "an empty map": lambda data: {"weight_map": {}},
        "a list as map": lambda data: {"weight_map": list(data["weight_map"])},
        "names of tensors that are missing": lambda data: data["weight_map"].update(x="one.safetensors"),
        **{
            f"shard {str(place)[:30]!r}": _map_to(place)
            for place in (
                None,
                7,
                [],
                {},
                "",
                ".",
                "..",
                "../base/model.safetensors",
                "/etc/passwd",
                "/dev/zero",
                "a/one.safetensors",
                "missing.safetensors",
                "one\0.safetensors",
                "x" * 5000,
                "~/x",
                "config.json",
                "..\\base",
                "one.safetensors/",
                "./one.safetensors",
            )
        },
        "1,000 missing shards": lambda data: {"weight_map": {f"t{i}": f"s{i}" for i in range(1000)}},
    }
    for name, change in changes.items():
        yield Case(kind="index", name=name, make=_index(change), commands=COMMANDS, message="add")


def model_config() -> Iterator[Case]:
    """config.json and the files beside it."""
    yield from _json("model_config", "add/config.json", COMMANDS)
    for file in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        for number, case in enumerate(_json("model_config", f"add/{file}", COMMANDS)):
            if number % 3 == 0 or file == "tokenizer.json":
                yield case
    values: dict[str, tuple[Any, ...]] = {
        "model_type": (7, [], "no_such_model", "", None),
        "architectures": ("LlamaForCausalLM", [7], {}),
        "vocab_size": (0, -1, 1.5, "253", True, 10**12, [], INF),
        "hidden_size": (0, -96, 96.5, "x", 10**9, INF, []),
        "num_hidden_layers": (-1, 1.5, "4", 10**9, True, 5, [], INF),
        "num_attention_heads": (0, -1, "x", 10**9),
        "num_key_value_heads": (0, -4, "x", 10**9, 3),
        "head_dim": (0, -1, "x", 10**9),
        "tie_word_embeddings": ("yes", 7, []),
        "quantization_config": (7, "x"),
        "text_config": (7, [], "x", {"vocab_size": -1}, {"num_hidden_layers": 10**9}),
        "num_local_experts": (-1, 10**9, "x"),
    }
    for key, wrong in values.items():
        for value in wrong:
            yield Case(
                kind="model_config",
                name=f"{key}: {value!r}",
                make=json_with("add/config.json", **{key: value}),
                commands=(MERGE, CHECK, EVALUATE)
                if not (key == "model_type" and value in ("", None))
                else (EVALUATE,),
                message="add",
            )
    wrong_for_transformers: dict[str, tuple[Any, ...]] = {
        "hidden_act": (7, "no_such_function"),
        "rms_norm_eps": ("x", []),
        "rope_parameters": (7, {"rope_type": "no_such_type"}, {"rope_type": 7}, {"rope_theta": "x"}),
        "intermediate_size": (0, -1, "x", 10**9, []),
        "max_position_embeddings": (-1, "x"),
        "layer_types": (7, ["x"], ["no_such_attention"] * 4),
        "pad_token_id": ("x", 10**9),
        "dtype": (7, []),
        "auto_map": ({"AutoConfig": "code.Config"},) * 0,
        "attention_dropout": ("x",),
    }
    for key, wrong in wrong_for_transformers.items():
        for value in wrong:
            make = json_with("add/config.json", **{key: value})
            yield Case(
                kind="model_config", name=f"{key}: {value!r}", make=make, commands=(FISHER,), message=""
            )
    vocabularies: dict[str, Any] = {
        "no model": {},
        "model is a list": {"model": []},
        "vocabulary is a number": {"model": {"vocab": 7}},
        "ids are texts": {"model": {"vocab": {"a": "0"}}},
        "ids are negative": {"model": {"vocab": {"a": -1}}},
        "ids are huge": {"model": {"vocab": {"a": 10**30}}},
        "ids are flags": {"model": {"vocab": {"a": True}}},
        "pairs without token": {"model": {"vocab": [[]]}},
        "pairs of numbers": {"model": {"vocab": [[1, 2]]}},
        "added tokens are a mapping": {"model": {"vocab": {"a": 0}}, "added_tokens": {"a": 1}},
        "added token without id": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "x"}]},
        "added token is a text": {"model": {"vocab": {"a": 0}}, "added_tokens": ["x"]},
        "unknown tokenizer model": {"model": {"type": "Sorcery", "vocab": {"a": 0}}},
    }
    for name, data in vocabularies.items():
        make = as_json("add/tokenizer.json", data)
        yield Case(
            kind="model_config",
            name=f"tokenizer: {name}",
            make=make,
            commands=(CHECK, EVALUATE),
            message="",
        )


def adapter() -> Iterator[Case]:
    """LoRA adapters."""
    file = "sort/adapter_config.json"
    for case in _json("adapter", file, ADAPTER_COMMANDS[:3]):
        yield Case(kind="adapter", name=case.name, make=case.make, commands=case.commands, message="sort")
    values: dict[str, tuple[Any, ...]] = {
        "peft_type": (None, "IA3", 7, [], "lora"),
        "r": (None, 0, -1, 1.5, "8", True, 10**9, 9, [], INF, {}),
        "lora_alpha": (None, "x", NAN, INF, 1e9, 10**30, [], {}, True),
        "use_rslora": ("yes", 7, []),
        "use_dora": (True, "x"),
        "rank_pattern": (
            [],
            "x",
            7,
            {"q_proj": None},
            {"q_proj": 0},
            {"q_proj": 1.5},
            {"(": 8},
            {"[": 8},
            {"a{9999999999}": 8},
            {"(" * 3000 + ")" * 3000: 8},
            {"x" * 2000: 8},
            {"q_proj": 10**9},
            {"(?P<a>x)(?P<a>y": 8},
        ),
        "alpha_pattern": (
            [],
            "x",
            {"q_proj": None},
            {"q_proj": "x"},
            {"q_proj": NAN},
            {"q_proj": 1e300},
            {"*": 16},
            {"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\\1\\d": 16},
            {"(?:[a-z_.0-9]{1,60000}){1,60000}[A-Z]": 1},
            {"(?:[a-z.0-9_]{1,200}){1,60000}Z": "x"},
        ),
        "modules_to_save": ("lm_head", 7, [7], {}, ["embed_tokens"]),
        "init_lora_weights": (7, [], "corda"),
        "base_model_name_or_path": (7, [], {}),
        "layer_replication": ([[0, 4]], "x"),
        "trainable_token_indices": ([1], "x"),
        "target_parameters": (["x"],),
        "loftq_config": ({"bits": 4},),
    }
    for key, wrong in values.items():
        for value in wrong:
            yield Case(
                kind="adapter",
                name=f"{key}: {str(value)[:40]!r}",
                make=json_with(file, **{key: value}),
                commands=ADAPTER_COMMANDS[:3],
                message="",
            )
    for value in (
        "",
        "nowhere",
        "~nosuchuser/base",
        "no/such\0base",
        "x" * 5000,
        "a/" * 3000,
        "sort",
        ".",
        "/dev/zero",
    ):
        yield Case(
            kind="adapter",
            name=f"own base {value[:30]!r}",
            make=json_with(file, base_model_name_or_path=value),
            commands=ADAPTER_COMMANDS[3:],
            message="",
        )
    weights = "sort/adapter_model.safetensors"
    tensors: dict[str, Callable[[dict[str, Any]], Any]] = {
        "factors of int32": lambda data: {
            name: entry | {"dtype": "I32"} if name != "__metadata__" else entry
            for name, entry in data.items()
        },
        "only one factor": lambda data: {
            name.replace("q_proj.lora_A", "q_proj.lora_X"): entry for name, entry in data.items()
        },
        "an unknown module": lambda data: {
            name.replace("q_proj", "no_proj"): entry for name, entry in data.items()
        },
        "names without prefix": lambda data: {
            name.replace("lora_A", "x"): entry for name, entry in data.items()
        },
    }
    for name, change in tensors.items():
        yield Case(
            kind="adapter",
            name=name,
            make=with_header(change, weights),
            commands=ADAPTER_COMMANDS[:3],
            message="",
        )

    def empty(folder: Path) -> None:
        content = b'{"__metadata__":{"format":"pt"}} '
        replaced(folder, weights).write_bytes(struct.pack("<Q", len(content)) + content)

    yield Case(
        kind="adapter", name="no tensors", make=empty, commands=ADAPTER_COMMANDS[:3], message="no tensors"
    )
    for what in SPECIAL:
        yield Case(
            kind="adapter",
            name=what,
            make=special(weights, what),
            commands=ADAPTER_COMMANDS[:3],
            message="sort",
        )
