"""One prebuilt pass gives HFLM's log-likelihoods; batches depend on the pairs and the batch size only."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evomerge.errors import ConfigError
from evomerge.evaluation.likelihood import Plan, plan
from evomerge.evaluation.live_lm import LiveLM
from evomerge.evaluation.scores import NonFiniteScores
from tests.examples import examples
from tests.rounding import of_log_likelihoods

from .conftest import CONTEXT, new_model, new_tokenizer

MODEL = new_model()
TOKENIZER = new_tokenizer()
VOCABULARY = MODEL.config.vocab_size
SLACK = of_log_likelihoods(MODEL, tokens=CONTEXT)

token = st.integers(1, VOCABULARY - 1)
pair = st.tuples(st.lists(token, min_size=1, max_size=30), st.lists(token, min_size=1, max_size=CONTEXT))
pairs_of_any_kind = st.lists(pair, min_size=1, max_size=12)


def lay(pairs: Any, batch_size: int = 4, max_length: int = CONTEXT) -> Plan:
    return plan(pairs, batch_size=batch_size, max_length=max_length, names=["t"] * len(pairs))


def hflm(model: Any = MODEL, **options: Any) -> Any:
    return HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=3, **options)


class Uniform:
    """A model that finds all tokens alike."""

    device = torch.device("cpu")

    def __call__(self, *, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))


@settings(max_examples=examples(40), deadline=None)
@given(pairs_of_any_kind, st.integers(1, 5))
def test_equals_hflm_for_any_tokens(pairs: list[tuple[list[int], list[int]]], batch_size: int) -> None:
    found = lay(pairs, batch_size).score(MODEL)
    requests = [(("", ""), context, continuation) for context, continuation in pairs]
    expected = hflm()._loglikelihood_tokens(requests, disable_tqdm=True)
    np.testing.assert_allclose(found.ll, [ll for ll, _ in expected], rtol=0, atol=SLACK)
    assert found.greedy.tolist() == [greedy for _, greedy in expected]


REQUESTS = [
    ("x a b c =", " a"),
    ("x a b c = ", "b c"),  # a trailing space moves to the answer
    ("", "a b c"),  # no context: a prefix token takes its place
    ("", "<eos> a b"),  # the text begins with that prefix token
    ("a b c d e f g h " * 5, "a b"),  # too long: cut from the left
]


@pytest.mark.parametrize("max_length", [None, 8])
def test_equals_hflm_from_text_to_numbers(max_length: int | None) -> None:
    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0) for arguments in REQUESTS
    ]
    lm = LiveLM(TOKENIZER, batch_size=2, max_length=max_length)
    found = lay(lm.pairs(instances), 2, max_length or CONTEXT).score(MODEL)
    expected = hflm(max_length=max_length).loglikelihood(instances, disable_tqdm=True)
    np.testing.assert_allclose(found.ll, [ll for ll, _ in expected], rtol=0, atol=SLACK)
    assert found.greedy.tolist() == [greedy for _, greedy in expected]


def test_greedy_answers_are_recognised() -> None:
    context = [4, 5, 6]
    with torch.no_grad():
        best = MODEL.generate(
            torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    answer = best[0, 3:].tolist()
    wrong = [*answer[:2], (answer[2] + 1) % VOCABULARY]
    assert lay([(context, answer), (context, wrong)]).score(MODEL).greedy.tolist() == [True, False]


def test_bfloat16_models_are_read_in_float32() -> None:
    model = new_model(dtype=torch.bfloat16)
    pairs = [([4, 5, 6], [7, 8, 9]), ([4], [5, 6])]
    requests = [(("", ""), context, continuation) for context, continuation in pairs]
    expected = hflm(model, softmax_dtype="float32")._loglikelihood_tokens(requests, disable_tqdm=True)
    np.testing.assert_allclose(lay(pairs).score(model).ll, [ll for ll, _ in expected], rtol=0, atol=SLACK)


def test_a_uniform_model() -> None:
    found = lay([([1], [2]), ([1, 2], [3, 4, 5])]).score(Uniform())
    np.testing.assert_allclose(found.ll, [-math.log(VOCABULARY), -3 * math.log(VOCABULARY)], rtol=1e-6)
    assert found.greedy.tolist() == [False, False]  # the arg-max of equals is token 0


def test_a_model_that_cannot_trim_its_logits_scores_the_same() -> None:
    class Plain:
        device = MODEL.device

        def __call__(self, *, input_ids: torch.Tensor) -> Any:
            return MODEL(input_ids=input_ids)

    pairs = [([4, 5, 6], [7, 8]), ([4], [5, 6, 7, 8]), ([9], [1])]
    np.testing.assert_allclose(lay(pairs).score(Plain()).ll, lay(pairs).score(MODEL).ll, atol=SLACK)


def test_equal_inputs_are_computed_once() -> None:
    found = lay([([1, 2], [choice]) for choice in (3, 4, 5, 6)], batch_size=8)
    assert [batch.ids.tolist() for batch in found.batches] == [[[1, 2]]]
    assert found.batches[0].gold.tolist() == [3, 4, 5, 6]


@settings(max_examples=examples(40), deadline=None)
@given(pairs_of_any_kind, st.integers(1, 5), st.randoms(use_true_random=False))
def test_batches_depend_on_pairs_and_batch_size_only(pairs: Any, batch_size: int, rng: Any) -> None:
    shuffled = list(pairs)
    rng.shuffle(shuffled)
    first, second = lay(pairs, batch_size), lay(shuffled, batch_size)
    assert [b.ids.tolist() for b in first.batches] == [b.ids.tolist() for b in second.batches]
    assert all(len(batch.ids) <= batch_size for batch in first.batches)
    assert sorted(first.order.tolist()) == list(range(len(pairs)))


@pytest.mark.parametrize("continuation", [[], [1] * 5])
def test_answers_that_cannot_be_scored(continuation: list[int]) -> None:
    with pytest.raises(ConfigError) as caught:
        lay([([1], [2]), ([1], continuation)], max_length=4)
    assert str(caught.value) == (
        f"task 't' has an answer of {len(continuation)} tokens\n"
        "  expected: 1 to 4 tokens (the model's context length)"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_logits(value: float) -> None:
    class Broken(Uniform):
        def __call__(self, *, input_ids: torch.Tensor) -> Any:
            found = super().__call__(input_ids=input_ids)
            found.logits[0, -1, 3] = value
            return found

    with pytest.raises(NonFiniteScores) as caught:
        lay([([1, 2], [4]), ([1], [2])]).score(Broken())
    assert str(caught.value) == (
        "the model's logits are not finite\n  got: 1 of 2 scored tokens are NaN or infinite"
    )
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is NonFiniteScores
    assert str(copy) == str(caught.value)


def test_the_callers_tokenizer_is_left_alone() -> None:
    tokenizer = new_tokenizer()
    assert tokenizer.pad_token is None
    LiveLM(tokenizer, batch_size=1, max_length=None)
    assert tokenizer.pad_token is None
