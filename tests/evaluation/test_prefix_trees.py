"""Sequences in one row: a model scores them as it does each alone, or it is not asked to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.evaluation import prefix_trees
from evomerge.evaluation.likelihood import Plan, plan
from evomerge.evaluation.scores import NonFiniteScores
from tests.examples import examples

LENGTH = 128


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            **{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH},
            "initializer_range": 0.2,  # so that a wrong position or mask shows
            **changes,
        }
    )
    return transformers.LlamaForCausalLM(config).eval()


MODEL = llama()
token = st.integers(1, 49)
some = st.lists(token, min_size=16, max_size=30)
pairs_of_trees = st.lists(
    st.tuples(some, st.lists(st.lists(token, min_size=1, max_size=8), min_size=1, max_size=4)),
    min_size=1,
    max_size=5,
)


def lay(pairs: Any, batch_size: int = 8, share: int = LENGTH) -> Plan:
    return plan(pairs, batch_size=batch_size, max_length=LENGTH, names=["t"] * len(pairs), share=share)


def fan(items: Any, preamble: list[int]) -> list[tuple[list[int], list[int]]]:
    return [(preamble + context, answer) for context, answers in items for answer in answers]


@settings(max_examples=examples(40), deadline=None)
@given(pairs_of_trees, st.lists(token, max_size=40), st.integers(1, 9))
def test_shared_and_plain_passes_agree(items: Any, preamble: list[int], batch_size: int) -> None:
    pairs = fan(items, preamble)
    found, expected = (lay(pairs, batch_size, share).score(MODEL) for share in (LENGTH, 0))
    np.testing.assert_allclose(found.ll, expected.ll, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.margin, expected.margin, rtol=0, atol=1e-5)


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9).map(tuple), min_size=1, unique=True))
def test_a_token_sees_the_tokens_of_its_own_sequence(sequences: list[tuple[int, ...]]) -> None:
    tree = prefix_trees.row(sorted(sequences))
    mask = tree.inputs(torch.device("cpu"), torch.float32)["attention_mask"][0, 0]
    for sequence, path in zip(sorted(sequences), tree.paths, strict=True):
        assert tree.ids[path].tolist() == list(sequence)
        assert tree.positions[path].tolist() == list(range(len(sequence)))
        assert torch.nonzero(mask[path[-1]] == 0)[:, 0].tolist() == path.tolist()
    assert len(tree.ids) == len(
        {sequence[:end] for sequence in sequences for end in range(1, 1 + len(sequence))}
    )


def test_choices_and_few_shot_items_are_computed_once() -> None:
    preamble = list(range(1, 41))
    pairs = fan([([item] * 5, [[7, 1, 2], [7, 3], [8]]) for item in (3, 4)], preamble)
    batches = lay(pairs).batches
    assert [batch.ids.shape for batch in batches] == [(1, 40 + 2 * (5 + 2))]
    assert [batch.tree is None for batch in lay(pairs, batch_size=1).batches] == [True] * 6


def test_short_prefixes_and_single_answers_stay_in_rows() -> None:
    pairs = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6, 7]), (list(range(1, 41)), [1])]
    assert all(batch.tree is None for batch in lay(pairs).batches)
    plain = lay(pairs, share=0)
    assert [b.ids.tolist() for b in lay(pairs).batches] == [b.ids.tolist() for b in plain.batches]


def test_longer_inputs_than_attention_looks_back_stay_in_rows() -> None:
    pairs = fan([(list(range(1, 31)), [[7, 1, 2], [7, 3]])], [])
    assert lay(pairs, share=32).batches[0].tree is not None
    assert all(batch.tree is None for batch in lay(pairs, share=30).batches)


SEQUENCES = [[*range(1, 25), 7, 8], [*range(1, 25), 9, 10, 11], [*range(1, 25), 30]]


def test_models_that_take_a_row() -> None:
    assert prefix_trees.agree(MODEL, SEQUENCES)
    assert prefix_trees.agree(llama(attn_implementation="eager"), SEQUENCES)
    assert prefix_trees.agree(llama().to(torch.bfloat16), SEQUENCES)


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
def test_a_model_that_ignores_an_argument_is_found_out(ignored: str) -> None:
    class Deaf(transformers.LlamaForCausalLM):
        def forward(  # type: ignore[override]
            self,
            input_ids: Any,
            attention_mask: Any = None,
            position_ids: Any = None,
            use_cache: bool = False,
            **options: Any,
        ) -> Any:
            given = {"attention_mask": attention_mask, "position_ids": position_ids, ignored: None}
            return super().forward(input_ids=input_ids, **given, **options)

    deaf = Deaf(MODEL.config).eval()
    deaf.load_state_dict(MODEL.state_dict())
    assert prefix_trees.takes(deaf)
    assert not prefix_trees.agree(deaf, SEQUENCES)


def test_a_model_without_the_arguments_or_with_an_error_is_not_asked() -> None:
    class Bare:
        device, dtype, config = torch.device("cpu"), torch.float32, MODEL.config

        def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
            return MODEL(input_ids=input_ids)

        __call__ = forward

    class Angry(Bare):
        def forward(
            self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, use_cache: Any = None
        ) -> Any:
            assert attention_mask is None or attention_mask.ndim == 2
            return MODEL(input_ids=input_ids)

        __call__ = forward

    assert not prefix_trees.takes(Bare())
    assert not prefix_trees.agree(Bare(), SEQUENCES)
    assert not prefix_trees.agree(Angry(), SEQUENCES)


def test_weights_that_are_not_finite_decide_nothing() -> None:
    broken = llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteScores):
        prefix_trees.agree(broken, SEQUENCES)


@pytest.mark.parametrize(
    ("config", "reached"),
    [
        (transformers.LlamaConfig(), None),
        (transformers.MistralConfig(sliding_window=16), 16),
        (transformers.MistralConfig(sliding_window=None), None),
        (transformers.Qwen2Config(sliding_window=16, use_sliding_window=False), None),
        (transformers.Gemma3TextConfig(sliding_window=16), 16),
        (transformers.Qwen3NextConfig(), 0),
    ],
)
def test_how_far_attention_looks_back(config: Any, reached: int | None) -> None:
    class Model:
        def __init__(self) -> None:
            self.config = config

    assert prefix_trees.reach(Model()) == reached


def test_how_much_a_model_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that rounds more than others is taken, one that reads something else is not."""
    model = llama().to(torch.bfloat16)
    sequences = [list(sequence) for sequence in SEQUENCES]
    expected = prefix_trees.alone(model, sequences)
    for rounding, taken in ((0.0, 0.08), (0.05, 0.14), (0.2, 0.24)):
        monkeypatch.setattr(prefix_trees, "_padded", lambda *_, rounding=rounding: expected + rounding)
        assert prefix_trees.same(expected + taken, expected, model, sequences)
        assert not prefix_trees.same(expected + taken + 0.03, expected, model, sequences)
    assert not prefix_trees.same(expected * torch.nan, expected, model, sequences)


def test_it_is_measured_in_a_padded_pass() -> None:
    class Bare:
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
            return MODEL(input_ids=input_ids)

        __call__ = forward

    sequences = [list(sequence) for sequence in SEQUENCES]
    for model in (MODEL, Bare()):
        found = prefix_trees._padded(model, sequences, 3)
        torch.testing.assert_close(found, prefix_trees.alone(MODEL, sequences, 3), rtol=0, atol=1e-4)
