"""Companions: likelihoods of right answers beside generated ones, and only where the answers are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evomerge.errors import ConfigError
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.scores import SPLITS, Scores
from evomerge.evaluation.sharing import Sharing
from evomerge.evaluation.smooth_loss import SmoothLoss, SmoothTask
from evomerge.evaluation.suite import Suite

from .conftest import EXACT, ITEMS, TASKS, MakeSuite, documents, entry, write_task

CHAT = (
    "{% for m in messages %}{{ m['content'] }} ; {% endfor %}"
    + "{% if add_generation_prompt %}{{ 'x ' }}{% endif %}"
)


def harness_of(suite: Suite, tokenizer: Any, **options: Any) -> Harness:
    return Harness(suite, tokenizer=tokenizer, batch_size=8, max_length=None, **options)


def scored(suite: Suite, tokenizer: Any, model: Any) -> Scores:
    harness = harness_of(suite, tokenizer)
    return harness.evaluate(model, harness.items("search"))


def folder_of(tmp_path: Path, *, docs: str = "write", **changes: Any) -> Path:
    """Write the task `write` with changes, and `first`, which asks the same with likelihoods."""
    for name, config in (("write", TASKS["write"] | changes), ("first", TASKS["first"])):
        write_task(tmp_path, name, config, **{s: documents(docs, s, n) for s, n in ITEMS.items()})
    return tmp_path


def test_it_is_what_a_likelihood_task_of_the_same_items_has(
    make_suite: MakeSuite, tmp_path: Path, tokenizer: Any, model: Any
) -> None:
    suite = make_suite(entry("write"), entry("first"), folder=folder_of(tmp_path))
    found = scored(suite, tokenizer, model)
    for name in ("smooth", "margin"):  # scored in other passes: with the prompts that are continued
        np.testing.assert_allclose(getattr(found["write"], name), getattr(found["first"], name), rtol=1e-4)
    assert found["write"].tokens is not None
    assert found["write"].margin is not None
    # An answer of one token is right exactly where the right token leads.
    np.testing.assert_array_equal(found["write"].margin > 0, found["write"].metric == 1)


def test_it_is_scored_while_the_prompt_is_read(make_suite: MakeSuite, tokenizer: Any, model: Any) -> None:
    suite = make_suite(entry("write"), entry("write") | {"task": "again", "of": "write"})

    def found(sharing: Sharing | None) -> tuple[Scores, int, Sharing]:
        harness = harness_of(suite, tokenizer, sharing=sharing)
        if sharing is None:
            harness.try_out(model)
        read = 0

        def count(module: Any, arguments: Any, named: dict[str, Any]) -> None:
            nonlocal read
            read += named["input_ids"].numel()

        with model.register_forward_pre_hook(count, with_kwargs=True):
            return harness.evaluate(model, harness.items("search")), read, harness.sharing

    together, few, decided = found(None)
    assert decided.companions
    apart, many, _ = found(Sharing(scored=True, generated=True))  # as runs that were stored before decided
    for task in ("write", "again"):
        for name in ("smooth", "margin"):
            np.testing.assert_allclose(getattr(together[task], name), getattr(apart[task], name), rtol=1e-4)
        np.testing.assert_array_equal(together[task].metric, apart[task].metric)
    assert few < many
    assert not Sharing.of_run({"scored": True, "generated": True}).companions


def test_nothing_is_decided_by_it_on_test(make_suite: MakeSuite, tokenizer: Any, model: Any) -> None:
    harness = harness_of(make_suite(entry("write")), tokenizer)
    with_companions = {
        split: harness.evaluate(model, harness.items(split))["write"].margin is not None for split in SPLITS
    }
    assert with_companions == {"search": True, "select": True, "test": False}


def test_blocks_and_a_twin_that_is_only_reported(make_suite: MakeSuite, tokenizer: Any, model: Any) -> None:
    suite = make_suite(entry("write"), entry("write") | {"task": "again", "of": "write", "weight": 0})
    whole = scored(suite, tokenizer, model)
    assert whole["again"].metric.tolist() == whole["write"].metric.tolist()
    assert whole["again"].smooth is None
    cut = harness_of(suite, tokenizer, blocks=3)
    parts = cut.evaluate_split(model, "search")
    assert parts["write"].smooth is not None
    assert whole["write"].smooth is not None
    np.testing.assert_allclose(np.sort(parts["write"].smooth), np.sort(whole["write"].smooth), rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"doc_to_target": "{{ letters[0] }} {{ letters[1] }}"},  # longer than an answer may be
        {"doc_to_target": "{{ 'a' if letters[0] == 'a' else '' }}"},  # some items have no answer
        {"filter_list": [{"name": "f", "filter": [{"function": "regex", "regex_pattern": "(never)"}]}]},
    ],
    ids=["too long", "none", "filtered away"],
)
def test_a_gold_answer_that_is_not_right_is_no_companion(
    make_suite: MakeSuite, tmp_path: Path, tokenizer: Any, model: Any, changes: dict[str, Any]
) -> None:
    suite = make_suite(entry("write"), folder=folder_of(tmp_path, **changes))
    found = scored(suite, tokenizer, model)["write"]
    assert found.smooth is None
    assert found.margin is None


@pytest.mark.parametrize(
    "keys", [{"companion": "off"}, {"companion": False}, {"weight": 0}, {"think_end_token": "x"}]
)
def test_tasks_without_one(make_suite: MakeSuite, tokenizer: Any, model: Any, keys: dict[str, Any]) -> None:
    found = scored(make_suite(entry("first"), entry("write", **keys)), tokenizer, model)
    assert found["write"].smooth is None
    assert found["first"].smooth is not None


def test_coherence_tasks_have_none(make_suite: MakeSuite, tokenizer: Any, model: Any) -> None:
    free = entry("write", role="coherence", metric="coherence")
    assert scored(make_suite(entry("first"), free), tokenizer, model)["write"].smooth is None


def test_a_filter_may_take_the_answer_from_the_gold_text(
    make_suite: MakeSuite, tmp_path: Path, tokenizer: Any, model: Any
) -> None:
    """As in GSM8K: the gold text is a solution, of which filter and metric see the last part only."""
    steps = [{"function": "regex", "regex_pattern": "= ([a-h])"}, {"function": "take_first"}]
    changes = {
        "doc_to_target": "{{ letters[1] }} = {{ letters[0] }}",
        "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 3, "do_sample": False},
        "filter_list": [{"name": "last", "filter": steps}],
        "metric_list": [EXACT[0] | {"regexes_to_ignore": [".*= "]}],
    }
    folder = folder_of(tmp_path, **changes)
    suite = make_suite(entry("write"), folder=folder)
    harness = harness_of(suite, tokenizer)
    (task,) = harness.items("search").tasks
    assert {len(continuation) for _, continuation in task.pairs} == {3}
    assert harness.evaluate(model, harness.items("search"))["write"].smooth is not None


SEVERAL_RIGHT: dict[str, Any] = {
    "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 3, "do_sample": False},
    "metric_list": [EXACT[0] | {"regexes_to_ignore": ["; "]}],
}
"""Changes of a task so that an answer is also right after a semicolon."""


def followed(harness: Harness, tokenizer: Any) -> dict[str, str]:
    """Return prompt -> the answer whose likelihood is taken, over all blocks of `search`."""
    tasks = [harness.items("search", block).tasks[0] for block in range(harness.blocks("search"))]
    return {
        group[0].args[0]: tokenizer.decode(continuation)
        for task in tasks
        for group, (_, continuation) in zip(task.groups, task.pairs, strict=True)
    }


def test_it_follows_answers_that_were_given(make_suite: MakeSuite, tmp_path: Path, tokenizer: Any) -> None:
    suite = make_suite(entry("write"), folder=folder_of(tmp_path, **SEVERAL_RIGHT))
    (task,) = harness_of(suite, tokenizer).items("search").tasks
    gold = [group[0].doc["letters"][0] for group in task.groups]
    answers = [f"; {letter}" if item % 2 else None for item, letter in enumerate(gold)]
    expected = {
        group[0].args[0]: answer or letter
        for group, answer, letter in zip(task.groups, answers, gold, strict=True)
    }
    for blocks in (1, 3):
        harness = harness_of(suite, tokenizer, blocks=blocks, answers={"write": answers})
        assert followed(harness, tokenizer) == expected
        (selected,) = harness.items("select").tasks
        assert {len(continuation) for _, continuation in selected.pairs} == {1}  # gold


def test_an_answer_that_is_not_right_leaves_the_gold_targets(
    make_suite: MakeSuite, tmp_path: Path, tokenizer: Any
) -> None:
    suite = make_suite(entry("write"), folder=folder_of(tmp_path, **SEVERAL_RIGHT))
    answers = ["; ; ; a", *[None] * (ITEMS["search"] - 1)]  # too long: its end would not be generated
    answered = followed(harness_of(suite, tokenizer, answers={"write": answers}), tokenizer)
    assert answered == followed(harness_of(suite, tokenizer), tokenizer)


def test_answers_serve_where_a_gold_text_is_not_right(
    make_suite: MakeSuite, tmp_path: Path, tokenizer: Any, model: Any
) -> None:
    """As where the gold text is longer than an answer may be."""
    longer = {"doc_to_target": "{{ '; ; ; ; ' + letters[0] }}"}
    suite = make_suite(entry("write"), folder=folder_of(tmp_path, **(SEVERAL_RIGHT | longer)))
    harness = harness_of(suite, tokenizer)
    (task,) = harness.items("search").tasks
    assert not task.pairs
    answers = {"write": [group[0].doc["letters"][0] for group in task.groups]}
    harness = harness_of(suite, tokenizer, answers=answers)
    assert harness.evaluate(model, harness.items("search"))["write"].margin is not None


@pytest.mark.parametrize(
    ("changes", "keys", "expected"),
    [
        ({"target_delimiter": " ; "}, {}, " ; "),
        ({"target_delimiter": " ; "}, {"chat_template": CHAT}, ""),
        ({"target_delimiter": " ; ", "gen_prefix": "="}, {}, " "),
    ],
    ids=["plain", "template", "prefix"],
)
def test_the_answer_follows_the_prompt_as_in_an_example(
    make_suite: MakeSuite,
    tmp_path: Path,
    tokenizer: Any,
    changes: dict[str, Any],
    keys: dict[str, Any],
    expected: str,
) -> None:
    ignoring = {"metric_list": [EXACT[0] | {"regexes_to_ignore": ["; "]}]}
    longer = {"generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 3, "do_sample": False}}
    folder = folder_of(tmp_path, **(changes | ignoring | longer))
    (task,) = harness_of(make_suite(entry("write", **keys), folder=folder), tokenizer).items("search").tasks
    for (request,), (context, continuation) in zip(task.groups, task.pairs, strict=True):
        text = request.args[0] + expected + request.doc["letters"][0]
        assert context + continuation == tokenizer(text)["input_ids"]
        assert context == tokenizer(request.args[0])["input_ids"]


def test_it_has_a_gradient(make_suite: MakeSuite, tmp_path: Path, tokenizer: Any, model: Any) -> None:
    from evomerge.evaluation.gradient import differentiable

    suite = make_suite(entry("write"), entry("first"), folder=folder_of(tmp_path))
    harness = harness_of(suite, tokenizer)
    found = harness.evaluate(model, harness.items("search"))

    def of(task: str) -> tuple[float, float]:
        part = SmoothTask(task=task, gain=1.0, items=tuple(range(ITEMS["search"])))
        with differentiable(model):
            loss, _ = harness.backward(model, "search", SmoothLoss(tasks=(part,), price=0.0, softness=1.0))
            return loss, float(model.lm_head.weight.grad.abs().sum())

    value, slope = of("write")
    assert found["write"].margin is not None
    assert value == pytest.approx(-np.mean(1 / (1 + np.exp(-found["write"].margin))), rel=1e-5)
    assert slope > 0
    assert (value, slope) == pytest.approx(of("first"))


def test_the_key_says_something_about_generated_answers_only(make_suite: MakeSuite, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="companion is about generated answers"):
        harness_of(make_suite(entry("first", companion="off")), tokenizer)


def test_a_suite_without_the_key_stored_before_there_was_one_has_none(make_suite: MakeSuite) -> None:
    suite = make_suite(entry("write"))
    data = suite.model_dump(mode="json")
    assert Suite.from_store(data, "store").companion == "auto"
    del data["companion"]
    before = Suite.from_store(data, "store")
    assert before.companion == "off"
    assert suite.as_stored(data).digest() == before.digest() != suite.digest()


def test_the_specialist_whose_answers_are_followed_must_be_named(make_suite: MakeSuite) -> None:
    with pytest.raises(ConfigError, match="`companion: specialist`, but it names no `specialist`"):
        make_suite(entry("write", companion="specialist"))
    suite = make_suite(entry("write"), entry("write") | {"task": "b", "of": "write", "specialist": "p"})
    of_all = suite.model_copy(update={"companion": "specialist"})
    assert of_all.asking("b").companion == "specialist"


def chatml() -> Any:
    """A tokenizer of bytes, whose template ends prompts with a line break."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=letters, chat_template=template, **tokens)


