"""A tokenizer that splits text in another way than the model's tokenizer.json is refused; others pass."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from evomerge.errors import ModelError
from evomerge.merging.sources.tokenizer_check import check_tokenizer
from evomerge.zoo.settings import DEMO
from evomerge.zoo.skills import make_tokenizer

BYTES = [f"<0x{number:02X}>" for number in range(256)]
TEXTS = ["The lazy fox isn't 345 years old, is it? Question:\nAnswer: 12", "def f(x):\n    return x + 1"] * 3
DIGITS = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"


def words() -> Tokenizer:
    return make_tokenizer(DEMO.skills).backend_tokenizer


def byte_level(pattern: str | None = None) -> Tokenizer:
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        parts = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), parts])
    own.decoder = decoders.ByteLevel()
    return trained(own, ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet())


def sentence_pieces() -> Tokenizer:
    """Like that of Llama 2, whose spaces transformers 5 reads in its own way at the beginning of a text."""
    own = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated")
    own = trained(own, ["<unk>", "<s>", "</s>", *BYTES], [])
    own.pre_tokenizer = None
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return own


def trained(own: Tokenizer, special: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator(TEXTS, trainer)
    return own


def model(folder: Path, own: Tokenizer, kind: str, **config: Any) -> Any:
    """Write a model's files beside the weights; return a stand-in for the opened model."""
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return SimpleNamespace(folder=folder, location=str(folder), config={"model_type": kind})


def opened(source: Any) -> Any:
    return AutoTokenizer.from_pretrained(source.folder)


@pytest.mark.parametrize(
    ("own", "kind", "named"),
    [
        (words, "llama", "LlamaTokenizer"),
        (words, "llama", "LlamaTokenizerFast"),
        (words, "llama", "GPT2Tokenizer"),
        (words, "qwen3", "Qwen2Tokenizer"),
        (words, "qwen3", None),
        (words, "gpt_neox", None),
        (sentence_pieces, "gpt2", "GPT2Tokenizer"),
        (lambda: byte_level(DIGITS), "qwen3", "Qwen2Tokenizer"),
        (lambda: byte_level(DIGITS), "gpt2", "GPT2Tokenizer"),
    ],
)
def test_a_class_that_builds_another_tokenizer_is_refused_and_the_fix_works(
    own: Any, kind: str, named: str | None, tmp_path: Path
) -> None:
    source = model(tmp_path, own(), kind, **({"tokenizer_class": named} if named else {}))
    tokenizer = opened(source)
    with pytest.raises(ModelError) as caught:
        check_tokenizer(tokenizer, source)
    error = caught.value
    assert "splits text in another way than tokenizer.json" in error.what
    assert type(tokenizer).__name__ in str(error.got)
    assert (f"tokenizer_class: {named}" if named else "no tokenizer_class") in str(error.got)
    assert f"model_type: {kind}" in str(error.got)
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in str(error.fix)
    repaired = model(tmp_path, own(), kind, tokenizer_class="PreTrainedTokenizerFast")
    check_tokenizer(opened(repaired), repaired)


def test_where_no_setting_helps_the_error_says_so(tmp_path: Path) -> None:
    """transformers 5 ignores the named class for some types of models."""
    source = model(tmp_path, words(), "qwen2", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(ModelError) as caught:
        check_tokenizer(opened(source), source)
    assert "install a version of transformers that reads it as it is" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("own", "kind", "config"),
    [
        (words, "llama", {}),
        (words, "llama", {"tokenizer_class": "AClassOfItsOwn"}),
        (byte_level, "gpt2", {"tokenizer_class": "GPT2Tokenizer"}),
        (byte_level, "gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
        (byte_level, "gpt_neox", {"pad_token": "<|one more|>", "bos_token": "<|another|>"}),
        (sentence_pieces, "llama", {"tokenizer_class": "LlamaTokenizer"}),
        (sentence_pieces, "llama", {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}),
    ],
)
def test_what_differs_in_special_tokens_or_the_beginning_passes(
    own: Any, kind: str, config: dict[str, Any], tmp_path: Path
) -> None:
    source = model(tmp_path, own(), kind, **config)
    check_tokenizer(opened(source), source, [" Question: 1 2 3 <s>[INST] lazy fox </s> <s>The <|one more|>"])


def test_texts_that_are_asked_count_too(tmp_path: Path) -> None:
    """Words of few letters that only one of the two keeps whole."""
    source = model(tmp_path, byte_level(), "gpt2", tokenizer_class="GPT2Tokenizer")
    tokenizer = opened(source)
    text = "The lazy fox isn't 345 years old. The lazy fox isn't 345 years old"
    check_tokenizer(tokenizer, source, [text])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("zy fox", "isolated")
    with pytest.raises(ModelError, match="splits text in another way"):
        check_tokenizer(tokenizer, source, [text])


def test_a_file_that_changed_is_read_again_and_one_that_lacks_is_not_compared(tmp_path: Path) -> None:
    source = model(tmp_path, words(), "llama")
    tokenizer = opened(source)
    check_tokenizer(tokenizer, source)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError):
        check_tokenizer(tokenizer, source)
    (tmp_path / "tokenizer.json").unlink()
    check_tokenizer(tokenizer, source)
