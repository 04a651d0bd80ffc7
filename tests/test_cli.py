"""The commands: each works on a small run, and every mistake is one message, exit code 2, nothing written."""

from __future__ import annotations

import json
import logging
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner, Result

from evomerge import trial
from evomerge.cli import app
from evomerge.config import RunConfig
from evomerge.merging.reading import read_recipe
from evomerge.prepare import prepare
from evomerge.running.executors import Inline
from evomerge.running.store import RunStore, StoreReader, facts
from tests.conftest import write_suite

NAMES = ["init", "convert", "check", "run", "resume", "migrate", "doctor", "demo"]
NAMES += ["status", "show", "samples", "report", "compare", "export", "predict"]
NAMES += ["watch", "serve", "dashboard"]
NAMES += ["merge", "import", "analyze", "fisher", "gram", "evaluate", "zoo", "spaces", "suite", "runs"]


@pytest.fixture(autouse=True)
def _logging_restored() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def succeed(*words: object) -> str:
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result.output


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refuse(*words: object, folder: Path) -> str:
    """Expect a user's mistake: exit code 2, one message on stderr, no traceback, nothing changed."""
    before = everything_in(folder)
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: "), result.stderr
    assert "Traceback" not in result.output
    assert everything_in(folder) == before
    return result.stderr


def test_every_command_of_the_contract_is_there() -> None:
    assert [c.name for c in app.registered_commands] + [g.name for g in app.registered_groups] == NAMES
    assert "build" in succeed("zoo", "--help")
    assert succeed("--version").startswith("evomerge ")


