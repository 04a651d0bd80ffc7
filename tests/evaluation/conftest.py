"""A tiny random Llama, a word-level tokenizer, and lm-eval tasks of every output type, written to a folder.

A random model is at chance, which is all that is needed to compare numbers. Answers of one token out of a
small vocabulary make it right now and then.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from evomerge.evaluation.suite import Suite

LETTERS = "abcdefgh"
CONTEXT = 24
CHOICE_TOKENS = 3
"""Tokens of the longest choice: its log-likelihood is their sum."""
ITEMS = {"search": 30, "select": 20, "test": 40}
NAMED = {"search": "search", "select": "select", "test": "test"}

ACC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
PERPLEXITY = [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]

TASKS: dict[str, dict[str, Any]] = {
    "first": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{ prompt }} =",
        "doc_to_target": " {{ letters[0] }}",
        "metric_list": ACC,
    },
    "copy": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{ prompt }} =",
        "doc_to_target": " {{ letters | join(' ') }} <eos>",
        "metric_list": ACC,
    },
    "fewshot": {
        "output_type": "loglikelihood",
        "num_fewshot": 2,
        "fewshot_split": "train",
        "fewshot_delimiter": " ; ",
        "doc_to_text": "{{ prompt }} =",
        "doc_to_target": " {{ letters[0] }}",
        "metric_list": ACC,
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{ prompt }} =",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [*ACC, {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
    },
    "letter": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{ prompt }} =",
        "doc_to_choice": list("abcd"),
        "doc_to_target": "{{ gold }}",
        "metric_list": ACC,
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{ prompt }} {{ (letters + letters) | join(' ') }}",
        "metric_list": PERPLEXITY,
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{ prompt }} =",
        "doc_to_target": "{{ letters[0] }}",
        "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 1, "do_sample": False},
        "metric_list": EXACT,
    },
}


def documents(task: str, split: str, count: int) -> list[dict[str, Any]]:
    rng = random.Random(f"{task} {split}")
    mark = {"search": "x", "select": "y", "test": "z", "train": "w"}[split]
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        letters = [rng.choice(LETTERS) for _ in range(rng.randint(2, 12))]
        prompt = f"{mark} {' '.join(letters)}"
        choices = [" ".join(letters[:2]), letters[-1], letters[0] + " " + letters[-1] + " a"]
        found[prompt] = {"prompt": prompt, "letters": letters, "choices": choices, "gold": rng.randrange(3)}
    return list(found.values())


def write_task(folder: Path, name: str, config: Mapping[str, Any], **splits: list[dict[str, Any]]) -> None:
    """Write a task's YAML, with data files named relative to it."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, docs in splits.items():
        lines = "".join(json.dumps(doc) + "\n" for doc in docs)
        (folder / "data" / f"{name}_{split}.jsonl").write_text(lines)
    head = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: f"data/{name}_{split}.jsonl" for split in splits}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**head, **config}))


def write_all(folder: Path) -> Path:
    for name, config in TASKS.items():
        counts = ITEMS | ({"train": 10} if name == "fewshot" else {})
        write_task(folder, name, config, **{s: documents(name, s, n) for s, n in counts.items()})
    return folder


def entry(task: str, **changes: Any) -> dict[str, Any]:
    """Return one task's entry of a suite file."""
    kind = TASKS[task]["output_type"] if task in TASKS else ""
    if kind == "loglikelihood_rolling":
        found: dict[str, Any] = {"task": task, "role": "retention", "splits": NAMED}
    else:
        metric = "exact_match" if kind == "generate_until" else "acc"
        found = {"task": task, "metric": metric, "splits": NAMED}
    return {**found, **changes}


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("suite") / "tasks")


MakeSuite = Callable[..., Suite]


@pytest.fixture(scope="session")
def make_suite(tasks_dir: Path) -> MakeSuite:
    def make(*entries: Mapping[str, Any], folder: Path = tasks_dir) -> Suite:
        data = {"name": "test", "tasks_dir": str(folder), "tasks": list(entries)}
        return Suite.from_mapping(data, folder=folder, where="suite.yaml")

    return make


@pytest.fixture(scope="session")
def full_suite(make_suite: MakeSuite) -> Suite:
    return make_suite(*(entry(task) for task in TASKS))


def new_tokenizer() -> Any:
    words = ["<unk>", "<eos>", *LETTERS, *"wxyz", "=", ";"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def new_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,  # far from uniform, so that a wrong position or mask shows
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return new_tokenizer()


@pytest.fixture(scope="session")
def model() -> Any:
    return new_model()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
