"""Chat templates, end tokens and generation settings of a merge: chosen, noted, and scored as exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import ConfigError
from evomerge.merging.chat_templates import BUILT_IN
from evomerge.merging.export.adapter import write_adapter
from evomerge.merging.export.folder import folder_notes
from evomerge.merging.export.writer import write
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.reading import read_recipe
from evomerge.merging.recipe import Recipe, TensorGroup
from evomerge.merging.sources.chat import read_templates
from evomerge.merging.sources.opening import open_used

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "w1"},
    {"role": "assistant", "content": "w2"},
    {"role": "user", "content": "w3"},
]
CHAT = "{% for m in messages %}chat {{ m['content'] }} {% endfor %}"
CODE = "{% for m in messages %}code {{ m['content'] }} {% endfor %}"


def change(file: Path, **entries: Any) -> None:
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**data, **entries}))


@pytest.fixture
def chats(models: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Copies: `base` bare; `a` with a template, two end tokens, settings; `b`, `c` with named templates."""
    own = {name: tmp_path / "models" / name for name in models}
    for name, folder in own.items():
        shutil.copytree(models[name], folder)
    (own["a"] / "chat_template.jinja").write_text(CHAT)
    change(own["a"] / "generation_config.json", eos_token_id=[2, 7], temperature=0.6, do_sample=True)
    named = [{"name": "default", "template": CODE}, {"name": "tool_use", "template": CHAT}]
    change(own["b"] / "tokenizer_config.json", chat_template=named)
    (own["c"] / "chat_template.jinja").write_text(CODE)
    (own["c"] / "additional_chat_templates").mkdir()
    (own["c"] / "additional_chat_templates" / "tool_use.jinja").write_text(CHAT)
    return {name: str(folder) for name, folder in own.items()}


def recipe_of(models: Mapping[str, str], **changes: Any) -> Recipe:
    group = TensorGroup(method="linear", sources=tuple(name for name in models if name != "base"))
    return Recipe(models=models, base="base", groups=(group,), **changes)


def same_as_live(recipe: Recipe, out: Path) -> tuple[Any, Any]:
    """Check that the live model is asked as the folder is; return the folder's tokenizer and settings."""
    write(recipe, out)
    bench = Workbench(
        recipe.models, recipe.base, tokenizer=recipe.tokenizer, chat_template=recipe.chat_template
    )
    bench.load(recipe)
    tokenizer = AutoTokenizer.from_pretrained(out)
    settings = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert bench.tokenizer.chat_template == tokenizer.chat_template
    assert bench.tokenizer.get_vocab() == tokenizer.get_vocab()
    live = bench.model.generation_config.to_dict()
    assert settings.to_dict() == live
    if tokenizer.chat_template:
        asked = [t.apply_chat_template(TURNS, tokenize=False) for t in (bench.tokenizer, tokenizer)]
        assert asked[0] == asked[1]
    return tokenizer, settings


