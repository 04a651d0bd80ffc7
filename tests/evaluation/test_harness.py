"""The harness gives lm-eval's own numbers, the same bits every time, and refuses what can't be scored."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evomerge.errors import ConfigError
from evomerge.evaluation import builtin_tasks
from evomerge.evaluation import tasks as tasks_module
from evomerge.evaluation.gradient import differentiable
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.scores import NonFiniteScores, Scores
from evomerge.evaluation.sharing import Sharing
from evomerge.evaluation.smooth_loss import SmoothLoss, SmoothTask
from evomerge.evaluation.suite import Suite
from tests.rounding import of_log_likelihoods

from .conftest import (
    ACC,
    CHOICE_TOKENS,
    CONTEXT,
    ITEMS,
    TASKS,
    MakeSuite,
    documents,
    entry,
    new_model,
    new_tokenizer,
    write_task,
)

SLACK = of_log_likelihoods(new_model(), tokens=CHOICE_TOKENS)
"""The other side's batches are others; a mean over tokens moves no more than a sum of a few."""


@pytest.fixture(scope="module")
def harness(full_suite: Suite, tokenizer: Any) -> Harness:
    return Harness(full_suite, tokenizer=tokenizer, batch_size=16, max_length=None)


@pytest.fixture(scope="module")
def scores(harness: Harness, model: Any) -> Scores:
    return harness.evaluate(model, harness.items("test"))


@pytest.fixture(scope="module")
def reference(tasks_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's own samples of every task, in document order."""
    folder = tmp_path_factory.mktemp("absolute")
    for path in tasks_dir.glob("*.yaml"):  # lm-eval takes relative data files from the current folder
        (folder / path.name).write_text(path.read_text().replace("data/", f"{tasks_dir}/data/"))
    lm = HFLM(pretrained=new_model(), tokenizer=new_tokenizer(), batch_size=7)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0)
    assert found is not None
    return {task: sorted(s, key=lambda one: one["doc_id"]) for task, s in found["samples"].items()}


@pytest.mark.parametrize("task", [task for task in TASKS if task != "text"])
def test_metrics_are_lm_evals(task: str, scores: Scores, reference: dict[str, Any]) -> None:
    metric = "exact_match" if task == "write" else "acc"
    assert scores[task].metric.tolist() == [float(sample[metric]) for sample in reference[task]]


def test_some_answers_are_right_and_some_wrong(scores: Scores) -> None:
    for task in ("first", "fewshot", "choice", "letter", "write"):
        assert 0 < scores[task].mean < 1, task


def test_rolling_likelihood_per_token_is_lm_evals(
    scores: Scores, reference: dict[str, Any], tokenizer: Any
) -> None:
    texts = [sample["arguments"][0][0] for sample in reference["text"]]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert max(lengths) > CONTEXT > min(lengths)  # one window, and several
    expected = [s["resps"][0][0] / n for s, n in zip(reference["text"], lengths, strict=True)]
    np.testing.assert_allclose(scores["text"].metric, expected, atol=SLACK)
    assert scores["text"].smooth is None


@pytest.mark.parametrize("task", ["first", "copy", "fewshot"])
def test_smooth_is_the_geometric_mean_probability(
    task: str, scores: Scores, reference: dict[str, Any]
) -> None:
    tokens = [len(sample["arguments"][0][1].split()) for sample in reference[task]]
    expected = [math.exp(s["resps"][0][0][0] / n) for s, n in zip(reference[task], tokens, strict=True)]
    np.testing.assert_allclose(scores[task].smooth, expected, atol=SLACK)


@pytest.mark.parametrize("task", ["choice", "letter"])
def test_smooth_is_the_right_choices_share(task: str, scores: Scores, reference: dict[str, Any]) -> None:
    expected = []
    for sample in reference[task]:
        odds = np.exp([answer[0][0] for answer in sample["resps"]])
        expected.append(odds[sample["doc"]["gold"]] / odds.sum())
    np.testing.assert_allclose(scores[task].smooth, expected, atol=SLACK)


