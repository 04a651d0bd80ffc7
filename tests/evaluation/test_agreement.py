"""Agreement with a specialist's distributions: its value, its gradient, and that it is no score."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.evaluation import gradient, likelihood
from evomerge.evaluation.activations import Room
from evomerge.evaluation.agreement import LEAST, agreements, read_off
from evomerge.evaluation.distributions import LIKELIEST, Distributions, packed, unpacked
from evomerge.evaluation.gradient import differentiable
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.smooth_loss import SmoothLoss, SmoothTask

from .conftest import MakeSuite, entry, new_model

PAIRS = [([1, 2, 3], [4, 5]), ([6], [7]), ([1, 2], [3, 4, 5, 6]), ([2], [7])]
ROOM = Room(most=2**29, by_token=1.0, by_answer=1.0)
FRAME: dict[str, Any] = {"max_length": 24, "name": "write"}


@pytest.fixture(scope="module")
def rows() -> list[Distributions]:
    return read_off(new_model(seed=1), PAIRS, batch_size=2, **FRAME)


def expected(model: Any, pair: tuple[list[int], list[int]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return (tokens, vocabulary) probabilities at a pair's continuation, of a row of its own."""
    context, answer = pair
    with torch.no_grad():
        logits = model(torch.tensor([context + answer])).logits[0].double()
    return logits.softmax(-1)[len(context) - 1 : -1].numpy()


def test_what_is_read_off_is_what_the_model_expects(rows: list[Distributions]) -> None:
    for pair, row in zip(PAIRS, rows, strict=True):
        everything = expected(new_model(seed=1), pair)
        assert row.answer == tuple(pair[1])
        assert row.ids.shape == row.logs.shape == (len(pair[1]), min(LIKELIEST, everything.shape[1]))
        np.testing.assert_allclose(
            np.exp(row.logs), np.take_along_axis(everything, row.ids, axis=1), rtol=1e-4
        )
        assert (np.diff(row.logs, axis=1) <= 0).all()


def test_the_agreement_is_its_definition(rows: list[Distributions]) -> None:
    model = new_model(seed=2)
    found = agreements(model, PAIRS, rows, room=ROOM, **FRAME).detach().numpy()
    for pair, row, value in zip(PAIRS, rows, found, strict=True):
        ours = np.take_along_axis(expected(model, pair), row.ids, axis=1)
        theirs = np.exp(row.logs.astype(np.float64))
        rest, our_rest = (np.maximum(1 - part.sum(1), LEAST) for part in (theirs, ours))
        divergence = (theirs * np.log(theirs / ours)).sum(1) + rest * np.log(rest / our_rest)
        assert value == pytest.approx(np.exp(-divergence.mean()), rel=1e-4)
        assert 0 < value < 1
    same = agreements(new_model(seed=1), PAIRS, rows, room=ROOM, **FRAME)
    np.testing.assert_allclose(same.detach().numpy(), 1.0, atol=1e-5)


def test_they_are_stored_bit_for_bit(rows: list[Distributions]) -> None:
    found = unpacked(json.loads(json.dumps(packed(rows))))
    for one, other in zip(rows, found, strict=True):
        assert one.answer == other.answer
        assert one.ids.tobytes() == other.ids.tobytes()
        assert one.logs.tobytes() == other.logs.tobytes()


@pytest.fixture(scope="module")
def taught(make_suite: MakeSuite, tokenizer: Any) -> Harness:
    """A harness with what another model wrote and expected, beside a task with likelihoods."""
    suite = make_suite(entry("write", companion="distribution", specialist="s"), entry("first"))
    options: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": 8, "max_length": None}
    found = Harness(suite, **options).distributions(new_model(seed=1), ["write", "first"])
    assert found.keys() == {"write"}
    return Harness(suite, **options, blocks=3, distributions=found)


def test_it_is_no_score(taught: Harness, model: Any) -> None:
    scores = taught.evaluate_split(model, "search")
    assert scores["write"].smooth is None
    assert scores["write"].margin is None
    assert all(not task.taught for task in taught.items("test").tasks)


def test_its_gradient_is_that_of_finite_differences(taught: Harness) -> None:
    tasks = (
        SmoothTask(task="write", gain=0.7, items=(0, 3, 4, 17, 29)),
        SmoothTask(task="first", gain=0.4, items=(1, 2)),
    )
    loss = SmoothLoss(tasks=tasks, price=0.0, softness=0.5)
    model = new_model(seed=2)

    def value() -> float:
        with differentiable(model):
            return taught.backward(model, "search", loss)[0]

    with differentiable(model):
        total, values = taught.backward(model, "search", loss)
        slopes = [parameter.grad.clone() for parameter in model.parameters()]
    assert 0 < values["write"] < 1
    assert total == pytest.approx(-0.7 * values["write"] - 0.4 * values["first"], rel=1e-5)
    length = float(sum((slope**2).sum() for slope in slopes)) ** 0.5
    ends = []
    for step in (-2e-3, 2e-3):
        with torch.no_grad():
            for parameter, slope in zip(model.parameters(), slopes, strict=True):
                parameter += step * slope / length
        ends.append(value())
        with torch.no_grad():
            for parameter, slope in zip(model.parameters(), slopes, strict=True):
                parameter -= step * slope / length
    assert (ends[1] - ends[0]) / 4e-3 == pytest.approx(length, rel=0.01)


@pytest.mark.parametrize("long", [False, True])
def test_small_batches_give_the_same_gradient(
    taught: Harness, model: Any, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tuple(SmoothTask(task=task, gain=1.0, items=tuple(range(30))) for task in ("write", "first"))
    loss = SmoothLoss(tasks=tasks, price=0.0, softness=0.5)
    found = []
    for size in (64, 3):
        if long and found:  # so that the same inputs count as long
            size = 64
            for module in (gradient, likelihood):
                monkeypatch.setattr(module, "TOKENS", 1)
        with differentiable(model):
            total, _ = taught.backward(model, "search", loss, batch_size=size)
            found.append((total, [parameter.grad.clone() for parameter in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_an_answer_of_no_tokens_ends_the_text(taught: Harness) -> None:
    (request,) = taught.items("test").tasks[0].groups[0]
    prompt, answer = taught._lm.written(request, [])
    assert prompt
    assert answer == [taught._lm.eot_token_id]
    assert taught._lm.written(request, [3, 4])[1] == [3, 4]
