"""The shipped zoo and task files: loadable by plain libraries, and what they claim to be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.zoo import ZooCard, demo_zoo
from evomerge.zoo.rules import DEMO_SKILLS
from evomerge.zoo.score import exact_and_probability, skill_accuracy, text_perplexity
from evomerge.zoo.skills import END
from evomerge.zoo.tasks import DEMO, extra_items, skill_items, task_files

TASK_FOLDER = Path(__file__).parents[2] / "benchmarks" / "tasks" / "demo"
MODELS = ("base", "add", "reverse", "translate", "upper", "sort")
ITEMS = 100

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that a second thread only costs, ten times the work on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def card() -> ZooCard:
    return ZooCard.load(demo_zoo())


def load(name: str) -> Any:
    folder = demo_zoo() / ("base" if name == "sort" else name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, demo_zoo() / name) if name == "sort" else model


def test_the_task_files_are_what_the_code_writes() -> None:
    written = task_files()
    found = {path.relative_to(TASK_FOLDER).as_posix() for path in TASK_FOLDER.rglob("*") if path.is_file()}
    assert found == set(written)
    for name, text in written.items():
        assert (TASK_FOLDER / name).read_text(encoding="utf-8") == text, f"{name}: run write_tasks again"


@pytest.mark.parametrize("name", MODELS)
def test_every_model_scores_as_its_card_says(name: str, card: ZooCard) -> None:
    model = load(name)
    for skill in DEMO_SKILLS:
        measured = skill_accuracy(model, skill, limit=ITEMS)
        assert measured == pytest.approx(card.models[name].accuracy[skill], abs=0.15)
    assert text_perplexity(model, limit=ITEMS) == pytest.approx(card.models[name].text_perplexity, rel=0.1)


def test_specialists_are_specialists(card: ZooCard) -> None:
    assert tuple(card.models) == MODELS
    for name in MODELS[1:]:
        accuracy = card.models[name].accuracy
        assert accuracy[name] >= 0.9
        assert max(value for skill, value in accuracy.items() if skill != name) <= 0.35
        assert card.models[name].text_perplexity <= 1.1 * card.models["base"].text_perplexity


@pytest.mark.parametrize("name", ["base", "upper"])
def test_generating_agrees_with_teacher_forcing(name: str) -> None:
    model, tokenizer = load(name), AutoTokenizer.from_pretrained(demo_zoo() / name)
    items = [item for skill in DEMO_SKILLS for item in skill_items(skill, "select")[:3]]
    exact, _ = exact_and_probability(model, items)
    for item, right in zip(items, exact, strict=True):
        ids = tokenizer(item.prompt, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
        assert (tokenizer.decode(output) == f"{item.answer} {END}") == right


@pytest.mark.parametrize("name", MODELS)
def test_folders_are_ordinary_portable_and_in_16_bits(name: str) -> None:
    from safetensors.torch import load_file

    folder = demo_zoo() / name
    weights = load_file(folder / ("adapter_model.safetensors" if name == "sort" else "model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    if name == "sort":
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == "../base"
        return
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert (folder / "generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(folder).eos_token == END


def test_the_shipped_zoo_is_small() -> None:
    assert sum(path.stat().st_size for path in demo_zoo().rglob("*") if path.is_file()) < 8e6


@pytest.mark.slow
def test_lm_eval_gives_the_same_numbers(
    tmp_path: Path, card: ZooCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped YAML, run by lm-eval itself, agrees with `score.py` item by item."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for path in TASK_FOLDER.glob("*.yaml"):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = task["dataset_kwargs"]["data_files"]
        task["dataset_kwargs"] = {
            "data_files": {split: str(TASK_FOLDER / name) for split, name in files.items()},
            "cache_dir": str(tmp_path / "cache"),
        }
        (tmp_path / path.name).write_text(yaml.safe_dump(task), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(demo_zoo() / "base")
    model = load("base")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32, max_length=64)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = evaluate(lm, manager.load(list(DEMO.names))["tasks"], bootstrap_iters=0)["results"]

    for skill in DEMO_SKILLS:
        assert results[f"demo_{skill}"]["acc,none"] == pytest.approx(card.models["base"].accuracy[skill])
    perplexity = results["demo_text"]["word_perplexity,none"]
    assert perplexity == pytest.approx(card.models["base"].text_perplexity, rel=1e-4)
    exact, _ = exact_and_probability(model, extra_items("upper", "test"))
    generated = results["demo_upper_generate"]["exact_match,none"]
    assert generated == pytest.approx(sum(exact) / len(exact))
    assert 0.25 < results["demo_translate_choice"]["acc,none"] <= 1.0