@pytest.mark.parametrize(
    ("choice", "template", "ends"),
    [
        ("", None, 2),
        ("base", None, 2),
        ("a", CHAT, [2, 7]),
        ("b", {"default": CODE, "tool_use": CHAT}, 2),
        ("c", {"default": CODE, "tool_use": CHAT}, 2),
        ("auto", {"default": CODE, "tool_use": CHAT}, 2),
        ("chatml", BUILT_IN["chatml"].text, 2),
        ("{{ messages[0]['content'] }}", "{{ messages[0]['content'] }}", 2),
    ],
)
def test_the_choice_is_scored_and_exported(
    choice: str, template: Any, ends: Any, chats: dict[str, str], tmp_path: Path
) -> None:
    tokenizer, settings = same_as_live(recipe_of(chats, chat_template=choice), tmp_path / "out")
    assert tokenizer.chat_template == template
    assert settings.eos_token_id == ends
    assert settings.temperature == (0.6 if choice == "a" else None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == ends


def test_a_chosen_template_replaces_every_form_of_the_old_one(chats: dict[str, str], tmp_path: Path) -> None:
    for tokenizer in ("b", "c"):
        recipe = recipe_of(chats, tokenizer=tokenizer, chat_template="a")
        assert same_as_live(recipe, tmp_path / tokenizer)[0].chat_template == CHAT
        bare = recipe_of(chats, tokenizer=tokenizer, chat_template="base")
        assert same_as_live(bare, tmp_path / f"bare {tokenizer}")[0].chat_template is None


def test_a_processors_template_counts_where_the_tokenizer_has_none(
    chats: dict[str, str], tmp_path: Path
) -> None:
    change(Path(chats["base"]) / "chat_template.json", chat_template="processor {{ messages }}")
    for choice, template in {"": None, "base": "processor {{ messages }}", "a": CHAT}.items():
        out = tmp_path / f"out {choice}"
        assert same_as_live(recipe_of(chats, chat_template=choice), out)[0].chat_template == template
        written = json.loads((out / "chat_template.json").read_text())["chat_template"]
        assert written == (CHAT if choice == "a" else "processor {{ messages }}")


def test_auto_takes_the_first_of_equally_common_ones(chats: dict[str, str], tmp_path: Path) -> None:
    two = {name: chats[name] for name in ("base", "a", "b")}
    assert same_as_live(recipe_of(two, chat_template="auto"), tmp_path / "out")[0].chat_template == CHAT
    (Path(chats["a"]) / "chat_template.jinja").unlink()
    none = {name: chats[name] for name in ("base", "a")}
    assert same_as_live(recipe_of(none, chat_template="auto"), tmp_path / "none")[0].chat_template is None


def test_auto_counts_models_that_are_not_merged(chats: dict[str, str], tmp_path: Path) -> None:
    """So every candidate of a run has the same template."""
    one = TensorGroup(method="linear", sources=("a",))
    recipe = Recipe(models=chats, base="base", groups=(one,), chat_template="auto")
    assert same_as_live(recipe, tmp_path / "out")[0].chat_template == {"default": CODE, "tool_use": CHAT}


def test_token_ids_follow_their_tokens(chats: dict[str, str], tmp_path: Path) -> None:
    """The model whose settings are taken has the end token in another row."""
    a = Path(chats["a"])
    text = (a / "tokenizer.json").read_text()
    (a / "tokenizer.json").write_text(
        text.replace('"w3"', '"swap"').replace('"w5"', '"w3"').replace('"swap"', '"w5"')
    )
    change(a / "generation_config.json", bad_words_ids=[[7, 9], [4]])
    recipe = recipe_of(chats, tokenizer="base", chat_template="a")
    _, settings = same_as_live(recipe, tmp_path / "out")
    assert settings.eos_token_id == [2, 9]
    assert settings.bad_words_ids == [[9, 7], [4]]


def test_an_adapters_own_files_are_its_own(
    models: dict[str, str], adapters: dict[str, str], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(adapters["plain"], adapter)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(models["base"]) / name, adapter)
    change(adapter / "tokenizer_config.json", eos_token="w3", chat_template=CHAT)
    own = {"base": models["base"], "tuned": f"{models['base']}+{adapter}"}
    (note, ends) = folder_notes(recipe_of(own), open_used(recipe_of(own)))
    assert note.startswith(
        "chat templates differ: base: none; tuned: A; the merge has that of base (`chat_template`"
    )
    assert ends.startswith("tokens that end answers differ: base: </s>; tuned: </s> w3; the merge has </s>")
    for changes in ({"chat_template": "tuned"}, {"tokenizer": "tuned"}):
        tokenizer, settings = same_as_live(recipe_of(own, **changes), tmp_path / str(changes))
        assert tokenizer.chat_template == CHAT
        assert settings.eos_token_id == [2, 7]
    (adapter / "tokenizer.json").unlink()
    assert same_as_live(recipe_of(own, chat_template="tuned"), tmp_path / "t")[0].chat_template == CHAT
    assert same_as_live(recipe_of(own, tokenizer="tuned"), tmp_path / "u")[0].chat_template == CHAT
    write_adapter(recipe_of(own, chat_template="tuned"), tmp_path / "written")
    assert AutoTokenizer.from_pretrained(tmp_path / "written").chat_template == CHAT


def test_one_note_per_kind_says_what_the_merge_lacks(chats: dict[str, str]) -> None:
    recipe = recipe_of(chats)
    how = " (`chat_template` chooses: a model's name, auto, a built-in template or a file)"
    assert folder_notes(recipe, open_used(recipe)) == (
        f"chat templates differ: base: none; a: A; b, c: B; the merge has that of base{how}",
        f"tokens that end answers differ: base, b, c: </s>; a: </s> w3; the merge has </s>{how}",
        "generation settings differ: base, b, c: none; a: temperature 0.6, do_sample true; "
        f"the merge has those of base{how}",
    )
    chosen = recipe_of(chats, chat_template="a")
    assert folder_notes(chosen, open_used(chosen)) == ()
    auto = recipe_of(chats, chat_template="auto")
    assert folder_notes(auto, open_used(auto)) == ("chat_template: auto takes the template of b",)
    built_in = recipe_of({name: chats[name] for name in ("base", "b")}, chat_template="llama3")
    assert folder_notes(built_in, open_used(built_in)) == (
        "chat_template: llama3 ends answers with <|eot_id|>, which is no token of the merge",
    )


def test_a_built_in_template_ends_answers_with_its_own_token(chats: dict[str, str], tmp_path: Path) -> None:
    for folder in chats.values():
        path = Path(folder) / "tokenizer.json"
        path.write_text(path.read_text().replace('"w9"', '"<|im_end|>"'))
    _, settings = same_as_live(recipe_of(chats, chat_template="chatml"), tmp_path / "out")
    assert settings.eos_token_id == [2, 13]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\nw1\n\n### Response:\nw2</s>\n\n"
            "### Instruction:\nw3\n\n### Response:\n",
        ),
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nw1<|im_end|>\n"
            "<|im_start|>assistant\nw2<|im_end|>\n<|im_start|>user\nw3<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nw1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nw2<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nw3<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] Be brief.\n\nw1 [/INST] w2</s>[INST] w3 [/INST]"),
    ],
)
def test_built_in_templates(name: str, text: str, models: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    tokenizer.chat_template = BUILT_IN[name].text
    assert tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == text


def test_a_file_becomes_part_of_the_recipe(chats: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHAT)
    recipe = recipe_of(chats)
    (tmp_path / "recipe.yaml").write_text(f"chat_template: own.jinja\n{recipe.to_yaml()}")
    read = read_recipe(tmp_path / "recipe.yaml")
    assert read.chat_template == CHAT
    assert Recipe.from_yaml(read.to_yaml()) == read
    assert read.hash != recipe.hash
    for choice, message in {
        "none.jinja": "the file can't be read",
        "chatlm": "is no model, no built-in template and no file.*did you mean 'chatml'",
        "{% for": "not a valid jinja template",
    }.items():
        (tmp_path / "recipe.yaml").write_text(f"chat_template: '{choice}'\n{recipe.to_yaml()}")
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            read_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match="there is no base model"):
        Recipe(models={name: chats[name] for name in "abc"}, groups=recipe.groups, chat_template="base")


