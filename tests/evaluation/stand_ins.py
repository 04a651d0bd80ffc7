"""Stand-ins for data sets of the hub: a few rows each, with the columns and types of the published ones.

`install` puts them in the place of `datasets.load_dataset`, and a metric in the place of `code_eval`, which
the library `evaluate` downloads. It is also called in the process that executes answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import evaluate
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

ROWS = 24
"""Rows of each split."""

PUBLISHED: dict[tuple[str, str | None], dict[str, int]] = {
    ("openai/gsm8k", "main"): {"train": 7473, "test": 1319},
    ("google-research-datasets/mbpp", "full"): {"train": 374, "test": 500, "validation": 90, "prompt": 10},
    ("openai/openai_humaneval", None): {"test": 164},
    ("GBaker/MedQA-USMLE-4-options-hf", None): {"train": 10178, "validation": 1272, "test": 1273},
    ("qiaojin/PubMedQA", "pqa_labeled"): {"train": 1000},
    ("cais/mmlu", "all"): {"test": 14042, "validation": 1531, "dev": 285, "auxiliary_train": 99842},
    ("Rowan/hellaswag", None): {"train": 39905, "test": 10003, "validation": 10042},
    ("allenai/ai2_arc", "ARC-Challenge"): {"train": 1119, "test": 1172, "validation": 299},
    ("allenai/ai2_arc", "ARC-Easy"): {"train": 2251, "test": 2376, "validation": 570},
    ("google/IFEval", None): {"train": 541},
    ("juletxara/mgsm", "ja"): {"train": 8, "test": 250},
    ("SakanaAI/gsm8k-ja-test_250-1319", None): {"test": 1069},
}
"""Data set and its configuration -> rows of its splits, as published."""

TEXT, INT, SMALL = Value("string"), Value("int64"), Value("int32")
RULE_SETTINGS = ("num_highlights", "relation", "num_words", "keywords", "prompt_to_repeat")


def _gsm8k(mark: str, n: int) -> dict[str, Any]:
    question = f"{mark}: Ann has {n} pens and buys {n} more. How many pens does she have?"
    return {
        "question": question,
        "answer": f"Ann has {n}+{n} = <<{n}+{n}={2 * n}>>{2 * n} pens.\n#### {2 * n}",
    }


def _mbpp(mark: str, n: int) -> dict[str, Any]:
    return {
        "task_id": n,
        "text": f"Write a function to add {n} to a number ({mark}).",
        "code": f"def add(x):\r\n  return x + {n}",
        "test_list": [f"assert add({x}) == {x + n}" for x in (1, 2, 3)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def _humaneval(mark: str, n: int) -> dict[str, Any]:
    return {
        "task_id": f"HumanEval/{n}",
        "prompt": f'def add(x: int) -> int:\n    """Add {n} to a number ({mark})."""\n',
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
        "entry_point": "add",
    }


def _medqa(mark: str, n: int) -> dict[str, Any]:
    endings = {f"ending{i}": f"Drug {i}" for i in range(4)}
    return {"id": f"{mark}-{n}", "sent1": f"{mark}: patient {n}?", "sent2": "", **endings, "label": n % 4}


def _pubmedqa(mark: str, n: int) -> dict[str, Any]:
    return {
        "pubid": n,
        "question": f"Does drug {n} help ({mark})?",
        "context": {
            "contexts": ["We gave it to 10 people.", "Some slept better."],
            "labels": ["METHODS", "RESULTS"],
            "meshes": ["Humans"],
            "reasoning_required_pred": ["y"],
            "reasoning_free_pred": ["y"],
        },
        "long_answer": "It depends.",
        "final_decision": ["yes", "no", "maybe"][n % 3],
    }


def _mmlu(mark: str, n: int) -> dict[str, Any]:
    choices = [str(n + i) for i in range(4)]
    return {
        "question": f"{mark}: {n}?",
        "subject": "high_school_physics",
        "choices": choices,
        "answer": n % 4,
    }


def _hellaswag(mark: str, n: int) -> dict[str, Any]:
    return {
        "ind": n,
        "activity_label": "Baking bread",
        "ctx_a": f"Cook {n} ({mark}) kneads the dough.",
        "ctx_b": "then she",
        "ctx": f"Cook {n} ({mark}) kneads the dough. then she",
        "endings": [f"does thing {i}. [substeps]" for i in range(4)],
        "source_id": f"wikihow~{n}",
        "split": mark,
        "split_type": "indomain",
        "label": "" if mark == "test" else str(n % 4),
    }


def _arc(mark: str, n: int) -> dict[str, Any]:
    labels = list("ABCD") if n % 2 else list("1234")
    choices = {"text": [f"thing {n + i}" for i in range(4)], "label": labels}
    return {"id": f"{mark}_{n}", "question": f"{mark}: {n}?", "choices": choices, "answerKey": labels[n % 4]}


def _ifeval(mark: str, n: int) -> dict[str, Any]:
    settings = dict.fromkeys(RULE_SETTINGS)
    return {
        "key": 1000 + n,
        "prompt": f"Write about the number {n} in at least 4 words. Do not use commas.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [settings, settings | {"relation": "at least", "num_words": 4}],
    }


def _mgsm(mark: str, n: int) -> dict[str, Any]:
    question = f"アンは{n}本のペンを持ち、{n}本買います。全部で何本ですか？（{mark}）"
    train = mark == "train"
    return {
        "question": f"問題：{question}" if train else question,
        "answer": f"ステップごとの答え：答えは{2 * n}です。" if train else None,
        "answer_number": 2 * n,
        "equation_solution": None,
    }


def _gsm8k_ja(mark: str, n: int) -> dict[str, Any]:
    row = _mgsm(f"残り {mark}", n)
    return {"question": row["question"], "answer": f"{n} + {n} = {2 * n}", "answer_number": 2 * n}


_ARC = (
    _arc,
    {"id": TEXT, "question": TEXT, "choices": {"text": List(TEXT), "label": List(TEXT)}, "answerKey": TEXT},
)
SCHEMAS: dict[tuple[str, str | None], tuple[Callable[[str, int], dict[str, Any]], Mapping[str, Any]]] = {
    ("openai/gsm8k", "main"): (_gsm8k, {"question": TEXT, "answer": TEXT}),
    ("google-research-datasets/mbpp", "full"): (
        _mbpp,
        {
            **{"task_id": SMALL, "text": TEXT, "code": TEXT, "test_list": List(TEXT)},
            **{"test_setup_code": TEXT, "challenge_test_list": List(TEXT)},
        },
    ),
    ("openai/openai_humaneval", None): (
        _humaneval,
        dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), TEXT),
    ),
    ("GBaker/MedQA-USMLE-4-options-hf", None): (
        _medqa,
        {
            **dict.fromkeys(("id", "sent1", "sent2", "ending0", "ending1", "ending2", "ending3"), TEXT),
            "label": INT,
        },
    ),
    ("qiaojin/PubMedQA", "pqa_labeled"): (
        _pubmedqa,
        {
            **{"pubid": SMALL, "question": TEXT, "long_answer": TEXT, "final_decision": TEXT},
            "context": dict.fromkeys(
                ("contexts", "labels", "meshes", "reasoning_required_pred", "reasoning_free_pred"), List(TEXT)
            ),
        },
    ),
    ("cais/mmlu", "all"): (
        _mmlu,
        {"question": TEXT, "subject": TEXT, "choices": List(TEXT), "answer": ClassLabel(names=list("ABCD"))},
    ),
    ("Rowan/hellaswag", None): (
        _hellaswag,
        {
            **{"ind": SMALL, "endings": List(TEXT)},
            **dict.fromkeys(("activity_label", "ctx_a", "ctx_b", "ctx", "source_id"), TEXT),
            **dict.fromkeys(("split", "split_type", "label"), TEXT),
        },
    ),
    ("allenai/ai2_arc", "ARC-Challenge"): _ARC,
    ("allenai/ai2_arc", "ARC-Easy"): _ARC,
    ("google/IFEval", None): (
        _ifeval,
        {
            **{"key": INT, "prompt": TEXT, "instruction_id_list": List(TEXT)},
            "kwargs": List(
                {
                    **{"num_highlights": SMALL, "relation": TEXT, "num_words": SMALL},
                    **{"keywords": List(TEXT), "prompt_to_repeat": TEXT},
                }
            ),
        },
    ),
    ("juletxara/mgsm", "ja"): (
        _mgsm,
        {"question": TEXT, "answer": TEXT, "answer_number": SMALL, "equation_solution": TEXT},
    ),
    ("SakanaAI/gsm8k-ja-test_250-1319", None): (
        _gsm8k_ja,
        {"question": TEXT, "answer": TEXT, "answer_number": INT},
    ),
}


def stand_in(path: str, name: str | None) -> DatasetDict:
    """Return the stand-in of a data set, with all its splits."""
    make, schema = SCHEMAS[path, name]
    features = Features(dict(schema))
    return DatasetDict(
        {
            split: Dataset.from_list([make(split, n) for n in range(min(ROWS, rows))], features=features)
            for split, rows in PUBLISHED[path, name].items()
        }
    )


class CodeEval:
    """The metric `code_eval`: it executes a candidate with its tests, here in this process."""

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        passed = []
        for tests, candidates in zip(references, predictions, strict=True):
            try:
                exec(f"{candidates[0]}\n{tests}", {})
                passed.append(1.0)
            except Exception:
                passed.append(0.0)
        return {f"pass@{n}": sum(passed) / len(passed) for n in k}, {}


def install() -> None:
    """Put the stand-ins in place, for the rest of the process."""
    original, metric = datasets.load_dataset, evaluate.load

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        return stand_in(path, name) if (path, name) in SCHEMAS else original(path, name, **options)

    datasets.load_dataset = load_dataset
    evaluate.load = lambda path, *args, **options: (
        CodeEval() if path == "code_eval" else metric(path, *args, **options)
    )


SITE = "from tests.evaluation.stand_ins import install\ninstall()\n"


def install_in_children(folder: Path) -> None:
    """Write the module that Python imports when it starts, for processes with the folder on their path."""
    (folder / "sitecustomize.py").write_text(SITE)
