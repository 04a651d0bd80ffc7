"""Tasks of every shape, a tiny chat model, and lm-eval's command line as the other side of the comparison.

    python -m tests.evaluation.parity FOLDER

writes both into FOLDER and prints the command line of each way to ask.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CONTEXT = 192
SPLITS = {"search": 6, "select": 4, "test": 6}
NAMED = {split: split for split in SPLITS}
WORDS = ["red", "green", "blue", "café", "naïve", "日本", "😀", "seven", "eight", "nine", "apple", "plum"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking %}<think>{% endif %}{% endif %}"
)

MEAN = {"aggregation": "mean", "higher_is_better": True}
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{ question }}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, **MEAN} for name in ("acc", "acc_norm", "acc_bytes")],
}
SHOTS = {"num_fewshot": 2}
LIKELIHOOD: dict[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{ question }} =",
    "doc_to_target": " {{ answer }}",
    "metric_list": [{"metric": "acc", **MEAN}, {"metric": "perplexity", **MEAN}],
}
WRITE: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{ question }} =",
    "doc_to_target": "{{ answer }}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", **MEAN}],
}
FIRST = {"function": "take_first"}


def _filtered(*steps: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    pipelines = [{"name": "raw", "filter": [FIRST]}, {"name": "own", "filter": [*steps]}]
    return {**WRITE, "filter_list": pipelines, **changes}


SHAPES: dict[str, dict[str, Any]] = {
    "choice": CHOICE,
    "choice_shots": {**CHOICE, **SHOTS, "fewshot_config": {"sampler": "first_n"}},
    "choice_never_shots": {**CHOICE, "num_fewshot": 0},
    "choice_mutual": {
        **CHOICE,
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_mutual_info", **MEAN}],
    },
    "choice_inputs": {
        **CHOICE,
        "doc_to_text": "{{ gold }}",
        "doc_to_choice": "{{ [question ~ ' a ' ~ choices[0], question ~ ' b ' ~ choices[1], question] }}",
        "doc_to_target": "{{ answer }}",
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "choice_golds": {**CHOICE, "doc_to_target": "golds"},
    "choice_letters": {**CHOICE, "doc_to_choice": list("ABC"), "doc_to_text": "{{ question }}\nA or B or C?"},
    "choice_prefix": {**CHOICE, **SHOTS, "gen_prefix": "The answer is"},
    "choice_prefix_space": {**CHOICE, "gen_prefix": "The answer is "},
    "choice_glued": {
        **CHOICE,
        "target_delimiter": "",
        "doc_to_choice": "{{ choices | map('indent', 1, true) | list }}",
    },
    "choice_newline": {**CHOICE, "target_delimiter": "\n"},
    "choice_described": {
        **CHOICE,
        **SHOTS,
        "description": "Answer about {{ answer }}.\n\n",
        "fewshot_delimiter": "\n---\n",
    },
    "choice_long": {**CHOICE, "doc_to_text": "{{ text }}\nAnswer:"},
    "likely": LIKELIHOOD,
    "likely_shots": {**LIKELIHOOD, **SHOTS, "num_fewshot": 3},
    "likely_bytes": {
        **LIKELIHOOD,
        "doc_to_text": "日本 {{ question }} 😀:",
        "doc_to_target": " naïve {{ answer }} 本",
    },
    "likely_long": {**LIKELIHOOD, "doc_to_text": "{{ text }} ="},
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{ text }}",
        "metric_list": [
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
        ],
    },
    "write": WRITE,
    "write_shots": {**WRITE, **SHOTS},
    "write_prefix": {**WRITE, "gen_prefix": "So it is"},
    "write_long": {**WRITE, "doc_to_text": "{{ text }} ="},
    "write_targets": {**WRITE, "doc_to_target": "choices"},
    "write_default": {key: value for key, value in WRITE.items() if key != "generation_kwargs"}
    | {"generation_kwargs": {"max_gen_toks": 5}},
    "regex": _filtered({"function": "regex", "regex_pattern": "([a-z]+)", "group_select": -1}, FIRST),
    "letters": _filtered({"function": "multi_choice_regex", "ignore_case": True}, FIRST),
    "stripped": _filtered({"function": "remove_whitespace"}, FIRST),
    "lower": _filtered({"function": "lowercase"}, FIRST),
    "upper": _filtered({"function": "uppercase"}, FIRST),
    "mapped": _filtered(
        {"function": "regex", "regex_pattern": "(.)"},
        {"function": "map", "mapping_dict": {"r": "red"}, "default_value": "plum"},
        FIRST,
    ),
    "spans": _filtered({"function": "format_span"}, FIRST),
    "majority": _filtered(
        {"function": "take_first_k", "k": 2}, {"function": "majority_vote"}, FIRST, repeats=3
    ),
}
"""Name of a task -> its YAML, without the data."""

CLASS = """
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

