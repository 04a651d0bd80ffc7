"""Coherence: repetition counted right, and ends told from cut-off answers as a model by itself would show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import ConfigError
from evomerge.evaluation.coherence import (
    LOOPING,
    OPEN,
    RAMBLING,
    THOUGHTS,
    coherence,
    drift,
    loops,
    repetition,
    thoughts_open,
)
from evomerge.evaluation.harness import Harness
from tests.evaluation.conftest import ITEMS, TASKS, MakeSuite, documents, entry, write_task

LENGTH = 8
FREE = {"role": "coherence", "metric": "coherence"}


@given(st.lists(st.integers(0, 3), max_size=30))
def test_repetition_is_the_share_of_grams_seen_before(tokens: list[int]) -> None:
    seen: set[tuple[int, ...]] = set()
    again = 0
    for i in range(len(tokens) - 3):
        gram = tuple(tokens[i : i + 4])
        again += gram in seen
        seen.add(gram)
    assert repetition(tokens) == pytest.approx(again / max(1, len(tokens) - 3))
    assert 0 <= coherence(tokens, ended=False) <= coherence(tokens, ended=True) <= 1


@pytest.mark.parametrize("stop", ["a", "h"])
def test_a_model_that_writes_freely(
    make_suite: MakeSuite, tmp_path: Path, model: Any, tokenizer: Any, stop: str
) -> None:
    config = TASKS["write"] | {
        "generation_kwargs": {"until": [stop], "max_gen_toks": LENGTH, "do_sample": False}
    }
    splits = {split: documents("write", split, ITEMS[split]) for split in ITEMS}
    write_task(tmp_path, "free", config, **splits)
    suite = make_suite(entry("first"), entry("free", **FREE), folder=_with_first(tmp_path))
    harness = Harness(suite, tokenizer=tokenizer, batch_size=7, max_length=None)
    items = harness.items("test")
    found = harness.evaluate(model, items)["free"]
    assert found.smooth is None
    ends = []
    for document, value in zip(splits["test"], found.metric, strict=True):
        written, ended = _by_hand(model, tokenizer, f"{document['prompt']} =", stop)
        assert value == pytest.approx(coherence(written, ended=ended))
        ends.append(ended)
    assert any(value == 0 or value < 1 for value in found.metric)
    assert any(ends)
    assert not all(ends)
    assert harness.evaluate(model, items)["free"].metric.tolist() == found.metric.tolist()


def _by_hand(model: Any, tokenizer: Any, prompt: str, stop: str) -> tuple[list[int], bool]:
    ids = tokenizer(prompt).input_ids
    written: list[int] = []
    for _ in range(LENGTH):
        with torch.no_grad():
            logits = model(torch.tensor([ids + written])).logits[0, -1]
        token = int(logits.argmax())
        if token in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(stop)):
            return written, True
        written.append(token)
    return [t for t in written if t != tokenizer.unk_token_id], False


def _with_first(folder: Path) -> Path:
    write_task(folder, "first", TASKS["first"], **{s: documents("first", s, 5) for s in ITEMS})
    return folder


def test_only_tasks_that_generate_can_measure_it(make_suite: MakeSuite, tokenizer: Any) -> None:
    suite = make_suite(entry("first"), entry("copy", **FREE))
    with pytest.raises(ConfigError) as caught:
        Harness(suite, tokenizer=tokenizer, batch_size=8, max_length=None)
    assert str(caught.value) == (
        "task 'copy' can't measure coherence\n"
        "  expected: a task with output_type: generate_until\n"
        "  got: output_type: loglikelihood"
    )


def test_running_into_the_limit_halves_it() -> None:
    assert coherence([1, 2, 3], ended=False) == RAMBLING * coherence([1, 2, 3], ended=True)


# Loops, drift, thoughts -----------------------------------------------------------------------------------

ESSAY = list(range(200))


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (ESSAY, False),
        (ESSAY + [7] * 24, True),  # one token
        (ESSAY + [7] * 23, False),  # too short
        (ESSAY + list(range(300, 340)) * 3, True),  # a long phrase
        (list(range(300, 340)) * 3 + ESSAY, True),  # anywhere
        (ESSAY + list(range(300, 340)) * 2, False),  # a phrase may be said twice
        (ESSAY + [*range(300, 340), 1] * 2 + [*range(300, 340), 2], False),  # not exactly the same
        ([], False),
    ],
)
def test_a_phrase_in_a_row_is_a_loop(tokens: list[int], found: bool) -> None:
    assert loops(tokens) is found
    if tokens:
        plain = 1 - repetition(tokens)
        assert coherence(tokens, ended=True) == pytest.approx(plain * (LOOPING if found else 1.0))


@pytest.mark.parametrize(
    ("question", "text", "share"),
    [
        ("What is it?", "It is a cat, 42!", 0.0),
        ("What is it?", "It это", 3 / 5),
        ("Что это?", "Oh no", 1.0),
        ("這是什麼？", "它是 cat", 3 / 5),
        ("日本はどこ？", "東アジアの国", 0.0),  # a Japanese text may be written in all three
        ("這是什麼？", "どこ", 1.0),
        ("Wer?", "Ｆｕｌｌ ²√∫", 0.0),  # full-width letters are Latin, signs are no letters
        ("2 + 2 =", "четыре", 0.0),  # a question without letters has no language
        ("Why?", "42", 0.0),
        ("ما هذا؟", "هذا cat", 3 / 6),
    ],
)
def test_drift_is_the_share_of_letters_in_other_scripts(question: str, text: str, share: float) -> None:
    assert drift(text, question) == pytest.approx(share)
    assert coherence([1, 2], ended=True, drifted=share) == pytest.approx(1 - share)


@pytest.mark.parametrize(("start", "end"), THOUGHTS)
def test_thoughts_that_do_not_end(start: str, end: str) -> None:
    assert thoughts_open(f"{start} let me see")
    assert not thoughts_open(f"{start} let me see {end} 42")
    assert thoughts_open(f"{start} {end} 42 {start} wait")
    assert not thoughts_open("42")
    assert not thoughts_open(f"{start} let me see <stop> 42", "<stop>")
    assert coherence([1, 2], ended=True, thinking=True) == OPEN


@given(st.lists(st.integers(0, 2), max_size=80), st.booleans(), st.floats(0, 1), st.booleans())
def test_coherence_is_between_0_and_1(tokens: list[int], ended: bool, drifted: float, thinking: bool) -> None:
    assert 0 <= coherence(tokens, ended=ended, drifted=drifted, thinking=thinking) <= 1


@pytest.mark.parametrize(("begin", "factor"), [("", 1.0), ("<think> ", OPEN), ("<think> </think> ", 1.0)])
def test_the_harness_sees_thoughts_that_the_prompt_begins(
    make_suite: MakeSuite, tmp_path: Path, model: Any, tokenizer: Any, begin: str, factor: float
) -> None:
    config = TASKS["write"] | {"doc_to_text": "{{ prompt }} = " + begin + "="}
    splits = {split: documents("write", split, ITEMS[split]) for split in ITEMS}
    write_task(tmp_path, "free", config, **splits)
    suite = make_suite(entry("first"), entry("free", **FREE), folder=_with_first(tmp_path))
    harness = Harness(suite, tokenizer=tokenizer, batch_size=7, max_length=None)
    found = harness.evaluate(model, harness.items("test"))["free"].metric
    assert set(found) <= {0.0, factor, factor * RAMBLING}
    assert found.max() > 0