def test_mergekit_files_choose_templates(chats: dict[str, str], tmp_path: Path) -> None:
    from evomerge.merging import mergekit

    (tmp_path / "own.jinja").write_text(CHAT)
    head = (
        f"merge_method: linear\nmodels: [{{model: {chats['a']}}}, {{model: {chats['b']}}}]\ndtype: float32\n"
    )
    for written, choice in {
        "auto": "auto",
        "chatml": "chatml",
        chats["b"]: "b",
        "a": "a",
        "own.jinja": CHAT,
    }.items():
        (tmp_path / "m.yaml").write_text(f"{head}chat_template: {written}\n")
        read = read_recipe(tmp_path / "m.yaml")
        assert read.chat_template == choice
        again = mergekit.reader.read(mergekit.write(read))
        assert again.chat_template == {"a": CHAT, "b": CODE}.get(choice, choice)


def test_a_recipe_without_the_key_keeps_its_hash() -> None:
    recipe = Recipe.copy_of("./model", dtype="float32")
    assert "chat_template" not in recipe.to_yaml()
    assert recipe.hash == "4a24cc52f899cfdbd2a81b3af30dccb3532f1bd9f3188bbc83dde0e98adbb9d7"


def test_a_workbench_has_one_template(chats: dict[str, str]) -> None:
    bench = Workbench(chats, "base")
    with pytest.raises(ConfigError, match="chat_template is not the workbench's"):
        bench.load(recipe_of(chats, chat_template="a"))


@pytest.mark.parametrize(
    "form",
    [[{"name": "default", "template": CODE}, {"name": "x", "template": CHAT}], {"default": CODE, "x": CHAT}],
)
def test_templates_of_both_forms_with_names_are_read(form: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": form}))
    assert read_templates(tmp_path) == {"default": CODE, "x": CHAT}
