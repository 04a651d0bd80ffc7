"""Models with other tokens, ids or padding: rows follow the token, and what is scored is exported."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.errors import ConfigError, ModelError
from evomerge.merging import mergekit, methods
from evomerge.merging.analysis.norms import task_vector_norms
from evomerge.merging.compatibility import check
from evomerge.merging.export.writer import write
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.recipe_data import TokenRow
from evomerge.merging.sources.checkpoint import Checkpoint
from evomerge.merging.sources.opening import open_sources, open_used
from evomerge.merging.sources.source import Source
from evomerge.merging.sources.vocabulary import Rows, row_maps, row_tensors
from tests.merging.conftest import WORDS, llama, perturb
from tests.merging.export.test_writer import assert_same_bits

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
START, END, TOOL = "<|im_start|>", "<|im_end|>", "<|tool|>"
BOTH = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def make(
    folder: Path, seed: int, words: Sequence[str], special: Sequence[str] = (), *, rows: int = 0, tied: bool
) -> str:
    """Save a random Llama with a word tokenizer and further special tokens; rows: with padding."""
    total = max(rows, len(words) + len(special))
    # Three separate models of one family; float32, so that every row is its own.
    model = perturb(llama(seed=0, vocab_size=total, tie_word_embeddings=tied), seed, 0.5)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base with padding; a chat model with new special tokens; one with permuted ids and its own word."""
    folder = tmp_path_factory.mktemp("family")
    tied = request.param
    permuted = [*WORDS[:4], *WORDS[:3:-1], "own"]
    return {
        "base": make(folder / "base", 1, WORDS, rows=33, tied=tied),
        "chat": make(folder / "chat", 2, WORDS, [START, END], rows=40, tied=tied),
        "other": make(folder / "other", 3, permuted, [TOOL, START], tied=tied),
    }


def recipe_of(models: dict[str, str], *sources: str, tokenizer: str = "", **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"base": "base", "dtype": "float32", "tokenizer": tokenizer}
    method = changes.pop("method", "linear")
    parameters = changes.pop("parameters", {})
    group = TensorGroup(method=method, sources=sources, parameters=parameters)
    return Recipe(models=models, groups=(group,), **(settings | changes))


def row(source: Source, token: str, tensor: str = EMBEDDING) -> torch.Tensor:
    assert source.vocabulary is not None
    return source.tensor(tensor)[source.vocabulary[token]]


def test_rows_follow_their_token() -> None:
    target = Rows(tokens={"a": 0, "b": 1, "c": 3}, count=6)
    models = {
        "same": Rows(tokens={"a": 0, "b": 1, "c": 3}, count=6),
        "turned": Rows(tokens={"c": 0, "b": 1, "a": 2}, count=5),
        "cut": Rows(tokens={"a": 0, "b": 1, "c": 3}, count=3),  # a tokenizer larger than its embeddings
        "short": Rows(tokens={"a": 0, "x": 4}, count=6),
    }
    found = {name: rows.tolist() for name, rows in row_maps(models, target).items()}
    assert found == {
        "same": [0, 1, 2, 3, 4, 5],
        "turned": [2, 1, -1, 0, 4, -1],
        "cut": [0, 1, 2, -1, -1, -1],
        "short": [0, -1, 2, -1, -1, 5],
    }
    assert all(rows.dtype == np.int64 for rows in row_maps(models, target).values())


@given(st.permutations("abcdef"), st.permutations("cdefgh"), st.integers(0, 4), st.integers(0, 4))
def test_a_row_has_its_token_or_none(ours: list[str], theirs: list[str], more: int, pad: int) -> None:
    model = Rows(tokens={token: i for i, token in enumerate(ours)}, count=6 + more)
    target = Rows(tokens={token: i for i, token in enumerate(theirs)}, count=6 + pad)
    rows = row_maps({"m": model}, target)["m"]
    assert len(rows) == target.count
    for index, own in enumerate(rows):
        token = theirs[index] if index < 6 else None
        if token in ours:
            assert ours[own] == token
        elif token is None and index < model.count:
            assert own == index
        else:
            assert own == -1