def test_check_says_what_the_run_will_be(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(budget={"evaluations": 40})
    text = succeed("check", path)
    assert "2 genes (weight)" in text
    assert "about" in text
    assert not (tmp_path / "run").exists()
    data = json.loads(succeed("check", path, "--json"))
    assert "3 item blocks, clearly worse candidates stop early; surrogate on; starts from baselines" in text
    assert (data["blocks"], data["racing"], data["surrogate"]) == (3, True, True)
    assert data["items"] == {"search": 72, "select": 64, "test": 160}
    assert data["estimated_minutes"] > 0
    assert "what a model sees, one item per task" in text
    shown = {prompt["task"]: prompt for prompt in data["prompts"]}
    task, prompt = next(iter(shown.items()))
    assert f"  {task}: {prompt['prompt_tokens']} tokens, then {len(prompt['answer'])} that are scored" in text
    assert "".join(f"[{token}]" for token in prompt["answer"]) in text
    assert not any("answers to generate" in note for note in data["notes"])


@pytest.mark.end_to_end
def test_check_scores_less_where_a_model_takes_long(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[str] = []
    whole = Inline.run

    def counted(self: Inline, wanted: Iterable[Any]) -> Iterator[Any]:
        for result in whole(self, wanted):
            jobs.append(result.job.split)
            yield result

    monkeypatch.setattr(Inline, "run", counted)
    path = config(budget={"evaluations": 40})
    usual = json.loads(succeed("check", path, "--json"))
    assert jobs == ["search"] * 5 + ["select"] * 2 + ["test"] * 2  # base, two sources, two candidates
    jobs.clear()
    monkeypatch.setattr(trial, "COSTLY", 0.0)
    few = json.loads(succeed("check", path, "--json"))
    assert jobs == ["search"] * 3 + ["select", "test"]
    for same in ("items", "resolution", "specialists", "blocks"):
        assert few[same] == usual[same]
    assert few["estimated_minutes"] > 0
    assert few["memory"]["worker"] > 0


def test_check_says_where_batches_are_small(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(budget={"evaluations": 40})
    splits = {"search": 24, "select": 16, "test": 40}
    tasks = [
        {"task": "demo_upper", "metric": "acc", "splits": splits},
        {"task": "demo_upper_generate", "metric": "exact_match", "splits": splits},
    ]
    write_suite(tmp_path, tasks=tasks)
    text = succeed("check", path)
    assert "an item block has 8 answers to generate" in text
    assert "racing: {blocks: 1}" in text


WRONG = [
    {"task": "demo_upper", "metric": "acc", "specialist": "reverse"},
    {"task": "demo_reverse", "metric": "acc", "specialist": "upper"},
]
"""Tasks whose specialists learned the other task."""


@pytest.mark.end_to_end
def test_a_run_that_measures_nothing_does_not_start(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(baselines=["TIES"], budget={"generations": 1}, weak_specialists="refuse")
    tasks = [{**task, "splits": {"search": 24, "select": 16, "test": 40}} for task in WRONG]
    write_suite(tmp_path, tasks=tasks)
    checked = invoke("check", path)
    assert checked.exit_code == 2
    assert "ready to run" not in checked.stdout
    assert "specialists and base on `search`:" in checked.stdout
    assert "demo_upper: reverse 0" in checked.stdout
    assert not (tmp_path / "run").exists()
    for _ in range(2):  # the second time from the stored scores
        run = invoke("run", path)
        assert (run.exit_code, run.stderr) == (2, checked.stderr)
    assert "on 2 of 2 tasks that count, the specialist is not shown to be better than the base" in run.stderr
    assert "do: see whether models and prompts fit" in run.stderr
    with StoreReader.read(tmp_path / "run") as store:
        assert {named.name for named in store.entries("base") + store.entries("parent")} == {
            "base",
            "upper",
            "reverse",
        }
        assert not store.entries("baseline")
        assert facts.STOPPED.get(store) is None
    path.write_text(path.read_text().replace("weak_specialists: refuse", "weak_specialists: allow"))
    assert "ready to run" in succeed("check", path)
    assert "no specialist is shown to be better than the base" in succeed("run", path)


@pytest.mark.end_to_end
def test_a_run_begun_before_the_refusal_goes_on_as_it_was(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    path = config(baselines=[], budget={"generations": 1}, weak_specialists="allow")
    tasks = [{**task, "splits": {"search": 24, "select": 16, "test": 40}} for task in WRONG]
    write_suite(tmp_path, tasks=tasks)
    succeed("run", path)
    store = RunStore.open(tmp_path / "run")
    facts.WEIGHTING.set(store, None)
    stored = facts.CONFIG.require(store)
    facts.CONFIG.set(store, {key: value for key, value in stored.items() if key != "weak_specialists"})
    store.close()
    path.write_text(path.read_text().replace("weak_specialists: allow", "weak_specialists: refuse"))
    assert prepare(RunConfig.load(path)).weighting is None
    succeed("resume", tmp_path / "run", "--generations", "2")


def test_spaces_lists_the_presets(config: Callable[..., Path]) -> None:
    text = succeed("spaces")
    assert "32 layers and 3 sources" in text
    rows = {row["name"]: row for row in json.loads(succeed("spaces", "--json"))}
    assert rows["task_arithmetic_layers"]["dimension"] == 3 * (32 * 2 + 2)
    assert rows["slerp_layers"]["sources"] == 2
    assert rows["method_global"]["methods"][:3] == ["linear", "task_arithmetic", "ties"]
    assert all(name in text and row["about"] and not row["problem"] for name, row in rows.items())
    given = {row["name"]: row for row in json.loads(succeed("spaces", "--models", config(), "--json"))}
    assert given["global_weights"]["dimension"] == 2
    assert given.keys() == rows.keys()


def test_spaces_show_prints_the_genes(config: Callable[..., Path], tmp_path: Path) -> None:
    text = succeed("spaces", "show", "method_global")
    assert "method is ties" in text
    assert "0.1 ... 1" in text
    path = config()
    data = json.loads(succeed("spaces", "show", "subset_soup", "--models", path, "--json"))
    assert [gene["name"] for gene in data["genes"]] == [
        "on upper",
        "on reverse",
        "weight upper",
        "weight reverse",
    ]
    assert data["genes"][0]["kind"] == "flag"
    assert data["genes"][3]["condition"] == "reverse is on"
    assert data["dimension"] == 4
    assert "in proportion" in succeed("spaces", "show", "subset_soup")
    assert "point 4 of 4" in succeed("spaces", "show", "smooth_layers")
    one = {
        "name": "mine",
        "about": "one weight",
        "method": "linear",
        "genes": {"weight": {"low": 0, "high": 1}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(one))
    assert "mine: 6 genes" in succeed("spaces", "show", tmp_path / "mine.yaml")


def test_spaces_show_prints_the_choices_of_a_layer_path(config: Callable[..., Path]) -> None:
    text = succeed("spaces", "show", "hybrid_path")
    assert "paths of 26 to 32 layers through 3 models" in text
    assert "slot 0 is used" in text
    assert "0.5 ... 1.5" in text
    data = json.loads(succeed("spaces", "show", "layer_path", "--models", config(), "--json"))
    assert data["methods"] == ["passthrough"]
    assert data["dimension"] == len(data["genes"]) == 7  # two slots and the model around them
    shown = {gene["name"]: (gene["kind"], gene["values"], gene["condition"]) for gene in data["genes"]}
    assert shown["slot 0: used"] == ("flag", "no, yes", "")
    assert shown["slot 1: model"] == ("choice", "upper, reverse", "slot 1 is used")
    assert shown["slot 1: layers"] == ("integer", "0, 1", "slot 1 is used")
    assert shown["embeddings, final norm and head: model"] == ("choice", "upper, reverse", "")


def test_mistakes_of_spaces(config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path) -> None:
    assert "did you mean 'ties_layers'" in refuse("spaces", "show", "tie_layers", folder=tmp_path)
    assert "no such file" in refuse("spaces", "--models", tmp_path / "none.yaml", folder=tmp_path)
    models = {"base": str(tiny_zoo / "base"), "sources": {"upper": str(tiny_zoo / "upper")}}
    path = config(models=models)
    assert "wrong number of sources" in refuse(
        "spaces", "show", "slerp_layers", "--models", path, folder=tmp_path
    )
    rows = {row["name"]: row for row in json.loads(succeed("spaces", "--models", path, "--json"))}
    assert rows["slerp_layers"]["dimension"] is None
    assert "wrong number of sources" in rows["slerp_layers"]["problem"]
    assert "wrong number of sources" in " ".join(succeed("spaces", "--models", path).split())


@pytest.mark.end_to_end
def test_a_run_from_start_to_export(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config(generate=False, budget={"generations": 1})
    text = succeed("run", path)
    assert "search helped" in text or "search did not help" in text
    run, out = tmp_path / "run", tmp_path / "exported"
    assert (run / "report.html").exists()
    assert "finished (budget of 1 generations used)" in succeed("status", run)
    status = json.loads(succeed("status", run, "--json"))
    assert status["generations"] == 1
    assert status["state"] == "finished"
    report = json.loads(succeed("report", run, "--json"))
    assert report["rows"][-1]["role"] == "winner"
    words = ("resume", run, "--generations", "2", "--items", "100000")
    assert succeed("--quiet", *words) == ""
    assert "2 generations" in (said := succeed("status", run))
    assert "100000 items" in said
    assert json.loads(succeed("status", run, "--json"))["generations"] == 2
    succeed("export", run, out)
    winner = json.loads(succeed("status", run, "--json"))["winner"]
    assert yaml.safe_load((out / "recipe.yaml").read_text())["format"] == 1
    again = json.loads(succeed("merge", out / "recipe.yaml", tmp_path / "again", "--json"))
    assert again["recipe"] == winner
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    succeed("merge", out / "mergekit.yaml", tmp_path / "third")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "third").state_dict()
    first = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(first[name], third[name]) for name in first)


@pytest.mark.end_to_end
def test_a_run_in_a_mixed_space(config: Callable[..., Path], tmp_path: Path) -> None:
    """Methods, switches and shared genes reach the weights, and the winner can be exported."""
    mixed = {
        "name": "mixed",
        "about": "a bit of everything",
        "method": {"choices": ["linear", "task_arithmetic", "ties", "karcher"], "per": ["modules"]},
        "subset": {"per": ["modules"]},
        "layers": 1,
        "modules": {"attn": ["attn"], "mlp": []},
        "genes": {
            "weight": {"low": 0.1, "high": 0.9},
            "ties.density": {"low": 0.2, "high": 1.0, "per": ["modules"]},
            "max_iter": {"low": 1, "high": 5, "per": []},
        },
    }
    succeed(
        "run", config(generate=False, space=mixed, optimizer={"population": 4}, budget={"generations": 2})
    )
    with RunStore.read(tmp_path / "run") as store:
        recipes = [store.recipe(name) for generation in store.generations() for name in generation.recipes]
        assert not store.failures()
    assert len({group.method for recipe in recipes for group in recipe.groups}) >= 3
    assert len({group.sources for recipe in recipes for group in recipe.groups}) >= 2
    winner = json.loads(succeed("status", tmp_path / "run", "--json"))["winner"]
    exported = json.loads(succeed("export", tmp_path / "run", tmp_path / "exported", "--json"))
    assert exported["recipe"] == winner


def test_a_run_as_adapter_and_as_yaml(finished_run: Path, tmp_path: Path) -> None:
    text = succeed("export", finished_run, tmp_path / "small", "--as", "adapter", "--rank", "4")
    assert "rank 4, captures" in text
    assert "whole merge" in text
    words = ("export", finished_run, tmp_path / "rest", "--as", "adapter", "--rank", 4, "--keep-rest")
    data = json.loads(invoke(*words, "--json").stdout)
    assert data["lost"] == []
    assert data["whole"]
    assert 0 < data["energy"] < 1
    assert {row["task"] for row in data["test"]} >= {"demo_upper", "demo_reverse"}
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == data["base"]

    assert "merge.yaml" in succeed("export", finished_run, tmp_path / "merge.yaml", "--as", "recipe")
    winner = json.loads(succeed("status", finished_run, "--json"))["winner"]
    assert read_recipe(tmp_path / "merge.yaml").hash == winner
    data = json.loads(succeed("export", finished_run, tmp_path / "mk.yml", "--as", "mergekit", "--json"))
    assert data == {"file": str(tmp_path / "mk.yml"), "recipe": winner}
    assert "merge_method" in yaml.safe_load((tmp_path / "mk.yml").read_text())
    assert "mk2.yaml" in succeed("merge", tmp_path / "merge.yaml", tmp_path / "mk2.yaml", "--as", "mergekit")
    assert (tmp_path / "mk2.yaml").read_text() == (tmp_path / "mk.yml").read_text()


def test_merging_adapters_into_one(tiny_zoo: Path, tmp_path: Path) -> None:
    adapted = f"{tiny_zoo / 'base'}+{tiny_zoo / 'add'}"
    recipe = tmp_path / "recipe.yaml"
    data: dict[str, Any] = {
        "models": {"base": str(tiny_zoo / "base"), "add": adapted},
        "base": "base",
        "groups": [{"method": "task_arithmetic", "sources": ["add"], "parameters": {"weight": 0.5}}],
    }
    recipe.write_text(yaml.safe_dump(data))
    text = succeed("merge", recipe, tmp_path / "half", "--as", "adapter")
    assert "exact" in text
    suite = write_suite(tmp_path)
    place = f"{tiny_zoo / 'base'}+{tmp_path / 'half'}"
    ours = json.loads(succeed("evaluate", place, "--suite", suite, "--json"))
    succeed("merge", recipe, tmp_path / "whole")
    theirs = json.loads(succeed("evaluate", tmp_path / "whole", "--suite", suite, "--json"))
    assert ours["tasks"] == theirs["tasks"]  # both are rounded to bfloat16 before they are scored


def test_evaluate_scores_one_model(tiny_zoo: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    text = succeed("evaluate", tiny_zoo / "reverse", "--suite", suite)
    assert "demo_reverse" in text
    data = json.loads(succeed("evaluate", tiny_zoo / "reverse", "--suite", suite, "--json"))
    by_task = {row["task"]: row for row in data["tasks"]}
    assert by_task["demo_reverse"]["score"] > 0.5
    assert by_task["demo_reverse"]["items"] == 40
    adapted = f"{tiny_zoo / 'base'}+{tiny_zoo / 'add'}"
    assert "demo_upper" in succeed("evaluate", adapted, "--suite", suite)


def test_evaluate_takes_the_settings_of_a_run(finished_run: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    succeed("export", finished_run, model)
    shown = json.loads(succeed("show", finished_run, "winner", "--json"))
    for split in ("select", "test"):
        words = ("evaluate", model, "--run", finished_run, "--split", split)
        scored = {row["task"]: row["score"] for row in json.loads(succeed(*words, "--json"))["tasks"]}
        assert scored == {task: row["mean"] for task, row in shown["splits"][split]["tasks"].items()}
    rounded = json.loads(succeed("evaluate", model, "--run", finished_run, "--dtype", "bfloat16", "--json"))
    text = {row["task"]: row["score"] for row in rounded["tasks"]}["demo_text"]
    assert text != scored["demo_text"]
    assert text == pytest.approx(scored["demo_text"], abs=0.1)


def test_weight_files_have_the_size_asked_for(tiny_zoo: Path, finished_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(
        f"{{name: half, merge_method: linear, normalize: 1, models: [{{model: {tiny_zoo / 'upper'}}}]}}\n"
        "---\n"
        f"{{merge_method: linear, models: [{{model: half}}, {{model: {tiny_zoo / 'base'}}}]}}\n"
    )
    text = succeed("merge", path, tmp_path / "out", "--shard-size", "100kB")
    assert "note: stage half" in text
    assert "note: `normalize` has no effect" in text
    succeed("export", finished_run, tmp_path / "winner", "--shard-size", "100 KB")
    for name in ("out", "winner"):
        files = [f.stat().st_size for f in (tmp_path / name).glob("model-*.safetensors")]
        assert len(files) > 1
    words = ("merge", path, tmp_path / "x")
    assert "is for models" in refuse(*words, "--as", "mergekit", "--shard-size", "5GB", folder=tmp_path)
    for size in ("5", "GB", "1e3MB", "-1GB", "0GB"):
        assert "not a size of files" in refuse(*words, f"--shard-size={size}", folder=tmp_path)


def test_a_stack_of_layers_is_merged_and_scored(tiny_zoo: Path, tmp_path: Path) -> None:
    """The result is an ordinary model with more layers than its sources."""
    slices = [
        {"sources": [{"model": str(tiny_zoo / name), "layer_range": [0, 2]}]} for name in ("base", "reverse")
    ]
    stack = {"merge_method": "passthrough", "dtype": "float32", "slices": slices}
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(stack))
    succeed("merge", tmp_path / "stack.yaml", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
    succeed("merge", tmp_path / "out" / "recipe.yaml", tmp_path / "again")
    again, first = (tmp_path / name / "model.safetensors" for name in ("again", "out"))
    assert again.read_bytes() == first.read_bytes()
    assert "demo_upper" in succeed("evaluate", tmp_path / "out", "--suite", write_suite(tmp_path))
    slices[1]["sources"][0]["layer_range"] = [1, 3]
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(stack))
    message = refuse("merge", tmp_path / "stack.yaml", tmp_path / "third", folder=tmp_path)
    assert "slices[1]" in message
    assert "an end of at most 2" in message


def test_analyze_sees_into_a_merge(config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path) -> None:
    path, page = config(), tmp_path / "page.html"
    text = succeed("analyze", path, "--map", "cosine", "--html", page)
    assert "upper - reverse" in text
    assert "page.html" in text
    assert page.read_text().startswith("<!doctype html>")
    data = json.loads(succeed("analyze", path, "--threshold", "0.5", "--top", "0.1", "--json"))
    assert data["settings"]["threshold"] == 0.5
    assert data["settings"]["chance_overlap"] == pytest.approx(0.1 / 1.9)
    assert set(data["total"]["models"]) == {"upper", "reverse"}
    adapted = _models(base=tiny_zoo / "base", upper=tiny_zoo / "upper", add=tiny_zoo / "add")
    assert "upper - add" in succeed("analyze", config(models=adapted))


def test_mistakes_of_analyze(config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path) -> None:
    alone = config(models=_models(base=tiny_zoo / "base", upper=tiny_zoo / "upper"))
    assert "at least two other models" in refuse("analyze", alone, folder=tmp_path)
    wider = AutoModelForCausalLM.from_config(
        LlamaConfig.from_pretrained(tiny_zoo / "base", intermediate_size=96)
    )
    wider.save_pretrained(tmp_path / "wider")
    named = _models(base=tiny_zoo / "base", upper=tiny_zoo / "upper", wide=tmp_path / "wider")
    page = tmp_path / "page.html"
    message = refuse("analyze", config(models=named), "--html", page, folder=tmp_path)
    assert "another shape" in message
    assert "from the same base" in message
    assert "did you mean 'conflict'?" in refuse("analyze", alone, "--map", "conflicts", folder=tmp_path)
    assert "top" in refuse("analyze", config(), "--top", "2", folder=tmp_path)
    assert "no such file" in refuse("analyze", tmp_path / "none.yaml", folder=tmp_path)
    assert "no such file" in refuse("analyze", tmp_path / "none.yaml", "--gain", folder=tmp_path)
    based = ("analyze", config(), "--gain", "--base", "upper")
    assert "--gain needs a run config" in refuse(*based, folder=tmp_path)


def test_analyze_predicts_what_a_pair_gains(config: Callable[..., Path]) -> None:
    path = config()
    assert "upper - reverse" in succeed("analyze", path, "--gain")
    gains = json.loads(succeed("analyze", path, "--gain", "--json"))["gains"]
    assert [pair["pair"] for pair in gains["pairs"]] == [["upper", "reverse"]]
    assert gains["error"] > 0
    assert "gains" not in json.loads(succeed("analyze", path, "--json"))


def test_fisher_and_the_merge_that_uses_it(tiny_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat is old .\nthe dog is here .\n")
    names = ("upper", "reverse")
    for name in names:
        words = ("fisher", tiny_zoo / name, tmp_path / "text.txt", tmp_path / f"{name}.safetensors")
        assert "2 sequences" in succeed(*words)
    assert "already exists" in refuse(*words, folder=tmp_path)
    new = tmp_path / "new.safetensors"
    assert "'gpu' can't be used here" in refuse(*words[:3], new, "--device", "gpu", folder=tmp_path)
    drawn = (*words[:3], tmp_path / "drawn.safetensors", "--labels", "model", "--sequences", "1", "--json")
    assert json.loads(succeed(*drawn))["sequences"] == 1
    recipe = {
        "models": {name: str(tiny_zoo / name) for name in names},
        "fisher": {name: f"{name}.safetensors" for name in names},
        "groups": [{"method": "fisher", "sources": list(names)}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    succeed("merge", tmp_path / "recipe.yaml", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({**recipe, "fisher": {"upper": "upper.safetensors"}})
    )
    message = refuse("merge", tmp_path / "recipe.yaml", tmp_path / "again", folder=tmp_path)
    assert "none for reverse" in message
    assert "evomerge fisher" in message


def test_task_vectors_are_added_negated_and_scaled_by_a_recipe(tiny_zoo: Path, tmp_path: Path) -> None:
    names = ("base", "upper", "reverse")
    loaded = {n: AutoModelForCausalLM.from_pretrained(tiny_zoo / n).float().state_dict() for n in names}
    for index, (weights, scale) in enumerate(
        (
            ({"upper": 1.0, "reverse": 1.0}, 1.0),
            ({"upper": -1.0}, 1.0),
            ({"upper": 1.0, "reverse": -0.5}, 0.3),
        )
    ):
        group = {
            "method": "task_arithmetic",
            "sources": list(weights),
            "parameters": {"weight": weights, "lambda": scale},
        }
        places = {n: str(tiny_zoo / n) for n in names}
        recipe = {"models": places, "base": "base", "dtype": "float32", "groups": [group]}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        succeed("merge", tmp_path / "recipe.yaml", tmp_path / str(index))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / str(index)).state_dict()
        for key, origin in loaded["base"].items():
            expected = origin + scale * sum(w * (loaded[n][key] - origin) for n, w in weights.items())
            torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.end_to_end
@pytest.mark.usefixtures("formula")
def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = config(generate=False), 0
    record = RunStore.record_scores

    def interrupted(self: RunStore, *args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        record(self, *args, **options)

    monkeypatch.setattr(RunStore, "record_scores", interrupted)
    result = invoke("run", path)
    assert result.exit_code == 130
    assert f"evomerge resume {tmp_path / 'run'}" in result.output
    monkeypatch.undo()
    assert "stopped" in succeed("status", tmp_path / "run")
    assert "search" in succeed("resume", tmp_path / "run")


# -- mistakes -------------------------------------------------------------------------------------------


def _models(**sources: object) -> dict[str, Any]:
    return {
        "base": str(sources.pop("base")),
        "sources": {name: str(place) for name, place in sources.items()},
    }


@pytest.mark.parametrize("verb", ["run", "check"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": {}}, "unknown key 'optimiser' (did you mean 'optimizer'?"),
        ({"budget": {"evaluation": 3}}, "unknown key 'budget.evaluation' (did you mean 'evaluations'?"),
        ({"budget": {}}, "needs at least one of"),
        ({"optimizer": {"name": "cma"}}, "'cma_es'"),
        ({"space": "tis_layers"}, "did you mean 'ties_layers'?"),
        ({"suite": "no-such-suite"}, "neither a file nor one of the packaged suites"),
        ({"executor": {"batch_size": 0}}, "executor.batch_size"),
        ({"seed": -1}, "seed"),
        ({"executor": {"workers": 0}}, "executor.workers"),
        ({"executor": {"name": "inline", "device": "gpu"}}, "executor.device: 'gpu' can't be used here"),
        ({"objective": {"retention": float("inf")}}, "objective.retention"),
        ({"space": {"name": "s", "about": "", "mehtod": "ties"}}, "did you mean 'method'?"),
    ],
)
def test_mistakes_in_the_config(
    config: Callable[..., Path], tmp_path: Path, verb: str, changes: dict[str, Any], message: str
) -> None:
    path = config(**changes)
    assert message in refuse(verb, path, folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"racing": {"block": 3}}, "unknown key 'racing.block' (did you mean 'blocks'?"),
        ({"racing": {"blocks": 3, "blocks_min": 4}}, "blocks_min must not exceed the 3 blocks"),
        ({"racing": {"blocks_min": 9}}, "blocks_min must not exceed the 8 blocks"),
        ({"racing": {"blocks": "many"}}, "racing.blocks: expected auto, or a whole number from 1 to 64"),
        ({"racing": {"blocks": 65}}, "racing.blocks: expected auto, or a whole number from 1 to 64"),
        ({"racing": {"blocks": 64}}, "or set racing.blocks to 24"),
        ({"surrogate": {"share": 2}}, "config.yaml: surrogate.share: Input should be less than"),
        ({"surrogate": {"oversampel": 3}}, "unknown key 'surrogate.oversampel' (did you mean 'oversample'?"),
        ({"surrogate": "offf"}, "config.yaml: surrogate: Input should be 'off' (got 'offf')"),
        ({"warm_start": {"run": "/nowhere"}}, "/nowhere: no run here"),
        ({"warm_start": {"recipes": ["none.yaml"]}}, "none.yaml: no such file"),
        ({"warm_start": {"gradients": {"steps": 0}}}, "config.yaml: warm_start.gradients.steps: Input"),
        ({"warm_start": {"gradients": True}, "space": "layer_path", "optimizer": {}}, "no continuous gene"),
        ({"objective": {"several": ["mean"]}}, "one objective is not several"),
        ({"objective": {"several": ["mean", "meen"]}}, "did you mean 'mean'?"),
        ({"objective": {"several": ["mean", {"demo_upper": -1}]}}, "objective.several.1.demo_upper: Input"),
        ({"objective": {"several": ["mean", "demo_upper"]}}, "cma_es: it minimises one objective"),
        ({"objective": {"constraints": {"tasks": {"demo_uper": 0.5}}}}, "did you mean 'demo_upper'?"),
        ({"objective": {"constraints": {"coherence": 0.5}}}, "no task of suite 'tiny' measures it"),
        ({"objective": {"weights": {"demo_uper": 1}}}, "did you mean 'demo_upper'?"),
        (
            {"objective": {"weights": {"demo_upper": 0, "demo_reverse": 0}}},
            "needs a skill task with search items",
        ),
        ({"space": "layer_path"}, "use catcma"),
    ],
)
def test_mistakes_in_the_search(
    config: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    said = refuse("run", config(**changes), folder=tmp_path)
    assert message in said
    assert "problems" not in said


def _space(**changes: Any) -> dict[str, Any]:
    genes = {"weight": {"low": 0, "high": 1}}
    return {"space": {"name": "s", "about": "", "method": "ties", "genes": genes, **changes}}


def _path(**changes: Any) -> dict[str, Any]:
    return {"space": {"kind": "layer_path", "name": "p", "about": "", **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (_space(method="tise"), "unknown merge method 'tise'"),
        (_space(fixed={"density": 1.5}), "density is out of range"),
        (_space(genes={"density": {"low": -0.5, "high": 1}}), "density is out of range"),
        (_space(method={"choices": ["ties", "ties"]}), "the same method stands twice"),
        (_space(method={"choices": ["ties"], "per": ["layer"]}), "'layers' or 'modules'"),
        (_space(subset={"per": ["sources"]}), "'layers' or 'modules'"),
        (_space(genes={"weight": {"low": 0, "high": 1, "curve": 9}}), "genes.weight.curve"),
        (_space(genes={"slerp.t": {"low": 0, "high": 1}}), "a method that is not in the space"),
        ({"space": {"kind": "layer_pth", "name": "p", "about": ""}}, "did you mean 'layer_path'?"),
        (_path(shortest=2), "shortest is above longest"),
        (_path(longest=1e9), "longest: Input should be less than"),
        (_path(longest=0.3, shortest=0.3), "no number of blocks"),
        (_path(lenght=3), "unknown key 'lenght' (did you mean 'longest'?"),
    ],
)
def test_mistakes_in_the_space(
    config: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in refuse("run", config(**changes), folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "demo_revers"}, "demo_reverse"),
        ({"metric": "accuracy"}, "acc"),
        ({"specialist": "revers"}, "did you mean 'reverse'?"),
        ({"splits": {"search": "train", "select": "select", "test": "test"}}, "train"),
    ],
)
def test_mistakes_in_the_suite(
    config: Callable[..., Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = config()
    suite = yaml.safe_load((tmp_path / "suite.yaml").read_text())
    suite["tasks"][0] |= change
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    assert message in refuse("run", path, folder=tmp_path)


def test_a_key_that_stands_twice(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config()
    path.write_text(path.read_text() + "seed: 3\n")
    assert "duplicate key 'seed'" in refuse("run", path, folder=tmp_path)


def test_a_source_that_changes_nothing_or_is_not_finite(
    config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path
) -> None:
    sources = {name: tiny_zoo / name for name in ("base", "reverse", "upper")}
    path = config(models=_models(**sources, same=tiny_zoo / "base"))
    assert "source 'same' is identical to the base" in refuse("run", path, folder=tmp_path)

    sick = AutoModelForCausalLM.from_pretrained(tiny_zoo / "upper")
    sick.model.norm.weight.data[0] = float("nan")
    shutil.copytree(tiny_zoo / "upper", tmp_path / "sick")
    sick.save_pretrained(tmp_path / "sick")
    path = config(models=_models(**sources, sick=tmp_path / "sick"))
    assert "NaN or infinite" in refuse("run", path, folder=tmp_path)


def test_an_out_folder_that_cannot_be_made(config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = config(out=str(tmp_path / "file" / "run"))
    assert "the run folder can't be made" in refuse("run", path, folder=tmp_path)


@pytest.mark.end_to_end
@pytest.mark.usefixtures("formula")
def test_moved_models_can_be_named_again_and_exported(
    config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path
) -> None:
    for place in ("old", "new"):
        shutil.copytree(tiny_zoo, tmp_path / place)
    named = {
        place: _models(**{name: tmp_path / place / name for name in ("base", "reverse", "upper")})
        for place in ("old", "new")
    }
    succeed("run", config(generate=False, models=named["old"], budget={"generations": 1}))
    shutil.rmtree(tmp_path / "old")
    succeed("run", config(generate=False, models=named["new"], budget={"generations": 1}))
    succeed("export", tmp_path / "run", tmp_path / "exported")
    assert str(tmp_path / "new") in (tmp_path / "exported" / "recipe.yaml").read_text()


def test_missing_model_folder(config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path) -> None:
    path = config(models=_models(base=tiny_zoo / "base", upper=tmp_path / "uper"))
    assert "uper" in refuse("run", path, folder=tmp_path)


def test_sources_that_do_not_fit(config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path) -> None:
    wider = AutoModelForCausalLM.from_config(
        LlamaConfig.from_pretrained(tiny_zoo / "base", intermediate_size=96)
    )
    wider.save_pretrained(tmp_path / "wider")
    path = config(models=_models(base=tiny_zoo / "base", wide=tmp_path / "wider"))
    assert "another shape" in refuse("run", path, folder=tmp_path)

    other = tmp_path / "other"
    shutil.copytree(tiny_zoo / "upper", other)
    settings = json.loads((other / "config.json").read_text())
    settings |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (other / "config.json").write_text(json.dumps(settings))
    path = config(models=_models(base=tiny_zoo / "base", other=other))
    assert "architectures differs" in refuse("run", path, folder=tmp_path)


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_tokenizer_that_transformers_reads_in_another_way(
    config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path, verb: str
) -> None:
    shutil.copytree(tiny_zoo / "base", tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    path = config(
        models=_models(base=tmp_path / "base", upper=tiny_zoo / "upper", reverse=tiny_zoo / "reverse")
    )
    error = refuse(verb, path, folder=tmp_path)
    assert "splits text in another way than tokenizer.json" in error
    assert "by transformers' class LlamaTokenizer (tokenizer_config.json has tokenizer_class: LlamaT" in error
    assert 'do: write "tokenizer_class": "PreTrainedTokenizerFast" into' in error


def test_truncated_weights(config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_zoo / "upper", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    path = config(models=_models(base=tiny_zoo / "base", broken=broken))
    message = refuse("run", path, folder=tmp_path)
    assert "model.safetensors" in message
    assert "truncated" in message


@pytest.mark.usefixtures("formula")
def test_a_run_folder_of_another_config(config: Callable[..., Path], tmp_path: Path) -> None:
    succeed("run", config(generate=False, budget={"generations": 1}))
    message = refuse("run", config(generate=False, seed=5), folder=tmp_path)
    assert "holds a run of another config" in message
    assert "seed 0 there, 5 here" in message


def test_an_out_folder_that_is_not_a_run(config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "is not a run folder" in refuse("run", config(), folder=tmp_path)


@pytest.mark.parametrize("verb", ["resume", "status", "report", "export"])
def test_a_corrupt_run_store(finished_run: Path, tmp_path: Path, verb: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    path = run / "run.sqlite"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    words = [verb, run, *([tmp_path / "out"] if verb == "export" else [])]
    assert "damaged" in refuse(*words, folder=tmp_path)


@pytest.mark.parametrize("verb", ["resume", "status", "report"])
def test_no_run_there(tmp_path: Path, verb: str) -> None:
    assert "no run here" in refuse(verb, tmp_path / "nothing", folder=tmp_path)


def test_no_room_for_the_export(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    assert "not enough disk space" in refuse("export", finished_run, tmp_path / "out", folder=tmp_path)


def test_exporting_over_files_or_something_unknown(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("mine")
    assert "already exists" in refuse("export", finished_run, tmp_path / "out", folder=tmp_path)
    message = refuse("export", finished_run, tmp_path / "new", "--pick", "TIE", folder=tmp_path)
    assert "did you mean 'TIES'?" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groups: []", "missing key 'models'"),
        ("models: {a: x}\ngroups: [{method: linear, sources: [b]}]", "unknown model 'b'"),
        ("models: {a: x}\ngroups: [{method: tie, sources: [a]}]", "unknown merge method 'tie'"),
        (
            "models: {a: x, b: x}\nbase: a\ngroups: [{method: ties, sources: [b], parameters: {density: 2}}]",
            "density is out of range",
        ),
        ("models: {a: /no/such/folder}\ngroups: [{method: linear, sources: [a]}]", "/no/such/folder"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert message in refuse("merge", tmp_path / "recipe.yaml", tmp_path / "out", folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as", "adaptor"], "did you mean 'adapter'?"),
        (["--as", "recipe", "--rank", "3"], "--rank is for adapters"),
        (["--rank", "3"], "--rank is for adapters\n  got: --as model"),
        (["--keep-rest"], "--keep-rest is for adapters"),
        (["--as", "adapter"], "choose a rank (e.g. --rank 16)"),
        (["--as", "mergekit"], "a name that ends in .yaml"),
        (["--as", "recipe"], "a name that ends in .yaml"),
        (["--as", "adapter", "--rank", "3", "--pick", "TIE"], "did you mean 'TIES'?"),
    ],
    ids=" ".join,
)
def test_mistakes_in_the_form_of_an_export(
    finished_run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in refuse("export", finished_run, tmp_path / "out", *options, folder=tmp_path)


def test_mistakes_in_the_form_of_a_merge(tiny_zoo: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    groups = [
        {"method": "ties", "layers": [0], "sources": ["a", "b"]},
        {"method": "linear", "sources": ["a", "b"]},
    ]
    models = {"base": tiny_zoo / "base", "a": tiny_zoo / "upper", "b": tiny_zoo / "reverse"}
    data = {"models": {k: str(v) for k, v in models.items()}, "base": "base", "groups": groups}
    recipe.write_text(yaml.safe_dump(data))
    words = ("merge", recipe, tmp_path / "out.yaml", "--as")
    assert "can't be written as mergekit YAML" in refuse(*words, "mergekit", folder=tmp_path)
    assert "no such form" in refuse(*words, "recipe", folder=tmp_path)
    assert "--rank is for adapters" in refuse(*words, "mergekit", "--rank", "2", folder=tmp_path)
    assert "must be truncated" in refuse(*words, "adapter", folder=tmp_path)
    (tmp_path / "out.yaml").write_text("mine")
    data["groups"] = groups[1:]
    recipe.write_text(yaml.safe_dump(data))
    assert "already exists" in refuse(*words, "mergekit", folder=tmp_path)
    assert "already exists" in refuse(*words, "adapter", "--rank", "2", folder=tmp_path)


def test_mistakes_of_evaluate(tiny_zoo: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    assert "no-model" in refuse("evaluate", tmp_path / "no-model", "--suite", suite, folder=tmp_path)
    words = ("evaluate", tiny_zoo / "base", "--suite", suite, "--split", "tset")
    assert "did you mean 'test'?" in refuse(*words, folder=tmp_path)
    assert "--run RUN" in refuse("evaluate", tiny_zoo / "base", folder=tmp_path)
    words = ("evaluate", tiny_zoo / "base", "--suite", suite)
    assert "dtype" in refuse(*words, "--dtype", "float17", folder=tmp_path)
    assert "device" in refuse(*words, "--device", "gpu", folder=tmp_path)
