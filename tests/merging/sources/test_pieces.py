"""Models without tokenizer.json are compared by the tokens of their other files."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

from evomerge.errors import ModelError
from evomerge.merging.compatibility import check
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.opening import open_used

TOKENS = ["<unk>", "<s>", "</s>", "▁a", "▁b", "é", *(f"w{i}" for i in range(26))]


def sentencepiece(tokens: list[str]) -> bytes:
    """A ModelProto: pieces with text, score and type, and a trainer's settings after them."""
    pieces = b""
    for token in tokens:
        text = token.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15\0\0\x80\xbf" + b"\x18\x01"
        pieces += b"\x0a" + bytes([len(piece)]) + piece
    return pieces + b"\x12\x03abc"


def tekken(tokens: list[str]) -> bytes:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(t.encode()).decode(), "token_str": t}
        for rank, t in enumerate(tokens)
    ]
    special = [{"rank": 0, "token_str": "<unk>", "is_control": True}]
    return json.dumps({"config": {}, "vocab": vocab, "special_tokens": special}).encode()


def byte_pairs(tokens: list[str]) -> bytes:
    return json.dumps({token: row for row, token in enumerate(tokens)}).encode()


def word_pieces(tokens: list[str]) -> bytes:
    return "\n".join(tokens).encode()


def ranks(tokens: list[str]) -> bytes:
    lines = (f"{base64.b64encode(t.encode()).decode()} {rank}" for rank, t in enumerate(tokens))
    return "\n".join(lines).encode()


FILES = {
    "tokenizer.model": sentencepiece,
    "spiece.model": sentencepiece,
    "sentencepiece.bpe.model": sentencepiece,
    "vocab.json": byte_pairs,
    "vocab.txt": word_pieces,
    "tekken.json": tekken,
    "qwen.tiktoken": ranks,
}


def bare(models: dict[str, str], folder: Path, **contents: dict[str, bytes]) -> Recipe:
    """Return a merge of copies of models without tokenizer.json; contents: model -> file -> its content."""
    own = {}
    for name, files in contents.items():
        shutil.copytree(models[name], folder / name)
        if "tokenizer.json" not in files:
            (folder / name / "tokenizer.json").unlink()
        for file, content in files.items():
            (folder / name / file).write_bytes(content) if content else None
        own[name] = str(folder / name)
    group = TensorGroup(method="linear", sources=tuple(own))
    return Recipe(models=own, groups=(group,))


@pytest.mark.parametrize("file", FILES)
def test_other_tokens_are_refused(file: str, models: dict[str, str], tmp_path: Path) -> None:
    other = [*TOKENS[:4], TOKENS[5], TOKENS[4], *TOKENS[6:]]
    same = bare(models, tmp_path / "same", a={file: FILES[file](TOKENS)}, b={file: FILES[file](TOKENS)})
    assert check(same, open_used(same)) == ()
    recipe = bare(models, tmp_path / "other", a={file: FILES[file](TOKENS)}, b={file: FILES[file](other)})
    with pytest.raises(ModelError, match="have different vocabularies") as caught:
        check(recipe, open_used(recipe))
    assert "2 tokens differ" in str(caught.value)
    assert "save both models' tokenizers as tokenizer.json" in str(caught.value)
    if "model" in file or file == "vocab.txt":
        assert "'▁b' is row 5 in b and row 4 in a" in str(caught.value)


def test_added_tokens_count(models: dict[str, str], tmp_path: Path) -> None:
    files = {"tokenizer.model": sentencepiece(TOKENS[:30])}
    added = {**files, "added_tokens.json": b'{"<|im_end|>": 30}'}
    recipe = bare(models, tmp_path, a=files, b=added)
    with pytest.raises(ModelError, match=r"'<\|im_end\|>' is row 30 in b and absent in a"):
        check(recipe, open_used(recipe))


def test_a_file_of_both_kinds_is_compared_by_the_common_one(models: dict[str, str], tmp_path: Path) -> None:
    """The usual Llama has tokenizer.json and tokenizer.model, some fine-tunes the second alone."""
    both = {"tokenizer.json": b"", "tokenizer.model": sentencepiece(TOKENS)}
    recipe = bare(models, tmp_path / "1", a=both, b={"tokenizer.model": sentencepiece(TOKENS)})
    assert check(recipe, open_used(recipe)) == ()
    recipe = bare(models, tmp_path / "2", a=both, b={"tokenizer.model": sentencepiece(TOKENS[::-1])})
    with pytest.raises(ModelError, match="have different vocabularies"):
        check(recipe, open_used(recipe))


def test_tokens_that_cannot_be_compared_are_noted(models: dict[str, str], tmp_path: Path) -> None:
    recipe = bare(models, tmp_path, a={"tokenizer.json": b""}, b={"tokenizer.model": sentencepiece(TOKENS)})
    (note,) = check(recipe, open_used(recipe))
    assert note == (
        "tokens can't be compared: b has tokenizer.model, a tokenizer.json; "
        "the merge takes embedding rows as they are"
    )


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "content", [b"\xff", b"{", b"[]", b'{"vocab": {}}', b"\x0a\xff\xff\xff\xff\x0f", b"\x07"]
)
def test_damaged_files_are_named(file: str, content: bytes, models: dict[str, str], tmp_path: Path) -> None:
    recipe = bare(models, tmp_path, a={file: content}, b={file: content})
    if file == "vocab.txt" and content.isascii():
        assert check(recipe, open_used(recipe)) == ()  # any line is a token
        return
    with pytest.raises(ModelError, match=file):
        check(recipe, open_used(recipe))