def test_unasked_other_tokens_are_refused_with_the_fix(family: dict[str, str], tmp_path: Path) -> None:
    text = (
        r"'chat' and 'base' have different vocabularies\n.*\n.*'<\|im_start\|>' is row 32 in chat and absent"
    )
    with pytest.raises(ModelError, match=text) as caught:
        write(recipe_of(family, "chat"), tmp_path / "out")
    assert "do: set the result's vocabulary: `tokenizer: base`, `tokenizer: union`" in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="have different vocabularies"):
        Workbench(family, "base")
    with pytest.raises(ModelError, match="have different vocabularies"):
        task_vector_norms(family, "base")
    norms = task_vector_norms(family, "base", tokenizer="union")
    assert all(norm > 0 for norm in norms.values())


@BOTH
@pytest.mark.parametrize("larger", ["base", "a"])
def test_other_padding_merges_unasked_with_a_note(tied: bool, larger: str, tmp_path: Path) -> None:
    models = {
        name: make(tmp_path / name, seed, WORDS, rows=40 if name == larger else 32, tied=tied)
        for seed, name in enumerate(("base", "a"), start=1)
    }
    recipe = recipe_of(models, "a")
    bench = Workbench(models, "base")
    count = {"base": 40, "a": 32}[larger]
    assert f"padding differs: a has {72 - count} embedding rows, the result {count}" in bench.notes
    bench.load(recipe)
    assert_same_bits(bench, write(recipe, tmp_path / "out"), "float32")
    merged = Checkpoint.open(str(tmp_path / "out"))
    assert merged.config["vocab_size"] == count
    a, base = (Checkpoint.open(models[name]) for name in ("a", "base"))
    for name in row_tensors(merged):
        assert torch.equal(merged.tensor(name)[:32], a.tensor(name)[:32])
        assert torch.equal(merged.tensor(name)[32:], base.tensor(name)[32:])


def test_padding_nobody_else_has(tmp_path: Path) -> None:
    models = {
        "base": make(tmp_path / "base", 1, WORDS, tied=True),
        "a": make(tmp_path / "a", 2, WORDS, [END], tied=True),
        "b": make(tmp_path / "b", 3, WORDS, rows=36, tied=True),
        "wide": make(tmp_path / "wide", 3, WORDS, [], rows=38, tied=True),
    }
    aligned = open_sources(models, "base", tokenizer="wide")
    wide, b = (
        Checkpoint.open(models["wide"]).tensor(EMBEDDING),
        Checkpoint.open(models["b"]).tensor(EMBEDDING),
    )
    base = aligned["base"].tensor(EMBEDDING)
    torch.testing.assert_close(base[32:36], (wide[32:36] + b[32:36]) / 2, rtol=1e-6, atol=0)
    assert torch.equal(base[36:], wide[36:])
    assert torch.equal(aligned["a"].tensor(EMBEDDING)[32:], base[32:])  # its 32 is <|im_end|>, no padding


def edit_tokens(folder: str, change: Any) -> None:
    path = Path(folder) / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data["model"]["vocab"])
    path.write_text(json.dumps(data))


def test_a_token_nobody_has_a_row_for_is_zero(tmp_path: Path) -> None:
    """A tokenizer that knows more tokens than there are rows, as happens when embeddings were not resized."""
    models = {
        "base": make(tmp_path / "base", 1, WORDS, tied=True),
        "a": make(tmp_path / "a", 2, WORDS, [END], tied=True),
    }
    edit_tokens(models["base"], lambda vocab: vocab.update(late=32))
    aligned = open_sources(models, "base", tokenizer="union")
    assert aligned["base"].vocabulary == {w: i for i, w in enumerate([*WORDS, "late", END])}
    for source in aligned.values():
        assert source.tensor(EMBEDDING).shape[0] == 34
        assert not source.tensor(EMBEDDING)[32].any()
        assert torch.equal(row(source, END), Checkpoint.open(models["a"]).tensor(EMBEDDING)[32])


