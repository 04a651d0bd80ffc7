"""Engine: free generation by a second, faster program with a copy of the live model's weights.

Log-likelihoods are always the live model's. An engine only continues prompts, which takes the most time. Its
copy may be wrong: weights may not have been replaced, or answers may be cached from an earlier candidate. A
`Mirror` prevents that. After every change of the weights it makes the engine load them, drop its caches, and
score a canary: a prompt whose log-probabilities must be those of the live model. If they differ, the weights
are loaded once more; if they still differ, the candidate fails.

The two programs round differently, so the canary detects only differences above a tolerance. Answers may
differ from those of transformers where two tokens are almost equally likely, so the engine is part of a run's
identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from evomerge.errors import ConfigError, UserError
from evomerge.evaluation.scores import NonFiniteScores

TOLERANCE = {"float32": 5e-4, "float16": 0.1, "bfloat16": 0.5}
"""Type of the forward pass -> allowed mean difference of the two programs, in nats per canary token.

About twice the largest difference that was measured with right weights, on a CPU (.035 in float16, .26 in
bfloat16), and in float32 ten times (5e-5): see benchmarks/perf/LOG.md.
"""
MOVED = 1e-3
"""If the live model's canary moves by more nats per token between candidates, the engine's moves, too."""
CANARY = 64
"""Largest number of tokens of a canary."""
_GREEDY = {"attention_mask", "do_sample", "temperature", "use_cache"}
"""Generation options that an engine accepts if their values mean greedy generation."""


Logprobs = np.ndarray[Any, np.dtype[np.float64]]


class Engine(Protocol):
    """A program that generates text with given weights."""

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights in place; names are those of a checkpoint."""
        ...

    def forget(self) -> None:
        """Drop everything that was computed with earlier weights, such as cached prefixes."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], *, limit: int, stop: Sequence[str]
    ) -> list[list[int]]:
        """Continue each prompt greedily; return the new tokens, including the one that ends the answer.

        An answer ends after `limit` tokens, with the end-of-text token, or with a complete string of `stop`.
        """
        ...

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Return the log-probability, in nats, of every token but the first, given the tokens before it."""
        ...


class EngineMismatch(UserError):  # noqa: N818  # named for the condition, as a Failure's kind is
    """The engine does not hold the live model's weights."""


class Mirror:
    """Keep an engine's weights equal to the live model's.

    canary: two or more token ids. tolerance: allowed mean difference of their log-probabilities, in nats.
    weights: returns a live model's weights under the names of its checkpoint, as engines know them.
    """

    def __init__(
        self,
        engine: Engine,
        canary: Sequence[int],
        *,
        tolerance: float,
        weights: Callable[[Any], Iterable[tuple[str, torch.Tensor]]],
    ) -> None:
        assert len(canary) > 1, "a canary of one token has no log-probabilities"
        self._engine, self._canary, self._tolerance = engine, list(canary), tolerance
        self._weights = weights
        self._current = False
        self._seen: tuple[Logprobs, Logprobs] | None = None
        self._names: frozenset[str] | None = None

    def weights_changed(self) -> None:
        """Record that the live model's weights have changed."""
        self._current = False

    def sync(self, model: Any) -> None:
        """Load the model's weights into the engine if they changed, and check them with the canary.

        Raises:
            NonFiniteScores: the model's logits are not finite.
            EngineMismatch: the canary's log-probabilities differ, also after loading the weights again.
            ConfigError: the model has other tensors than the first one.
        """
        expected = canary_logprobs(model, self._canary)
        if not self._current:
            self._load(model)
        if self._difference(expected) > self._tolerance:
            self._load(model)
            if (difference := self._difference(expected)) > self._tolerance:
                self._current = False
                raise EngineMismatch(
                    "the generation engine does not hold the candidate's weights",
                    expected=f"a canary's log-probabilities within {self._tolerance:g} nats of the model's",
                    got=(
                        f"a difference of {difference:.3g} nats, also after loading the weights again"
                        if np.isfinite(difference)
                        else "NaN, or the same numbers as with the weights before"
                    ),
                    fix="set executor.generation: transformers",
                )

    def generate(
        self, prompts: Sequence[Sequence[int]], *, limit: int, stop: Sequence[str]
    ) -> list[list[int]]:
        """Continue prompts with the weights of the last `sync`, see `Engine.generate`."""
        return self._engine.generate(prompts, limit=limit, stop=stop)

    def _load(self, model: Any) -> None:
        pairs = list(self._weights(model))
        names = frozenset(name for name, _ in pairs)
        if self._names is None:
            self._names = names
        if names != self._names:
            raise ConfigError(
                "the generation engine was started for the base's layers, and this model has other layers",
                fix="set executor.generation: transformers",
            )
        self._current = False
        self._engine.load(pairs)
        self._engine.forget()
        self._current = True

    def _difference(self, expected: Logprobs) -> float:
        """Return the mean difference in nats per token; infinite for NaN, and if the engine did not move."""
        logprobs = np.array(self._engine.logprobs(self._canary), dtype=np.float64)
        assert logprobs.shape == expected.shape, "one log-probability for each token but the first"
        difference = float(np.abs(logprobs - expected).mean())
        if self._seen is not None:
            model_before, engine_before = self._seen
            moved = float(np.abs(expected - model_before).mean()) > MOVED
            if moved and np.array_equal(logprobs, engine_before):
                return np.inf
        if difference <= self._tolerance:
            self._seen = expected, logprobs
        return difference if np.isfinite(difference) else np.inf


def canary_logprobs(model: Any, tokens: Sequence[int]) -> Logprobs:
    """Return the live model's log-probabilities, in nats, of every token but the first."""
    ids = torch.tensor([list(tokens)], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    token_logprobs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    logprobs: Logprobs = token_logprobs.cpu().double().numpy()
    if not np.isfinite(logprobs).all():
        raise NonFiniteScores("the model's logits are not finite", got="NaN or infinite on a canary prompt")
    return logprobs


def refuse_sampling(task: str, options: dict[str, Any]) -> None:
    """Raise ConfigError for generation options that are not greedy."""
    other = sorted(set(options) - _GREEDY)
    if options.get("do_sample") or options.get("temperature"):
        other.append("sampling")
    if other:
        raise ConfigError(
            f"task {task!r} generates with {', '.join(other)}, which the generation engine does not support",
            expected="greedy generation",
            fix="set executor.generation: transformers, or change generation_kwargs in the task's YAML",
        )