@pytest.mark.parametrize("task", ["first", "copy", "fewshot", "choice", "letter"])
def test_margins_say_right_or_wrong(task: str, scores: Scores) -> None:
    found = scores[task]
    assert found.margin is not None
    np.testing.assert_array_equal(found.margin > 0, found.metric == 1)
    assert len(np.unique(found.margin)) > len(found.margin) // 2  # not only its sign is told


@pytest.mark.parametrize("task", ["choice", "letter"])
def test_margin_of_a_choice_is_its_lead_over_the_best_other(
    task: str, scores: Scores, reference: dict[str, Any]
) -> None:
    expected = []
    for sample in reference[task]:
        odds = [answer[0][0] for answer in sample["resps"]]
        right = odds.pop(sample["doc"]["gold"])
        expected.append(right - max(odds))
    np.testing.assert_allclose(scores[task].margin, expected, atol=SLACK)


def test_fewshot_prompts_are_lm_evals(harness: Harness, reference: dict[str, Any]) -> None:
    task = next(task for task in harness.items("test").tasks if task.name == "fewshot")
    assert [group[0].args for group in task.groups] == [s["arguments"][0] for s in reference["fewshot"]]


def test_items_are_built_once_and_counted(harness: Harness) -> None:
    items = harness.items("select")
    assert harness.items("select") is items
    assert items.counts == dict.fromkeys(TASKS, ITEMS["select"])
    assert items.total == ITEMS["select"] * len(TASKS)


def test_two_harnesses_give_the_same_bits(harness: Harness, full_suite: Suite, model: Any) -> None:
    first = harness.evaluate(model, harness.items("search"))
    again = harness.evaluate(model, harness.items("search"))
    other = Harness(full_suite, tokenizer=new_tokenizer(), batch_size=16, max_length=None)
    second = other.evaluate(new_model(), other.items("search"))
    assert first.same_as(again)
    assert first.same_as(second)


@pytest.mark.slow  # runs with worker processes end like those without (running/executors)
def test_two_processes_give_the_same_bits(
    harness: Harness, full_suite: Suite, model: Any, tasks_dir: Path, tmp_path: Path
) -> None:
    first = harness.evaluate(model, harness.items("search"))
    (tmp_path / "suite.json").write_text(full_suite.model_dump_json())
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from tests.evaluation.conftest import new_model, new_tokenizer\n"
        "from evomerge.evaluation.harness import Harness\n"
        "from evomerge.evaluation.suite import Suite\n"
        "suite = Suite.model_validate_json(open(sys.argv[1]).read())\n"
        "harness = Harness(suite, tokenizer=new_tokenizer(), batch_size=16, max_length=None)\n"
        "for task in harness.evaluate(new_model(), harness.items('search')):\n"
        "    print(task.metric.tobytes().hex(), task.smooth is not None and task.smooth.tobytes().hex())\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "suite.json")],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [
        f"{task.metric.tobytes().hex()} {task.smooth is not None and task.smooth.tobytes().hex()}"
        for task in first
    ]
    assert done.stdout.splitlines() == expected


def test_no_answer_of_the_previous_model_is_kept(harness: Harness, model: Any, scores: Scores) -> None:
    harness.evaluate(new_model(seed=1), harness.items("test"))
    assert harness.evaluate(model, harness.items("test")).same_as(scores)