import datasets


class Own(Task):
    VERSION = 1
    OUTPUT_TYPE = "loglikelihood"
    FILE = {file!r}

    def __init__(self, config=None):
        super().__init__(config={{"task": "own_class", "num_fewshot": 0}})

    def download(self, *_, **__):
        self.dataset = datasets.load_dataset("json", data_files=self.FILE)

    def has_training_docs(self):
        return True

    def has_validation_docs(self):
        return False

    def has_test_docs(self):
        return True

    def training_docs(self):
        return list(self.dataset["train"])

    def test_docs(self):
        return list(self.dataset["test"])

    def doc_to_text(self, doc):
        return doc["question"] + " ->"

    def doc_to_target(self, doc):
        return " " + doc["answer"]

    def construct_requests(self, doc, ctx, **options):
        options = {{key: options[key] for key in ("metadata",)}}
        asked = (ctx, self.doc_to_target(doc))
        return Instance(request_type="loglikelihood", doc=doc, arguments=asked, idx=0, **options)

    def process_results(self, doc, results):
        return {{"acc": float(results[0][1])}}

    def aggregation(self):
        return {{"acc": lambda values: sum(values) / len(values)}}

    def higher_is_better(self):
        return {{"acc": True}}
"""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to ask: keys of a suite, and options of lm-eval's command line that say the same."""

    suite: dict[str, Any]
    options: tuple[str, ...] = ()
    model_args: str = ""
    tasks: tuple[str, ...] = field(default=(*SHAPES, "own_class"))


FEW = ("choice_shots", "choice_prefix", "likely_shots", "rolling", "write_shots", "own_class")
QUICK: dict[str, tuple[str, ...]] = {"plain": (*SHAPES, "own_class"), "template": FEW}
"""Ways of the default test suite -> their tasks; the others, and all tasks in a template, are slow tests."""
TEXTS = tuple(name for name in SHAPES if "generate" in SHAPES[name]["output_type"])
WAYS: dict[str, Way] = {
    "plain": Way({"chat_template": "off"}),
    "template": Way({}, ("--apply_chat_template",)),
    "one turn": Way(
        {"fewshot_as_multiturn": False},
        ("--apply_chat_template", "--fewshot_as_multiturn", "false"),
        tasks=("choice_shots", "choice_prefix", "choice_described", "likely_shots", "write_shots"),
    ),
    "system prompt and shots": Way(
        {
            "system_prompt": "Be brief.",
            "num_fewshot": 1,
            "gen_kwargs": {"max_gen_toks": 4, "until": ["e", "</s>"]},
        },
        (
            *("--apply_chat_template", "--system_instruction", "Be brief.", "--num_fewshot", "1"),
            *("--gen_kwargs", '{"max_gen_toks": 4, "until": ["e", "</s>"]}'),
        ),
        tasks=(
            "choice",
            "choice_shots",
            "choice_prefix",
            "likely",
            "write",
            "write_shots",
            "regex",
        ),
    ),
    "system prompt as text": Way(
        {"chat_template": "off", "system_prompt": "Be brief.\n"},
        ("--system_instruction", "Be brief.\n"),
        tasks=("choice", "choice_described", "write_shots"),
    ),
    "thinking to a text": Way(
        {"enable_thinking": True, "think_end_token": "e"},
        ("--apply_chat_template",),
        "enable_thinking=True,think_end_token=e",
        tasks=TEXTS,
    ),
    "thinking to a token": Way(
        {"enable_thinking": False, "think_end_token": 300},
        ("--apply_chat_template",),
        "enable_thinking=False,think_end_token=300",
        tasks=TEXTS,
    ),
}


