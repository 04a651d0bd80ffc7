"""Coherence: repetition counted right, and ends told from cut-off answers as a model by itself would show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import ConfigError
from evomerge.evaluation.coherence import RAMBLING, coherence, repetition
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