@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_rows_are_padded_to_a_multiple(multiple: int, family: dict[str, str], tmp_path: Path) -> None:
    text = f"""
{{merge_method: linear, dtype: float32, models: [{{model: {family["base"]}}}],
 tokenizer: {{source: base, pad_to_multiple_of: {multiple}}}}}"""
    recipe = mergekit.read(text)
    again = mergekit.read(mergekit.write(recipe))
    assert (again.pad_rows, again.tokenizer) == (multiple, recipe.tokenizer)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.hash != mergekit.read(text.replace(f": {multiple}}}", ": 1024}")).hash
    written = write(recipe, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(written)
    rows = -(-33 // multiple) * multiple
    assert model.config.vocab_size == rows
    source = Checkpoint.open(family["base"])
    for name in row_tensors(source):
        table = model.state_dict()[name]
        assert torch.equal(table[:33], source.tensor(name))
        assert table.shape[0] == rows
        assert not table[33:].any()
    again_written = write(Recipe.from_yaml((written / "recipe.yaml").read_text()), tmp_path / "again")
    assert (again_written / "model.safetensors").read_bytes() == (written / "model.safetensors").read_bytes()


def test_rows_without_tokens_are_not_padded(family: dict[str, str], tmp_path: Path) -> None:
    folder = make(tmp_path / "bare", 1, WORDS, tied=True)
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json, so its rows can't be padded"):
        open_used(dataclasses.replace(Recipe.copy_of(folder, dtype="float32"), pad_rows=8))


def test_ids_with_holes_make_no_union(tmp_path: Path) -> None:
    models = {
        "base": make(tmp_path / "base", 1, WORDS, tied=True),
        "a": make(tmp_path / "a", 2, WORDS, [END], tied=True),
    }
    edit_tokens(models["base"], lambda vocab: vocab.pop("w20"))
    with pytest.raises(ModelError, match="can't be extended to a union"):
        open_sources(models, "base", tokenizer="union")
    assert open_sources(models, "base", tokenizer="base")["a"].vocabulary is not None


def test_the_union_keeps_the_bases_ids_and_appends(family: dict[str, str]) -> None:
    sources = open_sources(family, "base", tokenizer="union")
    for source in sources.values():
        assert source.vocabulary is not None
        assert list(source.vocabulary)[32:] == [START, END, "own", TOOL]
        assert [source.vocabulary[word] for word in WORDS] == list(range(32))
        assert [source.vocabulary[token] for token in (START, END, "own", TOOL)] == [32, 33, 34, 35]
        assert {source.headers[name].shape[0] for name in row_tensors(source)} == {36}
        assert source.config["vocab_size"] == 36


def test_a_token_a_source_lacks_leaves_its_task_vector_zero(family: dict[str, str]) -> None:
    opened = {name: Checkpoint.open(location) for name, location in family.items()}
    aligned = open_sources(family, "base", tokenizer="union")
    for tensor in row_tensors(opened["base"]):
        mean = (row(opened["chat"], START, tensor) + row(opened["other"], START, tensor)) / 2
        assert torch.equal(row(aligned["base"], START, tensor), mean)
        for token, owner in ((END, "chat"), (TOOL, "other"), ("own", "other")):
            for source in aligned.values():
                assert torch.equal(row(source, token, tensor), row(opened[owner], token, tensor))
    swapped = open_sources({"base": family["other"], "chat": family["chat"]}, "base", tokenizer="base")
    assert torch.equal(row(swapped["chat"], "own"), row(opened["other"], "own"))  # the base has it


@pytest.mark.parametrize("name", ["base", "chat", "other"])
def test_a_one_hot_merge_under_union_is_the_source(name: str, family: dict[str, str], tmp_path: Path) -> None:
    out = write(recipe_of(family, name, tokenizer="union"), tmp_path / "out")
    merged, source = Checkpoint.open(str(out)), Checkpoint.open(family[name])
    assert source.vocabulary is not None
    assert merged.vocabulary == open_sources(family, "base", tokenizer="union")["base"].vocabulary
    for tensor in source.headers:
        if tensor in row_tensors(source):
            for token in source.vocabulary:
                assert torch.equal(row(merged, token, tensor), row(source, token, tensor)), token
        else:
            assert torch.equal(merged.tensor(tensor), source.tensor(tensor))
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = [token for token in source.vocabulary if token not in ("<pad>", "<unk>")]
    ids = tokenizer(" ".join(texts), return_tensors="pt", add_special_tokens=False)["input_ids"]
    own = AutoTokenizer.from_pretrained(source.folder)(
        " ".join(texts), return_tensors="pt", add_special_tokens=False
    )["input_ids"]
    ours = [merged.vocabulary[token] for token in texts]  # type: ignore[index]
    assert ids.tolist() == [ours]
    assert own.tolist() == [[source.vocabulary[token] for token in texts]]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(out)
        original = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
        torch.testing.assert_close(
            model(input_ids=ids).logits[..., ours],
            original(input_ids=own).logits[..., own[0]],
            rtol=1e-5,
            atol=1e-5,
        )


def test_fisher_files_do_not_follow_moved_rows(family: dict[str, str]) -> None:
    group = TensorGroup(method="fisher", sources=("chat", "other"))
    files = {"chat": "chat.safetensors", "other": "other.safetensors"}
    recipe = Recipe(models=family, base="base", groups=(group,), tokenizer="union", fisher=files)
    with pytest.raises(ConfigError, match="can't merge models whose embedding rows are matched by token"):
        check(recipe, open_used(recipe))


@pytest.mark.parametrize(
    ("tokenizer", "method"),
    [
        *(
            ("union", method)
            for method in methods.names()
            if not methods.get(method).file and not methods.get(method).factored
        ),
        *((tokenizer, method) for tokenizer in ("base", "chat", "other") for method in ("ties", "slerp")),
    ],
)
def test_scored_is_exported(tokenizer: str, method: str, family: dict[str, str], tmp_path: Path) -> None:
    """mergekit truncates other vocabularies or crashes on them, depending on the method."""
    sources = ("chat", "other")[: methods.get(method).max_sources]
    recipe = recipe_of(family, *sources, tokenizer=tokenizer, method=method, dtype="bfloat16", seed=2)
    bench = Workbench(family, "base", tokenizer=tokenizer)
    bench.load(recipe)
    out = write(recipe, tmp_path / "out")
    assert_same_bits(bench, out)
    rows = {"base": 33, "union": 36, "chat": 40, "other": 35}[tokenizer]
    config = AutoConfig.from_pretrained(out)
    assert config.vocab_size == rows
    assert bench.model.get_input_embeddings().weight.shape[0] == rows
    exported = AutoTokenizer.from_pretrained(out)
    text = f"<s> w3 own {START} w27 {TOOL} w9 {END} </s>"
    assert exported(text)["input_ids"] == bench.tokenizer(text)["input_ids"]
    assert exported.get_vocab() == bench.tokenizer.get_vocab()
    for kind in ("bos", "eos", "pad"):
        token = getattr(exported, f"{kind}_token")
        given_id = getattr(config, f"{kind}_token_id")
        assert given_id in (None, exported.convert_tokens_to_ids(token))
    generation = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert exported.convert_ids_to_tokens(generation.eos_token_id) == "</s>"


def test_one_source_of_many_is_scored_as_exported(family: dict[str, str], tmp_path: Path) -> None:
    """The rows a source lacks come from models the recipe does not merge; both sides know them."""
    for tokenizer in ("union", "chat"):
        bench = Workbench(family, "base", tokenizer=tokenizer)
        recipe = recipe_of(family, "base", tokenizer=tokenizer, base="base")
        bench.load(recipe)
        assert_same_bits(bench, write(recipe, tmp_path / tokenizer), "float32")
    fewer = {name: family[name] for name in ("base", "chat")}
    with pytest.raises(ConfigError, match="a recipe needs all the workbench's models"):
        bench.load(recipe_of(fewer, "base", tokenizer="chat"))


def test_equal_vocabularies_are_not_wrapped(models: dict[str, str]) -> None:
    for tokenizer in ("", "base", "union", "a"):
        sources = open_used(recipe_of(models, "a", "b", tokenizer=tokenizer))
        assert {type(source) for source in sources.values()} == {Checkpoint}


def test_special_flags_of_the_union(family: dict[str, str], tmp_path: Path) -> None:
    out = write(recipe_of(family, "chat", tokenizer="union"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    added = tokenizer.added_tokens_decoder
    assert {added[i].content: added[i].special for i in (32, 33, 34, 35)} == {
        START: True,
        END: True,
        "own": False,
        TOOL: True,
    }
    ids = tokenizer(f"{START} w3 own {END}", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["w3", "own"]
    assert tokenizer.chat_template is None


def test_a_byte_level_bpe_grows(tmp_path: Path) -> None:
    """The text a chat model adds is found before the pieces; all other text is cut as before."""
    text = ["the merge of many models", "models merge the many weights"]
    made = {}
    for seed, (name, special) in enumerate({"base": [], "chat": [START, END]}.items(), start=1):
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False)
        tokenizer.train_from_iterator(text, trainer)
        tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
        perturb(llama(vocab_size=tokenizer.get_vocab_size()), seed).save_pretrained(tmp_path / name)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        fast.chat_template = f"{name}: {{{{ messages[0]['content'] }}}}"
        fast.save_pretrained(tmp_path / name)
        made[name] = str(tmp_path / name)
    out = write(recipe_of(made, "chat", tokenizer="union"), tmp_path / "out")
    union, chat, base = (AutoTokenizer.from_pretrained(each) for each in (out, made["chat"], made["base"]))
    prompt = f"{START}the models merge{END}"
    assert union(prompt)["input_ids"] == chat(prompt)["input_ids"]
    assert union.decode(union(prompt)["input_ids"]) == prompt
    assert union(text[0])["input_ids"] == base(text[0])["input_ids"]
    assert union.chat_template == base.chat_template


def test_models_without_tokenizer_must_have_the_rows(tmp_path: Path) -> None:
    models = {
        "base": make(tmp_path / "base", 1, WORDS, tied=True),
        "chat": make(tmp_path / "chat", 2, WORDS, [START], tied=True),
        "bare": make(tmp_path / "bare", 3, WORDS, tied=True),
        "wide": make(tmp_path / "wide", 3, WORDS, rows=35, tied=True),
    }
    for name in ("bare", "wide"):
        (Path(models[name]) / "tokenizer.json").unlink()
    few = {name: models[name] for name in ("base", "chat", "bare")}
    aligned = open_sources(few, "base", tokenizer="union")
    bare = Checkpoint.open(models["bare"]).tensor(EMBEDDING)
    assert torch.equal(aligned["bare"].tensor(EMBEDDING)[:32], bare)
    for tokenizer in ("", "base", "union"):
        with pytest.raises(ModelError, match=r"model 'wide' has no tokenizer\.json.*\n.*32 rows"):
            open_sources({name: models[name] for name in ("base", "wide")}, "base", tokenizer=tokenizer)
    both = {"bare": models["bare"], "wide": models["wide"]}
    with pytest.raises(ModelError, match=r"tensor 'model.embed_tokens.weight' has another shape in 'wide'"):
        check(recipe_of(both, "wide", base=None), open_sources(both, None))


def test_further_tables_of_tokens_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    models = {}
    for name, special in (("base", []), ("chat", [START])):
        models[name] = make(tmp_path / name, 1, WORDS, special, tied=True)
        path = tmp_path / name / "model.safetensors"
        save_file(load_file(path) | {"model.embed_tokens_per_layer.weight": torch.ones(60, 2)}, path)
    with pytest.raises(ModelError, match=r"'model\.embed_tokens_per_layer\.weight' has one row per token"):
        open_sources(models, "base", tokenizer="base")


def test_the_setting_of_a_recipe(models: dict[str, str]) -> None:
    assert recipe_of(models, "a").hash == recipe_of(models, "a", tokenizer="base").hash
    assert recipe_of(models, "a").to_data()["tokenizer"] == "base"
    assert not recipe_of(models, "a").asked
    assert Recipe.from_yaml(recipe_of(models, "a").to_yaml()).asked  # the file names the model
    union = recipe_of(models, "a", tokenizer="union")
    assert (union.tokenizer, union.pattern) == ("union", "base")
    assert union.hash != recipe_of(models, "a").hash
    assert Recipe.from_yaml(union.to_yaml()) == union
    renamed = {"x": models["a"], "y": models["b"]}
    assert recipe_of(renamed, "y", base="x", tokenizer="base").tokenizer == "x"
    assert recipe_of(renamed, "y", base=None, tokenizer="union").pattern == "x"
    with pytest.raises(ConfigError, match="there is no base model"):
        recipe_of(renamed, "y", base=None, tokenizer="base")
    with pytest.raises(ConfigError, match=r"names an unknown model 'unoin'\n.*did you mean 'union'"):
        recipe_of(models, "a", tokenizer="unoin")


@pytest.mark.parametrize(
    ("said", "tokenizer", "asked"),
    [
        ("", "base", False),
        ("tokenizer_source: base", "base", True),
        ("tokenizer_source: union", "union", True),
        ("tokenizer: {source: union}", "union", True),
        ("tokenizer: {source: m/other}", "other", True),
    ],
)
def test_mergekit_says_it_too(said: str, tokenizer: str, asked: bool) -> None:
    text = f"merge_method: ties\nbase_model: m/base\nmodels: [{{model: m/chat}}]\ndtype: float32\n{said}\n"
    recipe = mergekit.read(text)
    assert (recipe.tokenizer, recipe.asked) == (tokenizer, asked)
    again = mergekit.read(mergekit.write(recipe))
    assert again.hash == recipe.hash


def test_what_happens_to_the_tokens_is_noted(family: dict[str, str]) -> None:
    tail = "of the result's tokens, loses {} of its own, and {} move to other rows"
    for tokenizer, expected in {
        "union": {
            "the union adds 4 tokens to the 32 of base; 1 of them are not special tokens, and the tokenizer "
            "matches those literally in any text",
            "vocabularies differ: chat lacks 2 " + tail.format(0, 0),
            "vocabularies differ: other lacks 1 " + tail.format(0, 31),
        },
        "base": {
            "vocabularies differ: chat lacks 0 " + tail.format(2, 0),
            "vocabularies differ: other lacks 0 " + tail.format(3, 28),
        },
    }.items():
        assert expected <= set(Workbench(family, "base", tokenizer=tokenizer).notes)


def test_the_command_says_so_too(family: dict[str, str], tmp_path: Path) -> None:
    path, out = tmp_path / "merge.yaml", tmp_path / "out"
    text = f"merge_method: ties\nbase_model: {family['base']}\nmodels: [{{model: {family['chat']}}}]\n"
    path.write_text(f"{text}dtype: float32\n")
    refused = CliRunner().invoke(app, ["merge", str(path), str(out)])
    assert refused.exit_code == 2
    assert "`tokenizer: union`" in refused.stderr
    assert not out.exists()
    path.write_text(f"{text}dtype: float32\ntokenizer_source: union\n")
    merged = CliRunner().invoke(app, ["merge", str(path), str(out)])
    assert merged.exit_code == 0, merged.output
    assert "note: the union adds 2 tokens to the 32 of base; 0 of them are not special" in merged.output
    assert Checkpoint.open(str(out)).config["vocab_size"] == 34
    logging.disable(logging.NOTSET)  # the command silences libraries for good


def test_a_union_needs_the_bases_tokens(family: dict[str, str], tmp_path: Path) -> None:
    bare = make(tmp_path / "bare", 3, WORDS, tied=Checkpoint.open(family["chat"]).tied)
    (Path(bare) / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"model 'bare' has no tokenizer\.json, so its tokens"):
        open_sources({"bare": bare, "chat": family["chat"]}, "bare", tokenizer="union")


def test_a_head_with_rows_of_its_own_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    models = {}
    for name, special in (("base", []), ("chat", [START])):
        models[name] = make(tmp_path / name, 1, WORDS, special, tied=False)
        path = tmp_path / name / "model.safetensors"
        tensors = load_file(path)
        save_file(tensors | {HEAD: torch.cat([tensors[HEAD], tensors[HEAD][:3]])}, path)
    with pytest.raises(ModelError, match=r"'lm_head\.weight' has one row per token"):
        open_sources(models, "base", tokenizer="union")


def test_an_adapter_keeps_its_update_under_other_tokens(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    chat = make(tmp_path / "chat", 2, WORDS, [START], tied=True)
    named = {"base": models["base"], "lora": f"{models['base']}+{adapters['plain']}", "chat": chat}
    recipe = recipe_of(named, "lora", "chat", tokenizer="union", method="task_arithmetic")
    bench = Workbench(named, "base", tokenizer="union")
    bench.load(recipe)
    assert_same_bits(bench, write(recipe, tmp_path / "out"), "float32")
    plain, aligned = open_sources({"base": models["base"], "lora": named["lora"]}, "base"), bench.sources
    for name in plain["lora"].headers:
        ours, theirs = aligned["lora"].tensor(name), plain["lora"].tensor(name)
        assert torch.equal(ours[: len(theirs)], theirs)


def of_token(recipe: Recipe, source: str, token: str) -> torch.Tensor:
    return row(open_used(recipe)[source], token)


def test_rows_of_single_tokens_are_chosen(family: dict[str, str]) -> None:
    alone = open_sources({"base": family["base"]}, None) | open_sources({"other": family["other"]}, None)
    tokens = {
        START: TokenRow(model="other", token="own"),
        TOOL: TokenRow(),
        WORDS[5]: TokenRow(model="other", force=True),
        WORDS[6]: TokenRow(model="base", row=3, force=True),
        WORDS[7]: TokenRow(model="other"),
    }
    models = open_used(recipe_of(family, "chat", "other", tokenizer="union", tokens=tokens))
    without = open_used(recipe_of(family, "chat", "other", tokenizer="union"))
    names = ("chat", "other")
    for name in names:
        assert torch.equal(row(models[name], WORDS[5]), row(alone["other"], WORDS[5]))
        assert torch.equal(row(models[name], WORDS[6]), alone["base"].tensor(EMBEDDING)[3])
        assert torch.equal(row(models[name], WORDS[7]), row(without[name], WORDS[7]))  # no model lacks it
        assert torch.equal(row(models[name], START), row(without[name], START))  # both have it
        assert models[name].fingerprint != without[name].fingerprint
    assert not row(models["chat"], TOOL).any()
    assert torch.equal(row(models["other"], TOOL), row(alone["other"], TOOL))


def test_rows_are_chosen_where_vocabularies_agree(family: dict[str, str], tmp_path: Path) -> None:
    models = {"base": family["base"], "again": family["base"]}
    tokens = {WORDS[4]: TokenRow(force=True), WORDS[5]: TokenRow(model="base", token=WORDS[6], force=True)}
    recipe = recipe_of(models, "again", tokens=tokens)
    made = Checkpoint.open(str(write(recipe, tmp_path / "out")))
    base = Checkpoint.open(family["base"])
    assert not row(made, WORDS[4]).any()
    assert torch.equal(row(made, WORDS[5]), row(base, WORDS[6]))
    assert torch.equal(row(made, WORDS[7]), row(base, WORDS[7]))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"w99": TokenRow()}, "'w99' is no token"),
        ({"w3": TokenRow(model="base", token="w99")}, "which has no token 'w99'"),
        ({"w3": TokenRow(model="base", row=99)}, "takes row 99 of base"),
        ({"w3": TokenRow(model="bass")}, "unknown model 'bass'"),
    ],
)
def test_rows_that_do_not_exist_are_refused(
    tokens: dict[str, TokenRow], message: str, family: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_used(recipe_of(family, "chat", tokenizer="union", tokens=tokens))