@pytest.mark.parametrize(
    ("answer", "keys"),
    [
        ("2021-03-09", {"metric": "exact"}),
        ("2021-03-09", {"metric": "exact", "gen_kwargs": {"until": ["\n\n", "\n"], "max_gen_toks": 10}}),
        ('[{"name": "call", "arguments": {"to": "Ines"}}]', {"metric": "json"}),
    ],
    ids=["until a line break", "no token more", "a JSON list"],
)
def test_a_template_that_ends_with_a_line_break_has_companions(
    tmp_path: Path, answer: str, keys: dict[str, Any]
) -> None:
    rows = [{"ask": f"question {number}", "reply": answer} for number in range(12)]
    (tmp_path / "own.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    splits = {"search": 4, "select": 4, "test": 4}
    task = {"data": "own.jsonl", "prompt": "ask", "answer": "reply", "splits": splits, **keys}
    suite = Suite.from_mapping({"name": "own", "tasks": [task]}, folder=tmp_path, where="suite.yaml")
    tokenizer = chatml()
    harness = harness_of(suite, tokenizer)
    (task_items,) = harness.items("search").tasks
    assert len(task_items.pairs) == 4
    assert {tokenizer.decode(answer_tokens) for _, answer_tokens in task_items.pairs} == {f"\n{answer}"}
    (shown,) = harness.examples()
    assert "".join(shown.answer) == answer


def test_a_target_in_square_brackets_can_be_one_answer(
    make_suite: MakeSuite, tmp_path: Path, tokenizer: Any
) -> None:
    """lm-eval reads it as a list of right answers."""
    quoted = {"doc_to_target": "{{ [letters[0], letters[0]] }}"}
    suite = make_suite(entry("write"), folder=folder_of(tmp_path, **quoted))
    (task,) = harness_of(suite, tokenizer).items("search").tasks
    assert {len(answer) for _, answer in task.pairs} == {1}  # the first of two right answers
