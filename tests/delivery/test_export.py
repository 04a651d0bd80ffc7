"""Export: the scored model is the exported model, bit for bit, and it comes with its papers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from evomerge import compose
from evomerge.config import RunConfig
from evomerge.delivery import export as delivery
from evomerge.delivery.progress import Silent
from evomerge.delivery.rescore import rescore
from evomerge.delivery.summary import Summary
from evomerge.errors import ModelError, StoreError
from evomerge.evaluation.scores import Scores
from evomerge.merging.live.workbench import Workbench
from evomerge.merging.recipe import Recipe
from evomerge.prepare import prepare
from evomerge.running.store import RunStore
from evomerge.running.worker import WorkerSpec
from evomerge.stored import StoredRun
from tests.merging.experts_shuffled import shuffled


@pytest.fixture(scope="module")
def opened(finished_run: Path) -> Summary:
    store = RunStore.read(finished_run)
    return Summary(StoredRun(store))


@pytest.fixture(scope="module")
def exported(opened: Summary, tmp_path_factory: pytest.TempPathFactory) -> delivery.Exported:
    return delivery.export(opened, tmp_path_factory.mktemp("export") / "model")


def test_the_folder_is_complete(exported: delivery.Exported) -> None:
    names = {p.name for p in exported.folder.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "mergekit.yaml",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((exported.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert Recipe.from_yaml((exported.folder / "recipe.yaml").read_text()) == exported.pick.recipe
    assert not list(exported.folder.parent.glob(".*"))


def test_plain_transformers_loads_the_weights_that_were_scored(exported: delivery.Exported) -> None:
    recipe = exported.pick.recipe
    bench = Workbench(recipe.models, recipe.base)
    bench.load(recipe)
    loaded = AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float32)
    live = bench.model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, live[name]), name
    assert AutoTokenizer.from_pretrained(exported.folder)("a b").input_ids == bench.tokenizer("a b").input_ids


def test_it_scores_exactly_what_is_stored(opened: Summary, exported: delivery.Exported) -> None:
    store = opened.store
    worker = prepare(StoredRun(store).config()).worker
    for split in ("test", "select"):
        stored = store.result(exported.pick.recipe.hash, split)  # type: ignore[arg-type]
        assert isinstance(stored, Scores)
        assert rescore(exported.folder, worker, split).same_as(stored)  # type: ignore[arg-type]


def test_the_model_card_says_what_must_be_said(opened: Summary, exported: delivery.Exported) -> None:
    text = (exported.folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers"
    verdict = opened.verdict(opened.rows())
    assert verdict is not None
    assert verdict.sentence in text
    for part in (
        exported.pick.recipe.hash,
        "## Safety",
        "run seed 0",
        "torch 2",
        "evomerge merge recipe.yaml",
    ):
        assert part in text
    assert "| winner:" in text


def test_other_rows_can_be_picked(opened: Summary, tmp_path: Path) -> None:
    summary = opened
    best = summary.best_baseline(summary.rows())
    assert best is not None
    done = delivery.export(summary, tmp_path / "best", pick="best-baseline")
    assert done.pick.name == best.name
    assert "not the winner" in (tmp_path / "best" / "README.md").read_text()
    by_hash = delivery.export(summary, tmp_path / "hash", pick=best.recipe[:10])
    assert by_hash.pick.recipe.hash == best.recipe
    assert delivery.export(summary, tmp_path / "name", pick="TIES").pick.name == "TIES"


def test_an_adapter_is_scored_before_it_gets_its_name(opened: Summary, tmp_path: Path) -> None:
    summary, store = opened, opened.store
    done = delivery.export_adapter(summary, tmp_path / "small", rank=4)
    assert not done.report.exact
    assert 0 < done.report.energy < 1
    assert (done.report.rank, done.report.base) == (4, done.pick.recipe.models["base"])
    stored = store.result(done.pick.recipe.hash, "test")
    assert isinstance(stored, Scores)
    assert done.merge.same_as(stored)
    assert not done.adapter.same_as(stored)
    assert [task for task, _, _ in done.rows()] == [scores.task for scores in stored]
    worker = prepare(StoredRun(store).config()).worker
    base = Path(done.report.base)
    assert rescore(tmp_path / "small", worker, "test", base=base).same_as(done.adapter)

    text = (tmp_path / "small" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft"
    assert f"{done.report.summary()}. It was loaded with peft" in text
    assert "evomerge merge recipe.yaml OUT --as adapter --rank 4\n" in text
    assert "It approximates the merge" in text
    assert "bit for bit" not in text
    for task, whole, adapter in done.rows():
        assert f"| {task} | {whole:.3f} | {adapter:.3f} |" in text
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.yaml",
    ]


def test_an_adapter_that_holds_everything_scores_like_the_merge(opened: Summary, tmp_path: Path) -> None:
    summary = opened
    done = delivery.export_adapter(summary, tmp_path / "big", pick="best-baseline", rank=999, keep_rest=True)
    assert done.report.energy >= 1 - 1e-6
    likelihoods = [(s.task, s.metric, done.adapter[s.task].metric) for s in done.merge if s.smooth is None]
    assert any(task == "demo_text" for task, _, _ in likelihoods)
    for task, whole, adapter in likelihoods:
        if task == "demo_text":  # the stored merge is rounded to bfloat16, the adapter is not
            assert adapter == pytest.approx(whole, abs=0.02)
    text = (tmp_path / "big" / "README.md").read_text()
    assert f"--as adapter --rank {done.report.rank} --keep-rest\n" in text


def test_an_adapter_of_a_recipe_that_was_never_tested(opened: Summary, tmp_path: Path) -> None:
    summary, store = opened, opened.store
    searched = [recipe for generation in store.generations() for recipe in generation.recipes]
    untested = next(recipe for recipe in searched if store.result(recipe, "test") is None)
    done = delivery.export_adapter(summary, tmp_path / "small", pick=untested[:12], rank=2)
    assert (done.merge.split, done.merge.items) == ("test", done.adapter.items)
    assert store.result(untested, "test") is None
    text = (tmp_path / "small" / "README.md").read_text()
    assert "This is not the winner" in text


def test_an_adapter_that_can_not_be_scored_is_not_written(
    opened: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "rescore", lambda *_, **__: (_ for _ in ()).throw(StoreError("no")))
    with pytest.raises(StoreError):
        delivery.export_adapter(opened, tmp_path / "small", rank=4)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_winner_says_so(opened: Summary, tmp_path: Path) -> None:
    summary = opened
    unfinished = Summary(summary.run)
    unfinished.winner = None
    with pytest.raises(StoreError, match="no winner yet"):
        delivery.export(unfinished, tmp_path / "out")


def exported_as_scored(run: RunConfig, tmp_path: Path) -> tuple[Path, WorkerSpec]:
    """Carry out a run and export its winner; its scores on `test` must be those of the run."""
    compose.start(run, Silent())
    store = RunStore.read(tmp_path / "run")
    out = delivery.export(Summary(StoredRun(store)), tmp_path / "model")
    stored = store.result(out.pick.recipe.hash, "test")
    assert isinstance(stored, Scores)
    worker = prepare(StoredRun(store).config()).worker
    assert rescore(out.folder, worker, "test").same_as(stored)
    return out.folder, worker


@pytest.mark.end_to_end
def test_a_chosen_template_is_scored_as_exported(
    tiny_zoo: Path, config: Callable[..., Path], tmp_path: Path
) -> None:
    """Template and end tokens are of one source, and change what is asked and where answers end."""
    chat = tmp_path / "chat"
    shutil.copytree(tiny_zoo / "upper", chat)
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] | reverse }} {% endfor %}"
    )
    settings = json.loads((chat / "generation_config.json").read_text())
    ends = [settings["eos_token_id"], AutoTokenizer.from_pretrained(chat)("a").input_ids[-1]]
    (chat / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": ends}))
    changes = {
        "models": {
            "base": str(tiny_zoo / "base"),
            "sources": {"upper": str(chat), "reverse": str(tiny_zoo / "reverse")},
        },
        "budget": {"generations": 1},
        "baselines": [],
    }
    plain = prepare(RunConfig.load(config(**changes)))
    assert [note.partition(":")[0] for note in plain.notes if "chat_template" in note] == [
        "chat templates differ",
        "tokens that end answers differ",
    ]
    run = RunConfig.load(config(**changes, chat_template="upper"))
    assert not [note for note in prepare(run).notes if "chat_template" in note]
    assert run.identity() != plain.config.identity()
    folder, worker = exported_as_scored(run, tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert exported.generation_config.eos_token_id == ends
    assert not rescore(chat, worker, "test").same_as(rescore(tiny_zoo / "upper", worker, "test"))


@pytest.mark.end_to_end
def test_a_source_with_tokens_of_its_own_is_scored_as_exported(
    tiny_zoo: Path, config: Callable[..., Path], tmp_path: Path
) -> None:
    chat = tmp_path / "chat"
    tokenizer = AutoTokenizer.from_pretrained(tiny_zoo / "upper")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(tiny_zoo / "upper")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(chat)
    tokenizer.save_pretrained(chat)
    sources = {"upper": str(chat), "reverse": str(tiny_zoo / "reverse")}
    changes = {
        "models": {"base": str(tiny_zoo / "base"), "sources": sources},
        "budget": {"generations": 1},
        "baselines": [],
    }
    with pytest.raises(ModelError, match="have different vocabularies"):
        prepare(RunConfig.load(config(**changes)))
    run = RunConfig.load(config(**changes, tokenizer="union"))
    folder, _ = exported_as_scored(run, tmp_path)
    exported = AutoTokenizer.from_pretrained(folder)
    assert exported.convert_tokens_to_ids("<|im_end|>") == len(tokenizer) - 1
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(tokenizer)


@pytest.mark.end_to_end
def test_a_run_of_mixtures_with_matched_experts(
    config: Callable[..., Path], tiny_zoo: Path, tmp_path: Path
) -> None:
    base = AutoConfig.from_pretrained(tiny_zoo / "base")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind = MixtralConfig(
        vocab_size=base.vocab_size, num_key_value_heads=1, num_local_experts=4, eos_token_id=2, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(kind)
        for name in ("base", "upper", "reverse"):
            model.save_pretrained(tmp_path / name)
            AutoTokenizer.from_pretrained(tiny_zoo / "base").save_pretrained(tmp_path / name)
            for parameter in model.parameters():
                parameter.data += torch.randn(parameter.shape) * 0.01
    shuffled(tmp_path / "upper", tmp_path / "other")
    shutil.copytree(tmp_path / "upper", tmp_path / "other", dirs_exist_ok=True, ignore=ignore_weights)
    places = {"upper": str(tmp_path / "other"), "reverse": str(tmp_path / "reverse")}
    models = {"base": str(tmp_path / "base"), "sources": places, "experts": "matched"}
    changes = {"models": models, "budget": {"generations": 1}, "generate": False}
    changes |= {"baselines": ["uniform average"]}
    run = RunConfig.load(config(**changes))
    plain = RunConfig.load(config(models={**models, "experts": "stored"}, budget={"generations": 1}))
    assert run.identity() != plain.identity()
    assert any("experts matched" in note for note in prepare(run).notes)
    compose.start(run, Silent())
    store = RunStore.read(tmp_path / "run")
    out = delivery.export(Summary(StoredRun(store)), tmp_path / "model", pick="uniform average")
    stored = store.result(out.pick.recipe.hash, "test")
    assert isinstance(stored, Scores)
    assert out.pick.recipe.experts == "matched"
    assert rescore(out.folder, prepare(StoredRun(store).config()).worker, "test").same_as(stored)


def ignore_weights(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]
