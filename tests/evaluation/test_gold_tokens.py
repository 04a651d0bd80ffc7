"""What logits say of given tokens: the same bits however many are read at a time."""

from __future__ import annotations

import pytest
import torch

from evomerge.evaluation import gold_tokens


def asked(dtype: torch.dtype, vocabulary: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
    """Logits of 6 rows and 5 columns, places of 29 tokens in any order, and their ids, half the arg-max."""
    torch.manual_seed(0)
    logits = torch.randn(6, 5, vocabulary).to(dtype)
    chosen = torch.randperm(30)[:29]
    place = (chosen // 5, chosen % 5)
    gold = torch.randint(0, vocabulary, (29,))
    gold[::2] = logits[place].argmax(1)[::2]
    return logits, place, gold


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [1, 1000, 2**21])
def test_what_is_read(dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, place, gold = asked(dtype, 333)
    before = logits.clone()
    monkeypatch.setattr(gold_tokens, "IN_CACHE", most)
    likelihood, hit, lead = gold_tokens.read(logits, place, gold)
    assert torch.equal(logits, before)
    exact = logits[place].float()
    at = gold[:, None]
    assert torch.equal(likelihood, exact.gather(1, at)[:, 0] - exact.logsumexp(1))
    assert torch.equal(hit, exact.argmax(1) == gold)
    assert torch.equal(lead, exact.gather(1, at)[:, 0] - exact.scatter(1, at, -torch.inf).amax(1))


def test_of_equals_the_first_is_the_arg_max() -> None:
    logits = torch.tensor([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [1.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    gold = torch.tensor([0, 1, 2, 1])
    _, hit, lead = gold_tokens.read(logits, (torch.arange(4),), gold)
    assert hit.tolist() == [True, False, False, True]
    assert lead.tolist() == [0.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(wrong: float) -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2] = wrong
    likelihood, _, _ = gold_tokens.read(logits, (torch.arange(1),), torch.tensor([1]))
    assert not torch.isfinite(likelihood).any()