def test_global_generators_are_left_alone(harness: Harness, model: Any) -> None:
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    harness.evaluate(model, harness.items("test"))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_nothing_is_printed(full_suite: Suite, model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    harness = Harness(full_suite, tokenizer=new_tokenizer(), batch_size=16, max_length=None)
    harness.evaluate(model, harness.items("select"))
    assert capfd.readouterr() == ("", "")


def test_non_finite_weights_are_an_error_in_likelihood_and_in_generation(
    harness: Harness, make_suite: MakeSuite, tokenizer: Any
) -> None:
    broken = new_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(NonFiniteScores, match="not finite"):
        harness.evaluate(broken, harness.items("select"))
    alone = entry("write", companion="off")
    writes = Harness(make_suite(alone), tokenizer=tokenizer, batch_size=16, max_length=None)
    with pytest.raises(NonFiniteScores, match="on a prompt"):
        writes.evaluate(broken, writes.items("select"))


def test_sampled_generation_is_reproducible(make_suite: MakeSuite, tmp_path: Path, model: Any) -> None:
    config = TASKS["write"] | {
        "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 2, "do_sample": True, "temperature": 1.0},
        "repeats": 3,
    }
    splits = {split: documents("write", split, 10) for split in ITEMS}
    write_task(tmp_path, "sample", config, **splits)
    suite = make_suite(entry("sample", metric="exact_match"), folder=tmp_path)
    harness = Harness(suite, tokenizer=new_tokenizer(), batch_size=4, max_length=None)
    torch.manual_seed(1)
    first = harness.evaluate(model, harness.items("test"))
    torch.manual_seed(2)
    assert harness.evaluate(model, harness.items("test")).same_as(first)


def test_a_filter_can_be_chosen(make_suite: MakeSuite, tmp_path: Path, model: Any) -> None:
    pattern = {"function": "regex", "regex_pattern": "(never)", "fallback": "a"}
    filters = [
        {"name": "plain", "filter": [{"function": "take_first"}]},
        {"name": "always-a", "filter": [pattern, {"function": "take_first"}]},
    ]
    splits = {split: documents("write", split, 20) for split in ITEMS}
    write_task(tmp_path, "pick", TASKS["write"] | {"filter_list": filters}, **splits)

    def metric(name: str) -> list[float]:
        suite = make_suite(entry("pick", metric=name), folder=tmp_path)
        harness = Harness(suite, tokenizer=new_tokenizer(), batch_size=8, max_length=None)
        found: list[float] = harness.evaluate(model, harness.items("test"))["pick"].metric.tolist()
        return found

    expected = [float(doc["letters"][0] == "a") for doc in splits["test"]]
    assert metric("exact_match,always-a") == expected != metric("exact_match")
    with pytest.raises(ConfigError, match="no filter 'alwaysa'") as caught:
        metric("exact_match,alwaysa")
    assert caught.value.fix == "did you mean 'always-a'? Valid: plain, always-a"


DRAWN = {"search": 12, "select": 5, "test": 20}


class TestDrawnSplits:
    def prompts(self, suite: Suite, split: Any, seed: int = 0) -> list[str]:
        harness = Harness(suite, tokenizer=new_tokenizer(), batch_size=8, max_length=None, seed=seed)
        (task,) = harness.items(split).tasks
        return [group[0].doc["prompt"] for group in task.groups]

    def test_are_disjoint_seeded_and_of_the_asked_size(self, make_suite: MakeSuite) -> None:
        suite = make_suite(entry("first", splits=DRAWN))
        drawn = {split: self.prompts(suite, split) for split in DRAWN}
        assert {split: len(prompts) for split, prompts in drawn.items()} == DRAWN
        everything = [prompt for prompts in drawn.values() for prompt in prompts]
        assert len(set(everything)) == len(everything)
        assert set(everything) <= {doc["prompt"] for doc in documents("first", "test", ITEMS["test"])}
        assert self.prompts(suite, "test") == drawn["test"] != self.prompts(suite, "test", seed=1)

    def test_keep_held_out_items_when_more_search_items_are_asked_for(self, make_suite: MakeSuite) -> None:
        more = make_suite(entry("first", splits=DRAWN | {"search": 15}))
        suite = make_suite(entry("first", splits=DRAWN))
        for split in ("select", "test"):
            assert self.prompts(more, split) == self.prompts(suite, split)

    def test_never_draw_equal_items(self, make_suite: MakeSuite, tmp_path: Path) -> None:
        docs = documents("first", "test", 6) * 3
        write_task(tmp_path, "twins", TASKS["first"], test=docs)
        suite = make_suite(entry("twins", splits={"search": 2, "select": 2, "test": 2}), folder=tmp_path)
        drawn = [prompt for split in DRAWN for prompt in self.prompts(suite, split)]
        assert len(set(drawn)) == 6

    def test_too_few_items(self, make_suite: MakeSuite, tokenizer: Any) -> None:
        suite = make_suite(entry("first", splits={"search": 30, "select": 5, "test": 20}))
        with pytest.raises(ConfigError) as caught:
            Harness(suite, tokenizer=tokenizer, batch_size=8, max_length=None)
        assert str(caught.value) == (
            "task 'first' has too few items for its splits\n"
            "  expected: 30 (search) + 5 (select) + 20 (test)\n"
            "  got: 40 different items"
        )

    def test_fewshot_examples_are_never_scored_items(
        self, make_suite: MakeSuite, tmp_path: Path, tokenizer: Any
    ) -> None:
        config = TASKS["fewshot"] | {"fewshot_split": "test"}
        docs = documents("fewshot", "test", 40)
        write_task(tmp_path, "own", config, test=docs)
        suite = make_suite(entry("own", splits=DRAWN), folder=tmp_path)
        harness = Harness(suite, tokenizer=tokenizer, batch_size=8, max_length=None)
        scored = {group[0].doc["prompt"] for s in SPLIT_NAMES for group in harness.items(s).tasks[0].groups}
        shown = {
            shot.rpartition(" = ")[0]
            for split in SPLIT_NAMES
            for group in harness.items(split).tasks[0].groups
            for shot in group[0].args[0].split(" ; ")[:-1]
        }
        assert len(scored) == 37
        assert shown == {doc["prompt"] for doc in docs} - scored  # the three that are left

    def test_no_fewshot_examples_left(self, make_suite: MakeSuite, tmp_path: Path, tokenizer: Any) -> None:
        config = TASKS["fewshot"] | {"fewshot_split": "test"}
        write_task(tmp_path, "own", config, test=documents("fewshot", "test", 38))
        suite = make_suite(entry("own", splits=DRAWN), folder=tmp_path)
        with pytest.raises(ConfigError, match="takes its few-shot examples from the items it is scored on"):
            Harness(suite, tokenizer=tokenizer, batch_size=8, max_length=None)


SPLIT_NAMES: Any = ("search", "select", "test")


class TestErrors:
    """One row per mistake; the whole text is the specification."""

    def text(self, suite: Suite, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            Harness(suite, tokenizer=new_tokenizer(), **({"batch_size": 8, "max_length": None} | options))
        return str(caught.value)

    def test_a_malformed_task_file_is_named(
        self, make_suite: MakeSuite, tasks_dir: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(tasks_dir, tmp_path / "tasks")
        (tmp_path / "tasks" / "other.yaml").write_text("task: other\n{{ x }}: 1\n")
        assert self.text(make_suite(entry("choice"), folder=tmp_path / "tasks")) == (
            f"{tmp_path}/tasks/other.yaml: not valid YAML\n"
            "  got: line 2, column 1: a key is a list or a mapping; in braces, quote it"
        )

    @pytest.mark.parametrize(
        ("template", "what"),
        [
            ("{{ cycler.__init__.__globals__.os.popen('touch FILE').read() }}", "reads '__init__' of a type"),
            (
                "{% for x in lipsum.__globals__.os.popen('touch FILE') %}{% endfor %}",
                "reads '__globals__' of a",
            ),
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "reads '__class__' of a str"),
            ("{{ '{0.__class__}'.format(1) }}", "reads '__class__' of a int"),
            ("{{ 1 | attr('__class__') }}", "reads '__class__' of a int"),
        ],
    )
    def test_a_template_that_could_run_code(
        self, template: str, what: str, make_suite: MakeSuite, tmp_path: Path
    ) -> None:
        """lm-eval's own environment runs the first one and makes the file."""
        text = template.replace("FILE", str(tmp_path / "made"))
        splits = {split: documents("choice", split, 10) for split in ITEMS}
        for field in ("doc_to_text", "doc_to_target"):
            write_task(tmp_path, "choice", TASKS["choice"] | {field: text}, **splits)
            said = self.text(make_suite(entry("choice"), folder=tmp_path))
            assert f"task 'choice': a template {what}" in said
            assert "which could run code" in said
        assert not (tmp_path / "made").exists()

    def test_unknown_task(self, make_suite: MakeSuite, tasks_dir: Path) -> None:
        assert self.text(make_suite(entry("frist", metric="acc"))) == (
            f"suite 'test': there is no task 'frist' in {tasks_dir}, nor among lm-eval's "
            "built-in tasks\n"
            "  do: did you mean 'first'? Valid: choice, copy, fewshot, first, letter, text, write"
        )

    def test_unknown_metric(self, make_suite: MakeSuite) -> None:
        assert self.text(make_suite(entry("choice", metric="acc_nrm"))) == (
            "task 'choice' has no metric 'acc_nrm'\n  do: did you mean 'acc_norm'? Valid: acc, acc_norm"
        )

    def test_unknown_rolling_metric(self, make_suite: MakeSuite) -> None:
        suite = make_suite({"task": "text", "metric": "word_perplexity", "splits": entry("first")["splits"]})
        assert self.text(suite) == "task 'text' has no metric 'word_perplexity'\n  do: Valid: loglikelihood"

    def test_metric_without_items(self, make_suite: MakeSuite, tmp_path: Path) -> None:
        metrics = [*ACC, {"metric": "f1", "aggregation": "f1", "higher_is_better": True}]
        splits = {split: documents("choice", split, 5) for split in ITEMS}
        write_task(tmp_path, "choice", TASKS["choice"] | {"metric_list": metrics}, **splits)
        assert self.text(make_suite(entry("choice", metric="f1"), folder=tmp_path)) == (
            "task 'choice': metric 'f1' has no value for a single item\n  do: use a per-item metric: acc"
        )

    def test_lower_is_better(self, make_suite: MakeSuite, tmp_path: Path) -> None:
        metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]
        splits = {split: documents("first", split, 5) for split in ITEMS}
        write_task(tmp_path, "first", TASKS["first"] | {"metric_list": metrics}, **splits)
        text = self.text(make_suite(entry("first"), folder=tmp_path))
        assert text.startswith("task 'first': lower is better for its metric 'acc'\n")

    def test_retention_of_a_skill_task(self, make_suite: MakeSuite) -> None:
        suite = make_suite(entry("first"), entry("write", role="retention", metric="loglikelihood"))
        assert self.text(suite) == (
            "task 'write' can't measure retention\n"
            "  expected: a task with output_type: loglikelihood_rolling (texts), loglikelihood or "
            "multiple_choice (right answers), or `data` with prompts and answers\n"
            "  got: output_type: generate_until"
        )

    def test_unknown_dataset_split(self, make_suite: MakeSuite) -> None:
        splits = {"search": "serch", "select": "select", "test": "test"}
        assert self.text(make_suite(entry("first", splits=splits))) == (
            "task 'first' has no dataset split 'serch'\n"
            "  do: did you mean 'search'? Valid: search, select, test"
        )

    def test_items_in_two_splits(self, make_suite: MakeSuite, tmp_path: Path) -> None:
        splits = {split: documents("first", split, 5) for split in ITEMS}
        splits["test"].append(splits["search"][2])
        write_task(tmp_path, "first", TASKS["first"], **splits)
        assert self.text(make_suite(entry("first"), folder=tmp_path)) == (
            "task 'first': 1 items are in more than one split\n"
            "  expected: splits without common items, because shared items make held-out scores useless\n"
            f"  got: in search and in test: {splits['search'][2]['prompt']} =\n"
            "  do: remove them from one of the dataset splits, or give numbers of items instead"
        )

    def test_answers_glued_to_prompts(self, make_suite: MakeSuite, tmp_path: Path) -> None:
        splits = {split: documents("first", split, 5) for split in ITEMS}
        write_task(tmp_path, "first", TASKS["first"] | {"doc_to_target": "{{ letters[0] }}"}, **splits)
        text = self.text(make_suite(entry("first"), folder=tmp_path))
        assert text.startswith("task 'first': the answers share tokens with the prompts")
        assert text.endswith("do: start doc_to_target with a space")

    def test_missing_data_file(self, make_suite: MakeSuite, tmp_path: Path) -> None:
        write_task(tmp_path, "first", TASKS["first"], test=documents("first", "test", 5))
        (tmp_path / "data" / "first_test.jsonl").unlink()
        text = self.text(make_suite(entry("first", splits=DRAWN), folder=tmp_path))
        assert text.startswith("task 'first' can't be loaded\n  got: FileNotFoundError: ")

    def test_a_group_is_not_a_task(self, make_suite: MakeSuite, tmp_path: Path) -> None:
        write_task(tmp_path, "first", TASKS["first"], test=documents("first", "test", 5))
        (tmp_path / "both.yaml").write_text("group: both\ntask:\n  - first\n")
        assert self.text(make_suite(entry("both", of="both", metric="acc"), folder=tmp_path)) == (
            "suite 'test': 'both' is a group of tasks\n  expected: the name of one task in `of`\n"
            "  do: write `task: GROUP` without `of`, or list its tasks separately"
        )
        grouped = make_suite(entry("both", metric="exact_match", splits=DRAWN), folder=tmp_path)
        assert [task.task for task in grouped.tasks] == ["first"]

    def test_batch_size(self, make_suite: MakeSuite) -> None:
        assert self.text(make_suite(entry("first")), batch_size=0) == (
            "the batch size must be 1 or more\n  got: 0"
        )

    def test_answer_longer_than_the_context(self, make_suite: MakeSuite, model: Any, tokenizer: Any) -> None:
        harness = Harness(make_suite(entry("copy")), tokenizer=tokenizer, batch_size=8, max_length=6)
        with pytest.raises(ConfigError, match=r"task 'copy' has an answer of \d+ tokens"):
            harness.evaluate(model, harness.items("test"))

    def test_generation_longer_than_the_context(
        self, make_suite: MakeSuite, tmp_path: Path, model: Any, tokenizer: Any
    ) -> None:
        splits = {split: documents("write", split, 5) for split in ITEMS}
        config = TASKS["write"] | {"generation_kwargs": {"until": ["<eos>"]}}
        write_task(tmp_path, "write", config, **splits)
        harness = Harness(
            make_suite(entry("write"), folder=tmp_path), tokenizer=tokenizer, batch_size=8, max_length=None
        )
        with pytest.raises(ConfigError) as caught:
            harness.evaluate(model, harness.items("test"))
        assert str(caught.value) == (
            "task 'write' generates up to 256 tokens, which leaves no room for the prompt\n"
            "  expected: fewer than the model's 24 tokens of context\n"
            "  do: set gen_kwargs: {max_gen_toks: ...} in the suite"
        )


@pytest.mark.slow  # it measures time
def test_few_seconds_are_spent_outside_the_model(make_suite: MakeSuite, tmp_path: Path) -> None:
    """Half a million parameters, 1600 items: 5-8 % measured; the bound leaves room for a noisy machine."""
    for name in ("first", "copy"):
        splits = {split: documents(name, split, 800 if split == "search" else 5) for split in ITEMS}
        write_task(tmp_path, name, TASKS[name], **splits)
    suite = make_suite(entry("first"), entry("copy"), folder=tmp_path)
    harness = Harness(suite, tokenizer=new_tokenizer(), batch_size=256, max_length=None)
    model = new_model()
    config = model.config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 96, 256, 4
    model = type(model)(config).eval()
    items = harness.items("search")
    harness.evaluate(model, items)
    shares = []
    for _ in range(5):
        start = time.perf_counter()
        harness.evaluate(model, items)
        total = time.perf_counter() - start
        shares.append((total - harness.forward_seconds) / harness.forward_seconds)
    assert min(shares) < 0.25, json.dumps(shares)  # others on the machine only add to it


def test_builtin_tasks_are_found_without_indexing_all_of_them() -> None:
    folders = builtin_tasks.folders(["arc_easy", "mmlu_abstract_algebra"])
    assert [Path(folder).parts[-2:] for folder in folders] == [("tasks", "arc"), ("mmlu", "default")]


def test_a_model_that_ignores_positions_is_scored_row_by_row(
    make_suite: MakeSuite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Deaf(transformers.LlamaForCausalLM):
        def forward(  # type: ignore[override]
            self,
            input_ids: Any,
            attention_mask: Any = None,
            position_ids: Any = None,
            use_cache: bool = False,
            **options: Any,
        ) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)

    docs = {split: documents("choice", split, 10) for split in ITEMS}
    long = TASKS["choice"] | {"doc_to_text": "a b c d e f g h a b c d e f g h {{ prompt[:1] }} ="}
    write_task(tmp_path, "long", long, **docs)

    def harness(decided: Sharing | None = None) -> Harness:
        suite = make_suite(entry("long", metric="acc"), folder=tmp_path)
        return Harness(suite, tokenizer=new_tokenizer(), batch_size=8, max_length=None, sharing=decided)

    plain, deaf = new_model(), Deaf(new_model().config).eval()
    deaf.load_state_dict(plain.state_dict())
    sharing, falling_back = harness(), harness()
    with caplog.at_level("INFO", logger="evomerge"):
        sharing.try_out(plain)
        assert not caplog.messages
        falling_back.try_out(deaf)
    assert caplog.messages == ["the model scores shared prefixes differently: every request has its own row"]
    assert sharing.sharing == Sharing(scored=True, generated=False)  # nothing is generated here
    assert falling_back.sharing == Sharing(scored=False, generated=False)
    told, scored = harness(falling_back.sharing), falling_back.evaluate(plain, falling_back.items("test"))
    told.try_out(plain)
    assert told.sharing == falling_back.sharing
    assert told.evaluate(plain, told.items("test")).same_as(scored)
    for mine, other in zip(
        sharing.evaluate(plain, sharing.items("test")),
        falling_back.evaluate(deaf, falling_back.items("test")),
        strict=True,
    ):
        assert mine.smooth is not None
        assert other.smooth is not None
        np.testing.assert_allclose(mine.smooth, other.smooth, atol=1e-5)


def test_a_name_that_no_file_holds_is_refused_without_indexing_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The index of all tasks takes seconds."""
    suite = Suite.model_validate(
        {
            "name": "s",
            "tasks": [{"task": "arc_eazy", "metric": "acc", "splits": {"search": 1, "select": 1, "test": 1}}],
        }
    )
    made: list[Any] = []
    original = tasks_module.lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        tasks_module.lm_eval.tasks, "TaskManager", lambda *a, **k: made.append(k) or original(*a, **k)
    )
    with pytest.raises(ConfigError, match=r"no task 'arc_eazy'(.|\n)*arc_easy"):
        tasks_module.build(suite, lm=None, seed=0)
    assert all(options.get("include_defaults") is False for options in made)
    assert builtin_tasks.mentioned("anli")  # a group


def test_gradients_read_a_prompt_that_choices_share_once(make_suite: MakeSuite, tmp_path: Path) -> None:
    docs = {split: documents("choice", split, 10) for split in ITEMS}
    long = TASKS["choice"] | {"doc_to_text": "a b c d e f g h a b c d e f g h {{ prompt[:1] }} ="}
    write_task(tmp_path, "long", long, **docs)
    suite = make_suite(entry("long", metric="acc"), folder=tmp_path)
    part = SmoothTask(task="long", gain=1.0, items=(0, 3, 7))
    loss = SmoothLoss(tasks=(part,), price=0.0, softness=0.5)
    found = []
    for shared in (True, False):
        model, read = new_model(), 0

        def count(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            nonlocal read
            read += named["input_ids"].numel()

        sharing = Sharing(scored=shared, generated=False)
        harness = Harness(suite, tokenizer=new_tokenizer(), batch_size=8, max_length=None, sharing=sharing)
        with differentiable(model):
            harness.measure(model)
            with model.register_forward_pre_hook(count, with_kwargs=True):
                value, _ = harness.backward(model, "search", loss)
            found.append((read, value, [parameter.grad.clone() for parameter in model.parameters()]))
    (few, value, slopes), (many, expected, wanted) = found
    assert few < many / 2
    assert value == pytest.approx(expected, rel=1e-5)
    for one, other in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
