"""How models are asked: the keys of a suite, chat templates, reasoning, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers

from evomerge.errors import ConfigError
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.suite import Suite

from . import parity

FILE = "[{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}]"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parity.write_tasks(tmp_path_factory.mktemp("asking") / "tasks")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return parity.new_tokenizer()


def suite(tasks: Path, *entries: Mapping[str, Any], **keys: Any) -> Suite:
    rows = [{"metric": "acc", "splits": parity.NAMED, **entry} for entry in entries]
    data = {"name": "s", "tasks_dir": str(tasks), "tasks": rows, **keys}
    return Suite.from_mapping(data, folder=tasks.parent, where="suite.yaml")


def asked(suite: Suite, tokenizer: Any, **options: Any) -> Harness:
    return Harness(suite, tokenizer=tokenizer, **{"batch_size": 4, "max_length": None, **options})


def prompt(suite: Suite, tokenizer: Any, task: int = 0) -> str:
    return str(asked(suite, tokenizer).items("test").tasks[task].groups[0][0].args[0])


def refused(suite: Suite, tokenizer: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        asked(suite, tokenizer)
    return str(caught.value)


CHOICE = {"task": "choice"}


def several(**templates: str) -> Any:
    tokenizer = parity.new_tokenizer()
    tokenizer.chat_template = templates
    return tokenizer


class TestTemplates:
    def test_auto_is_the_tokenizers_own_or_none(self, tasks: Path, tokenizer: Any) -> None:
        plain = parity.new_tokenizer()
        plain.chat_template = None
        assert prompt(suite(tasks, CHOICE), tokenizer).startswith("<s><|user|>\nQuestion: test 0")
        off = prompt(suite(tasks, CHOICE, chat_template="off"), tokenizer)
        assert off.startswith("Question: test 0")
        assert prompt(suite(tasks, CHOICE), plain) == off

    def test_a_task_overrides_its_suite(self, tasks: Path, tokenizer: Any) -> None:
        own = suite(tasks, CHOICE, {"task": "likely", "chat_template": "off"}, system_prompt="Be brief.")
        assert prompt(own, tokenizer).startswith("<s><|system|>\nBe brief.</s>\n<|user|>\n")
        assert prompt(own, tokenizer, 1).startswith("Be brief.test 0")

    def test_a_file_beside_the_suite_is_part_of_it(self, tasks: Path, tokenizer: Any) -> None:
        path = tasks.parent / "own.jinja"
        path.write_text(FILE)
        own = suite(tasks, CHOICE, chat_template="own.jinja")
        path.write_text(FILE.replace("[", "<"))
        other = suite(tasks, CHOICE, chat_template="own.jinja")
        path.unlink()
        assert prompt(own, tokenizer).startswith("[user: Question: test 0")
        assert prompt(other, tokenizer).startswith("<user: Question: test 0")
        assert own.digest() != other.digest()
        stored = Suite.from_store(own.model_dump(mode="json"), "store")
        assert stored.chat_template == FILE

    def test_a_name_picks_one_of_several(self, tasks: Path) -> None:
        tokenizer = several(default=parity.TEMPLATE, tools=FILE)
        assert prompt(suite(tasks, CHOICE, chat_template="tools"), tokenizer).startswith("[user: ")
        assert prompt(suite(tasks, CHOICE), tokenizer).startswith("<s><|user|>")

    @pytest.mark.parametrize(
        ("choice", "templates", "message"),
        [
            ("tool", {"tools": FILE}, "there is no chat template 'tool'"),
            ("default", {}, "there is no chat template 'default'"),
            ("auto", {"a": FILE, "b": FILE}, "several chat templates and none is its default"),
            ("{{ messages[0].__class__ }", {}, "can't build its requests"),
            ("{{ raise_exception('no') }}", {}, "can't build its requests"),
            ("{{ messages.__class__.__mro__ }}", {}, "can't build its requests"),
        ],
    )
    def test_one_that_can_not_be_used(
        self, choice: str, templates: dict[str, str], message: str, tasks: Path
    ) -> None:
        assert message in refused(suite(tasks, CHOICE, chat_template=choice), several(**templates))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("none.jinja", None, "chat_template: the file can't be read"),
            ("folder/none", None, "chat_template: the file can't be read"),
            ("plain.jinja", "no template", "chat_template: not a jinja template"),
        ],
    )
    def test_a_file_that_can_not_be_used(
        self, name: str, content: str | None, message: str, tasks: Path
    ) -> None:
        if content is not None:
            (tasks.parent / name).write_text(content)
        for keys, entry in (({"chat_template": name}, CHOICE), ({}, {**CHOICE, "chat_template": name})):
            with pytest.raises(ConfigError, match=message):
                suite(tasks, entry, **keys)

    def test_a_system_prompt_is_never_dropped(self, tasks: Path, tokenizer: Any) -> None:
        strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + FILE
        own = suite(tasks, CHOICE, chat_template=strict, system_prompt="Be brief.")
        assert "task 'choice': the chat template refuses a system prompt" in refused(own, tokenizer)


WRITE = {"task": "write", "metric": "exact_match"}


class TestKeys:
    def test_examples_description_and_generation(self, tasks: Path, tokenizer: Any) -> None:
        own = suite(
            tasks,
            {**WRITE, "num_fewshot": 1, "gen_kwargs": {"max_gen_toks": 3}, "description": "Words."},
            gen_kwargs={"max_gen_toks": 9, "until": ["x"]},
            fewshot_as_multiturn=False,
        )
        text, options = asked(own, tokenizer).items("test").tasks[0].groups[0][0].args
        assert text.startswith("<s><|system|>\nWords.</s>\n<|user|>\ntrain ")
        assert text.count("<|user|>") == text.count("<|assistant|>") == 1
        assert options == {"until": ["x"], "max_gen_toks": 3, "do_sample": False}

    def test_a_tasks_own_key_counts_even_where_its_file_says_zero(self, tasks: Path, tokenizer: Any) -> None:
        zero = {"task": "choice_never_shots"}
        assert "train" not in prompt(suite(tasks, zero, num_fewshot=2), tokenizer)
        assert "train" in prompt(suite(tasks, {**zero, "num_fewshot": 2}), tokenizer)

    def test_filters_replace_those_of_the_task(self, tasks: Path, tokenizer: Any) -> None:
        filters = [
            {"name": "up", "filter": [{"function": "uppercase"}, {"function": "take_first"}]},
            {"name": "own", "filter": [{"function": "take_first"}]},
        ]
        entry = {**WRITE, "metric": "exact_match,own", "filters": filters}
        (task,) = asked(suite(tasks, entry), tokenizer).items("test").tasks
        assert [pipeline.name for pipeline in task.task._filters] == ["up", "own"]

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({**WRITE, "filters": [{"name": "a", "filter": [{"function": "upper"}]}]}, "no function 'upper'"),
            (
                {**WRITE, "filters": [{"name": "a", "filter": [{"function": "custom"}]}]},
                "no function 'custom'",
            ),
            (
                {**WRITE, "filters": [{"name": "a", "filter": [{"function": "regex", "x": 1}]}]},
                "can't be made",
            ),
            ({**CHOICE, "gen_kwargs": {"max_gen_toks": 3}}, "gen_kwargs is about generated answers"),
            (
                {**CHOICE, "enable_thinking": True, "think_end_token": "x"},
                "scores given answers, before which a model can't reason",
            ),
            ({**CHOICE, "metric": "acc_nrm"}, "has no metric 'acc_nrm'"),
        ],
    )
    def test_what_a_task_can_not_do(
        self, entry: dict[str, Any], message: str, tasks: Path, tokenizer: Any
    ) -> None:
        assert message in refused(suite(tasks, entry), tokenizer)

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"enable_thinking": True}, "enable_thinking needs think_end_token"),
            (
                {"chat_template": "off", "enable_thinking": True, "think_end_token": "x"},
                "enable_thinking is an argument of the chat template, which is off",
            ),
            ({"chat_template": False, "fewshot_as_multiturn": True}, "needs a chat template, which is off"),
            ({"num_fewshot": -1}, "num_fewshot"),
            ({"gen_kwargs": {"custom_generate": "x"}}, "unknown key 'gen_kwargs.custom_generate'"),
            ({"filters": []}, "at least one filter"),
            ({"long_prompts": "keep"}, "long_prompts"),
        ],
    )
    def test_contradictions(self, keys: dict[str, Any], message: str, tasks: Path) -> None:
        with pytest.raises(ConfigError, match=message):
            suite(tasks, WRITE, **keys)

    def test_thinking_without_a_template(self, tasks: Path) -> None:
        plain = parity.new_tokenizer()
        plain.chat_template = None
        own = suite(tasks, WRITE, enable_thinking=True, think_end_token="x")
        assert "but the tokenizer has none" in refused(own, plain)


class TestTwice:
    """A task that stands twice in a suite, with another metric, is computed once."""

    def test_the_model_sees_its_items_once(self, tasks: Path, tokenizer: Any, tmp_path: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(parity.write_model(tmp_path / "model"))
        calls: list[int] = []
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        norm = {"task": "norm", "of": "choice", "metric": "acc_norm"}
        off = {"companion": "off"}
        letters = {"task": "letters", "metric": "exact_match,own", **off}
        raw = {"task": "raw", "of": "letters", "metric": "exact_match,raw", **off}
        seen = {}
        for rows in ((CHOICE, letters), (CHOICE, norm, letters, raw)):
            harness = asked(suite(tasks, *rows), tokenizer)
            calls.clear()
            scores = harness.evaluate(model, harness.items("test"))
            seen[len(rows)] = (
                len(calls),
                [(s.task, s.metric.tolist()) for s in scores if s.task in ("choice", "letters")],
            )
        assert seen[2] == seen[4]

    def test_it_is_cut_into_the_same_blocks(self, tasks: Path, tokenizer: Any) -> None:
        rows = (CHOICE, {"task": "norm", "of": "choice", "metric": "acc_norm"})
        harness = asked(suite(tasks, *rows), tokenizer, blocks=3)
        for block in range(3):
            one, other = harness.items("search", block).tasks
            assert [group[0].args for group in one.groups] == [group[0].args for group in other.groups]


class TestLongPrompts:
    def config(self, length: int) -> Any:
        return transformers.LlamaConfig(max_position_embeddings=length)

    @pytest.mark.parametrize(
        "entry", [{"task": "choice_long"}, {"task": "write_long", "metric": "exact_match"}]
    )
    def test_are_refused_or_cut(self, entry: dict[str, Any], tasks: Path, tokenizer: Any) -> None:
        with pytest.raises(
            ConfigError, match=r"item \d of search is longer than the model's context"
        ) as caught:
            asked(suite(tasks, entry), tokenizer).prepare(self.config(parity.CONTEXT))
        assert "long_prompts: cut" in str(caught.value.fix)
        asked(suite(tasks, entry, long_prompts="cut"), tokenizer).prepare(self.config(parity.CONTEXT))
        asked(suite(tasks, entry), tokenizer).prepare(self.config(100_000))

    def test_no_room_for_an_answer(self, tasks: Path, tokenizer: Any) -> None:
        own = suite(tasks, WRITE, gen_kwargs={"max_gen_toks": 500})
        with pytest.raises(ConfigError, match="leaves no room for the prompt"):
            asked(own, tokenizer).prepare(self.config(parity.CONTEXT))


class TestBefore:
    """Suites and runs from before a suite could say how models are asked."""

    def test_a_stored_suite_without_the_key_reads_as_off(self, tasks: Path) -> None:
        stored = suite(tasks, CHOICE).model_dump(mode="json")
        del stored["chat_template"], stored["long_prompts"]
        read = Suite.from_store(stored, "store")
        assert (read.chat_template, read.long_prompts) == ("off", "cut")

    def test_a_file_goes_on_as_its_run_began(self, tasks: Path) -> None:
        new = suite(tasks, CHOICE)
        explicit = suite(tasks, CHOICE, chat_template="auto")
        before: dict[str, Any] = {"name": "s", "tasks": []}
        assert new.as_stored(before).chat_template == "off"
        assert explicit.as_stored(before).chat_template == "auto"
        assert new.as_stored(new.model_dump()).chat_template == "auto"

    def test_the_demo_keeps_its_digest_without_a_template(self) -> None:
        old = "baca227d0185b926a3de206db5e8eeb4df7da9fead2b3ccc8ea378fa71add203"
        assert Suite.load("demo").as_stored({}).digest(like=old) == old


def test_examples_show_special_tokens_and_the_answers_tokens(tasks: Path, tokenizer: Any) -> None:
    rows = (
        CHOICE,
        {"task": "likely_bytes"},
        WRITE,
        {"task": "rolling", "role": "retention", "metric": "loglikelihood"},
    )
    choice, likely, write, rolling = asked(suite(tasks, *rows), tokenizer).examples()
    assert choice.prompt.startswith("<s><|user|>")
    assert "<|assistant|>" in choice.prompt
    assert any(token.startswith("<0x") for token in likely.answer)
    assert (write.limit, write.until) == (8, ("\n\n",))
    assert rolling.prompt == "<s>"
    assert rolling.prompt_tokens == 1