def documents(split: str, count: int) -> list[dict[str, Any]]:
    rng = random.Random(split)
    rows = []
    for number in range(count):
        words = rng.sample(WORDS, 5)
        length = 300 if number % 2 else 20  # longer than the context, and shorter
        rows.append(
            {
                "question": f"{split} {number}: {' '.join(words)}",
                "answer": words[0],
                "choices": [words[0], f"{words[1]} {words[2]}", words[3]],
                "gold": number % 3,
                "golds": [number % 3, 1],
                "text": f"{split} {number} " + " ".join(rng.choice(WORDS) for _ in range(length)),
            }
        )
    return rows


def write_tasks(folder: Path) -> Path:
    """Write all tasks and their data; return the folder."""
    folder.mkdir(parents=True)
    files = {}
    for split, count in {**SPLITS, "train": 8}.items():
        files[split] = str(folder / f"{split}.jsonl")
        text = "".join(json.dumps(row) + "\n" for row in documents(split, count))
        Path(files[split]).write_text(text, encoding="utf-8")
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "train",
    }
    for name, shape in SHAPES.items():
        head = {"task": name, **data, "metadata": {"version": 1.0}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**head, **shape}), encoding="utf-8")
    (folder / "own.py").write_text(CLASS.format(file=files), encoding="utf-8")
    (folder / "own_class.yaml").write_text("task: own_class\nclass: !function own.Own\n")
    (folder / "both.yaml").write_text("group: both\ntask:\n  - choice\n  - write\n")
    return folder


def new_tokenizer() -> Any:
    """Return a tokenizer of the SentencePiece kind: spaces as marks, bytes for unknown characters, a BOS."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [AddedToken(f"<0x{byte:02X}>", special=False, normalized=False) for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<think>"]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False)
    core.train_from_iterator(
        ["red green blue seven eight nine apple pear plum Question: Answer: = \n"] * 9, trainer
    )
    state = json.loads(core.to_str())
    vocabulary = state["model"]["vocab"]
    for token in fallback:
        vocabulary[token.content] = len(vocabulary)
    core = Tokenizer.from_str(json.dumps(state))
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_model(folder: Path) -> Path:
    """Write a tiny random Llama with that tokenizer; return the folder."""
    tokenizer = new_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command_line(way: Way, model: Path, tasks: Path, out: Path, names: Sequence[str] = ()) -> list[str]:
    """Return the arguments of lm-eval's command line for a way to ask."""
    model_args = ",".join(filter(None, (f"pretrained={model},dtype=float32", way.model_args)))
    return [
        *("run", "--model", "hf", "--model_args", model_args, "--device", "cpu", "--batch_size", "1"),
        *("--tasks", ",".join(names or way.tasks), "--include_path", str(tasks)),
        *("--log_samples", "--output_path", str(out), *way.options),
    ]


_RUN = """
import json, sys, functools
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate

# Indexing lm-eval's own tasks takes half a minute per call; nothing else is changed.
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
"""


def lm_eval(calls: Sequence[Sequence[str]], *, whole: bool = False) -> None:
    """Run lm-eval's command line, all calls in one process; or as people do, with all of its own tasks."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if whole:
        commands = [[sys.executable, "-m", "lm_eval", *call] for call in calls]
    else:
        commands = [[sys.executable, "-c", _RUN, json.dumps(calls)]]
    for command in commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]


def samples(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Read what a call logged: task -> its samples, of every filter, in item order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in out.rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        found[task] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    lie = write_model(place / "model"), write_tasks(place / "tasks")
    for title, chosen in WAYS.items():
        print(
            f"# {title}\npython -m lm_eval {shlex.join(command_line(chosen, *lie, place / 'out' / title))}\n"
        )
